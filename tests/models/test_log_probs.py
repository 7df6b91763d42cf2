"""Log-probs by vocabulary chunks against `jax.nn.log_softmax`, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.contracts.types import Forbidden
from djax.models.layers.log_probs import token_log_probs

SEED = 5
VOCAB = 37


def operands(dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(SEED)
    hidden, head = rng.normal(size=(2, 5, 6)) * 3, rng.normal(size=(VOCAB, 6))
    tokens = rng.integers(0, VOCAB, (2, 5))
    tokens[0, :2] = 0, VOCAB - 1
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(tokens, jnp.int32)


def whole(hidden: jax.Array, head: jax.Array, tokens: jax.Array, temperature: jax.Array) -> jax.Array:
    logits = jnp.einsum("bld,vd->blv", hidden, head, precision="highest") / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 100])
def test_values_and_gradients_are_those_of_the_whole_softmax(chunk: int) -> None:
    hidden, head, tokens = operands()
    weights = jnp.asarray(np.random.default_rng(SEED).normal(size=tokens.shape), jnp.float32)
    temperature = jnp.float32(0.7)

    def both(function: object) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(hidden: jax.Array, head: jax.Array, temperature: jax.Array) -> jax.Array:
            return jnp.sum(weights * function(hidden, head, tokens, temperature))  # type: ignore[operator]

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(hidden, head, temperature)

    def chunked(hidden: jax.Array, head: jax.Array, tokens: jax.Array, temperature: jax.Array) -> jax.Array:
        return token_log_probs(hidden, head, tokens, temperature=temperature, vocab_chunk=chunk)

    for got, expected in zip(jax.tree.leaves(both(chunked)), jax.tree.leaves(both(whole)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_forbidden_tokens_are_outside_of_the_softmax() -> None:
    """Values and gradients are those of the smaller vocabulary; a forbidden token is impossible and has no NaN."""
    hidden, head, tokens = operands()
    allowed = jnp.asarray([token for token in range(30) if token not in (4, 11)])
    place = jnp.asarray(np.random.default_rng(1).integers(0, len(allowed), tokens.shape), jnp.int32)
    forbidden = Forbidden(ids=jnp.asarray([11, 4, -1]), limit=jnp.int32(30))
    temperature = jnp.float32(0.7)

    def chunked(hidden: jax.Array, head: jax.Array, temperature: jax.Array) -> jax.Array:
        return token_log_probs(hidden, head, allowed[place], temperature=temperature, forbidden=forbidden,
                               vocab_chunk=8)

    def small(hidden: jax.Array, head: jax.Array, temperature: jax.Array) -> jax.Array:
        return whole(hidden, head[allowed], place, temperature)

    factor = jnp.asarray(np.random.default_rng(2).normal(size=tokens.shape), jnp.float32)
    both = [jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(factor * f(*a)), argnums=(0, 1, 2)))(
        hidden, head, temperature) for f in (chunked, small)]
    for got, expected in zip(jax.tree.leaves(both[0]), jax.tree.leaves(both[1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    never = jnp.full(tokens.shape, 11, jnp.int32)
    assert np.isneginf(token_log_probs(hidden, head, never, forbidden=forbidden)).all()
    grads = jax.grad(lambda h: jnp.sum(0.0 * token_log_probs(h, head, tokens, forbidden=forbidden)))(hidden)
    assert np.isfinite(grads).all()


def test_large_logits_and_half_precision() -> None:
    hidden, head, tokens = operands()
    got = token_log_probs(hidden * 1000, head, tokens, vocab_chunk=8)
    np.testing.assert_allclose(got, whole(hidden * 1000, head, tokens, jnp.float32(1)), rtol=1e-5)
    low = operands("bfloat16")
    got = token_log_probs(*low, vocab_chunk=8)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, whole(*(a.astype(jnp.float32) for a in low[:2]), tokens, jnp.float32(1)), atol=2e-2)
    grads = jax.grad(lambda hidden, head: token_log_probs(hidden, head, tokens).sum(), argnums=(0, 1))(*low[:2])
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2


def test_nothing_as_large_as_the_logits_is_made() -> None:
    """The largest float32 intermediate in either pass is a chunk, the head, or the hidden states."""
    rows, vocab, width, chunk = 64, 4096, 8, 256
    shapes = (jax.ShapeDtypeStruct((1, rows, width), jnp.float32), jax.ShapeDtypeStruct((vocab, width), jnp.float32),
              jax.ShapeDtypeStruct((1, rows), jnp.int32))
    step = jax.jit(jax.grad(lambda *a: token_log_probs(*a, vocab_chunk=chunk).sum(), argnums=(0, 1)))
    temporaries = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (6 * rows * chunk + 2 * vocab * width) < 4 * rows * vocab


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="vocab_chunk: got 0; allowed an integer of at least 1"):
        token_log_probs(*operands(), vocab_chunk=0)
