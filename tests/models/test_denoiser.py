"""`ModelDenoiser` and `Guided` as the loop uses them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import Guided, ModelDenoiser, build
from tests.support import golden

MASK, LENGTH, PROMPT = 155, 12, 5
PLAIN = ModelDenoiser(nnx.split(build(golden.CONFIG))[0])
UNCONDITIONAL = np.zeros((2, LENGTH), bool)
UNCONDITIONAL[0, :PROMPT] = True
UNCONDITIONAL[1, 2:PROMPT] = True


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return golden.parameters()


def canvas() -> np.ndarray:
    tokens = np.random.default_rng(2).integers(0, 150, (2, LENGTH))
    tokens[:, PROMPT:] = MASK
    return tokens


def guided(scale: float) -> Guided:
    return Guided(PLAIN, jnp.float32(scale), jnp.int32(MASK), jnp.asarray(UNCONDITIONAL))


@jax.jit
def logits_of(denoiser: Any, params: Any, tokens: Any, start: Any, cache: Any) -> tuple[Any, Any]:
    window = tokens.shape[1]
    hidden, cache = denoiser.apply(
        params, denoiser.embed(params, tokens),
        positions=denoiser.prepare_positions(params, jnp.broadcast_to(start + jnp.arange(window), tokens.shape)),
        key_mask=jnp.ones((2, LENGTH), bool), window_start=start, write=jnp.ones(tokens.shape, bool), cache=cache)
    return denoiser.unembed(params, hidden), cache


def test_guidance_is_the_formula_of_two_forwards(params: Any) -> None:
    tokens = canvas()
    blinded = np.where(UNCONDITIONAL, MASK, tokens)
    start = jnp.int32(0)
    with_prompt, _ = logits_of(PLAIN, params, tokens, start, None)
    without, _ = logits_of(PLAIN, params, blinded, start, None)
    assert float(abs(with_prompt - without).max()) > 0.1
    for scale in (0.0, 0.5, 2.0):
        got, cache = logits_of(guided(scale), params, tokens, start, None)
        assert cache is None
        expected = np.asarray(without) + (scale + 1) * (np.asarray(with_prompt) - np.asarray(without))
        np.testing.assert_allclose(got, expected, atol=2e-4)
    assert logits_of._cache_size() == 2, "a scale is a leaf: sweeping it compiles nothing"


@pytest.mark.slow
def test_guidance_keeps_two_caches_and_cuts_its_window(params: Any) -> None:
    tokens, start = canvas(), jnp.int32(3)
    denoiser = guided(1.0)
    full, cache = logits_of(denoiser, params, tokens, jnp.int32(0), denoiser.init_cache(params, 2, LENGTH))
    assert len(cache) == 2
    assert float(abs(cache[0].layers[0].key - cache[1].layers[0].key).max()) > 0.1
    got, _ = logits_of(denoiser, params, tokens[:, 3:9], start, cache)
    np.testing.assert_allclose(got, full[:, 3:9], atol=3e-4)


@pytest.mark.slow
def test_hidden_states_can_be_sliced_along_the_window(params: Any) -> None:
    tokens, denoiser = canvas(), guided(1.0)

    @jax.jit
    def hidden_states(params: Any, tokens: Any) -> Any:
        return denoiser.apply(
            params, denoiser.embed(params, tokens),
            positions=denoiser.prepare_positions(params, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)),
            key_mask=jnp.ones((2, LENGTH), bool),
            window_start=jnp.int32(0), write=jnp.ones(tokens.shape, bool), cache=None)[0]

    hidden = hidden_states(params, tokens)
    assert all(leaf.shape[:2] == tokens.shape for leaf in jax.tree.leaves(hidden))
    unembed = jax.jit(denoiser.unembed)
    part = unembed(params, jax.tree.map(lambda leaf: leaf[:, 4:7], hidden))
    np.testing.assert_allclose(part, unembed(params, hidden)[:, 4:7], atol=1e-4)


def test_forwards_are_counted() -> None:
    assert PLAIN.forwards == 1
    assert guided(1.0).forwards == 2


def test_numbers_are_leaves_and_the_model_is_static() -> None:
    assert jax.tree.leaves(PLAIN) == []
    assert len(jax.tree.leaves(guided(1.0))) == 3
    assert hash(jax.tree.structure(guided(1.0))) == hash(jax.tree.structure(guided(2.0)))
    assert ModelDenoiser(nnx.split(build(golden.CONFIG))[0]) == PLAIN


def test_guidance_passes_the_expected_embedding_on(params: Any) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 160)), jnp.float32)
    np.testing.assert_array_equal(
        *(jax.jit(denoiser.expected_embedding)(params, logits) for denoiser in (guided(1.0), PLAIN)))
