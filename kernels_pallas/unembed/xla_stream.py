"""The vocabulary in chunks, by an XLA loop that keeps running values: never [N, V].

Each chunk's logits are [N, C] float32, small enough for a cache, and the head is read once. With `expected` the
embedding is read once too, each chunk's rows weighted while its logits are at hand.

On a GPU the loop is written out, up to `unrolled` chunks: a product reads a constant slice of the head in place, where
a slice that moves is copied first, three times the traffic. The embedding's chunks XLA copies all the same where the
rows are few. A TPU reads both in place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.configs import load_config
from kernels_pallas.hardware import device_kind
from kernels_pallas.unembed.reference import allowed_ids, matmul, readable
from kernels_pallas.unembed.running import (
    Drawn,
    Greedy,
    Tile,
    add_drawn,
    add_greedy,
    finish,
    finite,
    log_of_sum,
    logits_at,
    rescale,
    start_drawn,
    start_greedy,
)
from kernels_pallas.unembed.types import Call, Readout

_ALIGNMENT = 128


class Expected(NamedTuple):
    """Sums over all ids seen so far: of exp(logit - shift) * embedding, and what it takes to go on."""

    maximum: Float[Array, "N 1"]
    total: Float[Array, "N 1"]
    weighted: Float[Array, "N D2"]


def chunk_length(rows: int, vocabulary: int, *, elements: int, least: int, unrolled: int) -> int:
    """Ids a chunk: about `elements` logits in all, but no fewer ids than `least`, and no more chunks than `unrolled`.

    `unrolled` is 0 for a loop, of any length.
    """
    wanted = max(least, elements // rows)
    if unrolled:
        wanted = max(wanted, -(-vocabulary // unrolled))
    return min(-(-wanted // _ALIGNMENT) * _ALIGNMENT, vocabulary)


def unembed_xla_stream(call: Call, *, chunk: int | None = None, unrolled: bool | None = None) -> Readout:
    """Implement `kernels_pallas.unembed.unembed`.

    `chunk` is the number of ids at a time and `unrolled` whether the loop is written out, as configured if None.
    """
    rows, vocabulary = call.hidden.shape[0], call.head.shape[0]
    config = load_config("unembed", device_kind=device_kind(), regime="xla_stream")
    length = min(chunk, vocabulary) if chunk else chunk_length(rows, vocabulary, **config)
    steps = -(-vocabulary // length)
    none = jnp.full((rows, 1), -jnp.inf, jnp.float32)
    expected = None
    if call.embedding is not None:
        weighted = jnp.zeros((rows, call.embedding.shape[1]), jnp.float32)
        expected = Expected(none, jnp.zeros_like(none), weighted)
    state = (start_greedy(rows), None if call.temperature is None else start_drawn(rows), expected)
    if config["unrolled"] > 0 if unrolled is None else unrolled:
        for step in range(steps):
            # without the barrier all chunks' logits may be computed first, and be in memory at once
            hidden, state = lax.optimization_barrier((call.hidden, state))
            state = _add_chunk(call._replace(hidden=hidden), state, step, length)
    else:
        state = lax.fori_loop(0, steps, lambda step, state: _add_chunk(call, state, step, length), state)
    greedy, drawn, expected = state
    values = log_total_all = None
    if expected is not None and call.embedding is not None:
        values = (expected.weighted / expected.total).astype(call.embedding.dtype)
        log_total_all = log_of_sum(expected.maximum, expected.total)[:, 0]
    return finish(
        call, greedy, drawn, at=logits_at(call, readable(call)), expected=values, log_total_all=log_total_all)


def _add_chunk(
    call: Call, state: tuple[Greedy, Drawn | None, Expected | None], step: Int[Array, ""] | int, length: int
) -> tuple[Greedy, Drawn | None, Expected | None]:
    greedy, drawn, expected = state
    # The last chunk reaches back over ids that were counted, so that no chunk is shorter.
    last = call.head.shape[0] - length
    start = min(step * length, last) if isinstance(step, int) else jnp.minimum(step * length, last)
    rows_of = lambda matrix: lax.dynamic_slice_in_dim(matrix, start, length)  # noqa: E731
    logits = matmul(call.hidden, rows_of(call.head), contract=(1, 1))
    place = start + jnp.arange(length, dtype=jnp.int32)
    ids, fresh = call.first_id + place, place >= step * length
    tile = Tile(logits, ids[None], fresh[None], (fresh & allowed_ids(call, ids))[None])
    after = add_greedy(greedy, tile, second=call.second, entropy=call.entropy)
    if drawn is not None and call.temperature is not None and call.noise_keys is not None:
        temperature = call.temperature
        words = call.noise_keys[:, :1], call.noise_keys[:, 1:]
        best_logits = greedy.best_logit, after.best_logit
        drawn = lax.cond(
            temperature > 0,
            lambda: add_drawn(drawn, tile, best_logits, temperature=temperature, key_words=words),
            lambda: drawn)
    if expected is not None and call.embedding is not None:
        expected = _add_expected(expected, tile, rows_of(call.embedding))
    return after, drawn, expected


def _add_expected(state: Expected, tile: Tile, embedding: Float[Array, "C D2"]) -> Expected:
    logits = jnp.where(tile.fresh, tile.logits, -jnp.inf)
    tile_maximum = jnp.max(jnp.where(logits > -jnp.inf, logits, -jnp.inf), axis=1, keepdims=True)
    maximum = jnp.maximum(state.maximum, tile_maximum)
    weights = jnp.exp(logits - finite(maximum))
    factor = jnp.exp(rescale(state.maximum, maximum))
    return Expected(
        maximum=maximum,
        total=factor * state.total + jnp.sum(weights, axis=1, keepdims=True),
        weighted=factor * state.weighted + matmul(weights.astype(embedding.dtype), embedding, contract=(1, 0)))
