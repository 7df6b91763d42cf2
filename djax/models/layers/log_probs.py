"""log-probs of given tokens without the logits of the whole vocabulary: chunk by chunk, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from djax.contracts.types import FORBID_NOTHING, Forbidden
from djax.errors import check_integer
from djax.models.layers.basic import contract


def _chunk(
    head: Float[Array, "V D"], start: Int[Array, ""], size: int
) -> tuple[Float[Array, "C D"], Int[Array, " C"], Int[Array, ""]]:
    """Rows of the head, their ids (-1 where an earlier chunk had them), and the first one's row.

    The last chunk overlaps its neighbour: all have one shape.
    """
    first = jnp.minimum(start, head.shape[0] - size)
    ids = first + jnp.arange(size, dtype=jnp.int32)
    return lax.dynamic_slice_in_dim(head, first, size), jnp.where(ids >= start, ids, -1), first


def _logits(hidden: Array, rows: Array, ids: Array, forbidden: Forbidden) -> Float[Array, "M C"]:
    logits = contract("md,cd->mc", hidden, rows, dtype=jnp.float32)
    dropped = (ids < 0) | (ids >= forbidden.limit) | (ids[:, None] == forbidden.ids[None]).any(axis=-1)
    return jnp.where(dropped[None], -jnp.inf, logits)


def _starts(head: Array, size: int) -> Int[Array, " chunks"]:
    return jnp.arange(0, head.shape[0], size, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _log_probs(
    hidden: Array, head: Array, tokens: Array, temperature: Array, forbidden: Forbidden, size: int
) -> Float[Array, " M"]:
    return _forward(hidden, head, tokens, temperature, forbidden, size)[0]


def _forward(
    hidden: Array, head: Array, tokens: Array, temperature: Array, forbidden: Forbidden, size: int
) -> tuple[Float[Array, " M"], tuple[Any, ...]]:
    def add(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple[Array, Array, Array], None]:
        largest, total, chosen = carry
        rows, ids, _ = _chunk(head, start, size)
        logits = _logits(hidden, rows, ids, forbidden)
        new = jnp.maximum(largest, logits.max(axis=1))
        # differences are divided and not logits: these overflow at low temperatures
        total = total * jnp.exp((largest - new) / temperature)
        total += jnp.exp((logits - new[:, None]) / temperature).sum(axis=1)
        return (new, total, chosen + jnp.where(ids[None] == tokens[:, None], logits, 0.0).sum(axis=1)), None

    count = hidden.shape[0]
    # a finite start: -inf minus -inf is NaN
    start = jnp.full(count, jnp.finfo(jnp.float32).min, jnp.float32), *jnp.zeros((2, count), jnp.float32)
    (largest, total, chosen), _ = lax.scan(add, start, _starts(head, size))
    return ((chosen - largest) / temperature - jnp.log(total),
            (hidden, head, tokens, temperature, forbidden, largest, total))


def _backward(
    size: int, residuals: tuple[Any, ...], cotangent: Float[Array, " M"]
) -> tuple[Array, Array, None, Array, None]:
    hidden, head, tokens, temperature, forbidden, largest, total = residuals

    def add(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple[Array, Array, Array], None]:
        grad_hidden, grad_head, grad_temperature = carry
        rows, ids, first = _chunk(head, start, size)
        logits = _logits(hidden, rows, ids, forbidden)
        scaled = (logits - largest[:, None]) / temperature
        share, allowed = jnp.exp(scaled) / total[:, None], logits != -jnp.inf
        chosen = (ids[None] == tokens[:, None]) & allowed
        grad = cotangent[:, None] * (chosen.astype(jnp.float32) - share)  # of the scaled logits
        counts = allowed & (grad != 0)  # an infinite one of no weight adds nothing
        grad_temperature -= jnp.sum(jnp.where(counts, grad * scaled, 0.0)) / temperature
        grad = (grad / temperature).astype(head.dtype)
        part = contract("mc,md->cd", grad, hidden, dtype=jnp.float32)
        old = lax.dynamic_slice_in_dim(grad_head, first, size)
        return (
            grad_hidden + contract("mc,cd->md", grad, rows, dtype=jnp.float32),
            lax.dynamic_update_slice_in_dim(grad_head, old + part, first, axis=0), grad_temperature), None

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32), jnp.float32(0.0)
    (grad_hidden, grad_head, grad_temperature), _ = lax.scan(add, zeros, _starts(head, size))
    return (grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype), None,
            grad_temperature.astype(temperature.dtype), None)


_log_probs.defvjp(_forward, _backward)


def token_log_probs(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    forbidden: Forbidden = FORBID_NOTHING,
    vocab_chunk: int = 8192,
) -> Float[Array, "B L"]:
    """log softmax(hidden @ head^T / temperature) at `tokens`, in float32; nothing as large as [B, L, V] is made.

    Memory is a few [B * L, vocab_chunk] in float32, in the backward pass too, where the logits are computed
    again. Reverse mode only.

    Args:
        hidden: hidden states after the final norm.
        head: the output matrix, in hidden's dtype.
        tokens: ids in [0, V).
        temperature: divides the logits.
        forbidden: tokens outside of the softmax; their own log-prob is -inf.
        vocab_chunk: columns held at once.

    Raises:
        ValueError: `vocab_chunk` is below 1.
    """
    size = min(check_integer("vocab_chunk", vocab_chunk, 1), head.shape[0])
    flat = _log_probs(
        hidden.reshape(-1, hidden.shape[-1]), head, tokens.reshape(-1), jnp.asarray(temperature, jnp.float32),
        jax.tree.map(jnp.asarray, forbidden), size)
    return flat.reshape(tokens.shape)
