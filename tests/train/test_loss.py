"""The masked-diffusion loss against exact enumeration, finite differences and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import build
from djax.models.config import LladaMoeConfig
from djax.train import Batch, LossWeights, masked_diffusion_loss, row_losses, sample_masks
from djax.train.loss import router_losses

CONFIG = LladaMoeConfig(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, num_experts=4,
    experts_per_token=2, expert_size=6, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=64, mask_id=10, eos_id=0,
    pad_id=0, dtype="float32")
GRAPHDEF, _SHAPES = nnx.split(build(CONFIG))
_RNG = np.random.default_rng(2)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(
        0.24 * _RNG.normal(size=leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape), leaf.dtype), _SHAPES)
"""Twelve times the initial scale, at which every distribution is flat: an error would hide."""
MASK = CONFIG.mask_id
SEED = 17


def batch_of(rows: int, *, prompt: int = 2, answer: int = 6, padding: int = 0) -> Batch:
    """Random rows: padding, a prompt, an answer."""
    rng = np.random.default_rng(SEED)
    shape = (rows, padding + prompt + answer)
    column = np.broadcast_to(np.arange(shape[1]), shape)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 10, shape), jnp.int32),
        is_answer=jnp.asarray(column >= padding + prompt), valid=jnp.asarray(column >= padding))


@jax.jit
def log_probs_of(tokens: Any, targets: Any, positions: Any, valid: Any) -> Any:
    model = nnx.merge(GRAPHDEF, PARAMS)
    hidden, _ = model.hidden_and_router(tokens, positions=positions, key_mask=valid, remat=False)
    return model.log_probs(hidden, targets)


def exact_bound(batch: Batch) -> float:
    """The loss's mean over t and masks for one row of 6 answer tokens, all 64 masks enumerated.

    The integral over t of t**(k - 1) * (1 - t)**(6 - k) is 1 / (k * comb(6, k)).
    """
    where = np.flatnonzero(np.asarray(batch.is_answer[0]))
    masks = [set(chosen) for k in range(1, 7) for chosen in itertools.combinations(where.tolist(), k)]
    tokens = np.repeat(np.asarray(batch.tokens), len(masks), axis=0)
    masked = np.array([[column in chosen for column in range(tokens.shape[1])] for chosen in masks])
    valid, positions = (jnp.repeat(a, len(masks), axis=0) for a in (batch.valid, batch.positions))
    got = np.asarray(log_probs_of(jnp.where(masked, MASK, tokens), tokens, positions, valid), np.float64)
    sizes = masked.sum(1)
    return float(sum(-got[i][masked[i]].sum() / (k * comb(6, k)) for i, k in enumerate(sizes)))


@pytest.mark.slow
def test_loss_is_an_unbiased_estimate_of_the_bound() -> None:
    """4096 rows in 8 batches; rows of a batch are correlated, so the batches' spread gives the standard error."""
    single = batch_of(1)
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, 512, axis=0), single)
    loss = jax.jit(lambda key: masked_diffusion_loss(GRAPHDEF, PARAMS, many, key, mask_id=MASK)[1].diffusion)
    means = np.array([float(loss(key)) for key in jax.random.split(jax.random.key(SEED), 8)]) * 6
    expected, error = exact_bound(single), means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - expected) < 4 * error
    assert error < 0.02 * expected


@pytest.mark.slow
def test_bound_is_above_the_chain_rule_of_any_order() -> None:
    """The mean of -log p over all orders is the bound itself, so some order is below it and one above."""
    batch = batch_of(1)
    where = np.flatnonzero(np.asarray(batch.is_answer[0]))
    orders = [np.random.default_rng(i).permutation(where) for i in range(400)]
    tokens = np.asarray(batch.tokens[0])
    rows, places = [], []
    for order in orders:
        for step, place in enumerate(order):
            row = tokens.copy()
            row[order[step:]] = MASK
            rows.append(row)
            places.append(place)
    shape = (len(rows), len(tokens))
    got = np.asarray(log_probs_of(
        jnp.asarray(np.stack(rows)), jnp.broadcast_to(batch.tokens, shape), jnp.broadcast_to(batch.positions, shape),
        jnp.ones(shape, bool)))
    negative = -got[np.arange(len(rows)), places].reshape(len(orders), -1).sum(1)
    error = negative.std() / np.sqrt(len(orders))
    assert abs(negative.mean() - exact_bound(batch)) < 4 * error
    assert negative.min() < exact_bound(batch) < negative.max()


