"""The shared layers against float64 NumPy loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from djax.models.layers.basic import contract, rms_norm, rotary_angles, rotate
from djax.models.layers.moe import SoftmaxTopK, router_logits

SEED = 11


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
    ids, weights = SoftmaxTopK(experts_per_token=2)(logits)
    best = np.argsort(-shares, axis=1)[:, :2]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(weights, np.take_along_axis(shares, best, 1), rtol=1e-5)
    assert (np.asarray(weights).sum(1) < 0.9999).any()
    assert router_logits(jnp.ones((1, 16), jnp.bfloat16), jnp.ones((6, 16), jnp.bfloat16)).dtype == jnp.float32


def test_contractions_accumulate_in_float32() -> None:
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(contract("md,nd->mn", ones, ones)[0, 0]) == 4096
    got = contract("md,nd->mn", ones[:, :4097], jnp.full((1, 4096), 1.0078125, jnp.bfloat16), dtype=jnp.float32)
    assert got.dtype == jnp.float32
    assert float(got[0, 0]) == 4096 * 1.0078125
    assert jax.eval_shape(lambda a: contract("md,nd->mn", a, a), ones).dtype == jnp.bfloat16
