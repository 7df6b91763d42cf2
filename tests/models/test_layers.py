"""The shared layers against float64 NumPy loops."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.models.layers import attend, contract, rms_norm, rotary_angles, rotate
from djax.models.moe import _top_k_by_maxima, route, router_logits

SEED = 11


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_loop(groups: int) -> None:
    rng = np.random.default_rng(SEED)
    query = rng.normal(size=(2, 3, 4, 8)) * 2
    key, value = rng.normal(size=(2, 2, 5, groups, 8))
    mask = np.array([[True, False, True, True, False], [False, True, False, False, False]])
    expected = np.zeros_like(query)
    for b in range(2):
        keys = np.nonzero(mask[b])[0]
        for w in range(3):
            for h in range(4):
                g = h // (4 // groups)
                scores = np.array([query[b, w, h] @ key[b, t, g] for t in keys]) / np.sqrt(8)
                shares = np.exp(scores - scores.max())
                expected[b, w, h] = sum(p * value[b, t, g] for p, t in zip(shares / shares.sum(), keys, strict=True))
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (query, key, value)), key_mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=f"seed {SEED}")


def test_attention_survives_large_scores_and_no_keys() -> None:
    query, key = jnp.full((2, 1, 1, 4), 300.0), jnp.stack([jnp.full((1, 4), s) for s in (300.0, -300.0, 299.0)])
    key = jnp.broadcast_to(key[None], (2, 3, 1, 4))
    value = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 1, 4)
    got = attend(query, key, value, key_mask=jnp.array([[True, True, True], [False, False, False]]))
    np.testing.assert_array_equal(got[0, 0, 0], value[0, 0, 0])
    np.testing.assert_array_equal(got[1], 0.0)


def test_rotation_is_that_of_complex_numbers() -> None:
    rng = np.random.default_rng(SEED)
    x, positions = rng.normal(size=(1, 5, 2, 8)), np.array([[0, 1, 7, 100, 2000]])
    turns = np.exp(1j * positions[..., None] * 50000.0 ** (-np.arange(4) / 4))[:, :, None]
    turned = (x[..., :4] + 1j * x[..., 4:]) * turns
    got = rotate(jnp.asarray(x, jnp.float32), rotary_angles(jnp.asarray(positions), head_dim=8, theta=50000.0))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=5e-4)
    np.testing.assert_array_equal(got[:, 0], x[:, 0].astype(np.float32))


def test_rms_norm_in_both_dtypes() -> None:
    rng = np.random.default_rng(SEED)
    x, weight = rng.normal(size=(3, 16)) * 5, rng.normal(size=16)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), eps=1e-5)
    np.testing.assert_allclose(got, expected, atol=5e-6)
    low = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), eps=1e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float64), expected, rtol=2e-2, atol=1e-3)
    tiny = rms_norm(jnp.full((1, 4), 1e-4), jnp.ones(4), eps=1e-5)
    np.testing.assert_allclose(tiny, 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-5)


def test_router_weights_are_shares_of_all_experts() -> None:
    rng = np.random.default_rng(SEED)
    x, router = rng.normal(size=(9, 16)), rng.normal(size=(6, 16))
    scores = np.exp(x @ router.T)
    shares = scores / scores.sum(1, keepdims=True)
    logits = router_logits(jnp.asarray(x, jnp.float32), jnp.asarray(router, jnp.float32))
    ids, weights = route(logits, experts_per_token=2)
    best = np.argsort(-shares, axis=1)[:, :2]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(weights, np.take_along_axis(shares, best, 1), rtol=1e-5)
    assert (np.asarray(weights).sum(1) < 0.9999).any()
    assert router_logits(jnp.ones((1, 16), jnp.bfloat16), jnp.ones((6, 16), jnp.bfloat16)).dtype == jnp.float32


def test_the_best_experts_by_maxima_are_those_of_top_k() -> None:
    rng = np.random.default_rng(SEED)
    spread = rng.random((40, 16))
    for shares in (spread, np.round(spread * 3) / 3, np.ones((2, 5))):  # ties: the lowest index goes first
        values, indices = jax.jit(partial(_top_k_by_maxima, k=4))(jnp.asarray(shares, jnp.float32))
        expected = jax.lax.top_k(jnp.asarray(shares, jnp.float32), 4)
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(indices, expected[1])
    poisoned = _top_k_by_maxima(jnp.full((1, 5), jnp.nan), k=2)
    assert np.isnan(poisoned[0]).all()
    assert ((np.asarray(poisoned[1]) >= 0) & (np.asarray(poisoned[1]) < 5)).all()


def test_contractions_accumulate_in_float32() -> None:
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(contract("md,nd->mn", ones, ones)[0, 0]) == 4096
    got = contract("md,nd->mn", ones[:, :4097], jnp.full((1, 4096), 1.0078125, jnp.bfloat16), dtype=jnp.float32)
    assert got.dtype == jnp.float32
    assert float(got[0, 0]) == 4096 * 1.0078125
    assert jax.eval_shape(lambda a: contract("md,nd->mn", a, a), ones).dtype == jnp.bfloat16