def test_noise_is_uniform_and_masks_follow_it() -> None:
    is_answer = jnp.asarray(np.arange(50) >= 10)[None].repeat(400, 0)
    noise, masked = sample_masks(jax.random.key(SEED), is_answer)
    assert not np.asarray(masked)[:, :10].any()
    np.testing.assert_allclose(np.sort(noise), (np.arange(400) + 0.5) / 400, atol=2 / 400)
    assert abs(np.corrcoef(np.asarray(masked).sum(1), noise)[0, 1] - 1) < 0.05
    assert not np.array_equal(noise, np.sort(noise)[::-1])
    other, _ = sample_masks(jax.random.key(SEED + 1), is_answer)
    assert not np.array_equal(noise, other)


@pytest.mark.slow
def test_gradients_are_finite_differences() -> None:
    batch, key = batch_of(3, padding=1), jax.random.key(SEED)
    weights = LossWeights(balance=0.3, router_z=0.2)
    total = jax.jit(lambda params: masked_diffusion_loss(
        GRAPHDEF, params, batch, key, mask_id=MASK, weights=weights, vocab_chunk=4)[0])
    gradient = jax.jit(jax.grad(total))(PARAMS)
    rng = np.random.default_rng(SEED)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # along the gradient the slope is its own norm, far above float32's noise; a random direction checks the rest
        for direction in (np.asarray(leaf), rng.normal(size=leaf.shape)):
            norm = np.linalg.norm(direction)
            if norm < 1e-4:
                continue
            step = 2e-3 * direction / norm

            def moved(sign: int, path: Any = path, step: np.ndarray = step) -> float:
                return float(total(jax.tree_util.tree_map_with_path(
                    lambda where, value: value + sign * step if where == path else value, PARAMS)))

            slope = (moved(1) - moved(-1)) / 2
            expected = float(np.sum(np.asarray(leaf) * step))
            assert abs(slope - expected) < 0.03 * np.linalg.norm(leaf) * 2e-3 + 2e-5, (path, slope, expected)


@pytest.mark.slow
def test_remat_and_chunks_change_nothing() -> None:
    batch, key = batch_of(2), jax.random.key(1)

    def gradient(**options: Any) -> Any:
        return jax.jit(jax.grad(lambda params: masked_diffusion_loss(
            GRAPHDEF, params, batch, key, mask_id=MASK, **options)[0]))(PARAMS)

    plain = gradient()
    for options in ({"remat": True}, {"vocab_chunk": 3}):
        for got, expected in zip(jax.tree.leaves(gradient(**options)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_padding_and_prompt_are_not_learned() -> None:
    """What stands on padding does not matter; a prompt token matters only as context."""
    batch, key = batch_of(2, padding=2), jax.random.key(1)
    loss = jax.jit(lambda batch: masked_diffusion_loss(GRAPHDEF, PARAMS, batch, key, mask_id=MASK)[1].diffusion)
    changed = dataclasses.replace(batch, tokens=batch.tokens.at[:, :2].set(7))
    assert float(loss(changed)) == float(loss(batch))
    assert batch.positions[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    nothing = dataclasses.replace(batch, is_answer=jnp.zeros_like(batch.is_answer))
    assert float(loss(nothing)) == 0.0


def test_row_losses_ignore_what_is_not_masked() -> None:
    log_probs = jnp.asarray([[-1.0, jnp.nan, -2.0], [-3.0, -1.0, -1.0]])
    masked = jnp.asarray([[True, False, True], [False, False, False]])
    np.testing.assert_allclose(row_losses(log_probs, masked, jnp.asarray([0.5, 0.1])), [6.0, 0.0])


def test_router_losses_by_hand() -> None:
    """Two experts of four, three valid positions: counts and means written out."""
    logits = jnp.asarray(np.random.default_rng(SEED).normal(size=(2, 1, 4, 4)) * 2, jnp.float32)
    valid = jnp.asarray([[True, True, True, False]])
    balance, router_z = router_losses(logits, valid, experts_per_token=2)
    kept = np.asarray(logits, np.float64)[:, 0, :3]
    shares = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    expected = []
    for layer in shares:
        used = np.zeros(4)
        for row in layer:
            used[np.argsort(-row)[:2]] += 1 / 6
        expected.append(4 * np.sum(used * layer.mean(0)))
    assert float(balance) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(router_z) == pytest.approx(np.mean(np.log(np.exp(kept).sum(-1)) ** 2), rel=1e-5)
    even, _ = router_losses(jnp.zeros((1, 1, 4, 4)), valid, experts_per_token=4)
    assert float(even) == pytest.approx(1.0)
