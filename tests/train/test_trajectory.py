"""Trajectory compression: the states that are drawn, the loss, and what is kept of a generation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.engine.results import Generation
from djax.models import init_params
from djax.models.config import LladaMoeConfig
from djax.train import LossWeights
from djax.train.trajectory import (
    NEVER,
    Trajectories,
    TrajectoryBatch,
    compression_loss,
    concatenate,
    draw_states,
    kept,
    trajectory_batches,
)
from tests.support.drivers.train_run import CONFIG

COMMIT_STEP = np.array([
    [NEVER, NEVER, 0, 2, 1, 0, 3, NEVER, NEVER],  # prompt, four steps, a tail that was never decoded
    [NEVER, NEVER, NEVER, 0, 0, 0, 0, 0, 0],      # one step
    [NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER]])
IS_ANSWER = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]], bool)
MASK = CONFIG["mask_id"]


@pytest.mark.slow
def test_every_pair_of_states_is_drawn_as_often_as_it_should() -> None:
    draws = 6000
    masked, asked = jax.vmap(draw_states, in_axes=(0, None, None))(
        jax.random.split(jax.random.key(0), draws), jnp.asarray(COMMIT_STEP), jnp.asarray(IS_ANSWER))
    masked, asked = np.asarray(masked), np.asarray(asked)
    assert not (asked & ~masked).any()
    assert not (masked & ~IS_ANSWER).any()
    step = COMMIT_STEP[0]
    never = IS_ANSWER[0] & (step == NEVER)
    found: Counter[tuple[int, int]] = Counter()
    for hidden, wanted in zip(masked[:, 0], asked[:, 0], strict=True):
        assert hidden[never].all(), "what was never decoded is masked in every state"
        assert not wanted[never].any()
        first = int(step[hidden & ~never].min())
        last = int(step[wanted].max()) + 1
        np.testing.assert_array_equal(hidden, IS_ANSWER[0] & ((step >= first) | never))
        np.testing.assert_array_equal(wanted, (step >= first) & (step < last))
        found[first, last] += 1
    expected = {(i, j): draws / 4 / (4 - i) for i in range(4) for j in range(i + 1, 5)}
    assert found.keys() == expected.keys()
    for pair, count in expected.items():
        assert abs(found[pair] - count) < 5 * count**0.5, pair
    np.testing.assert_array_equal(masked[:, 1], np.broadcast_to(IS_ANSWER[1], masked[:, 1].shape))
    np.testing.assert_array_equal(asked[:, 1], masked[:, 1])
    assert not asked[:, 2].any(), "a row without steps has nothing to learn"


def batch_of() -> TrajectoryBatch:
    rng = np.random.default_rng(0)
    valid = np.ones(IS_ANSWER.shape, bool)
    valid[0, 0] = False
    return TrajectoryBatch(
        tokens=jnp.asarray(rng.integers(1, 60, IS_ANSWER.shape), jnp.int32), is_answer=jnp.asarray(IS_ANSWER),
        valid=jnp.asarray(valid), commit_step=jnp.asarray(COMMIT_STEP, jnp.int32))


def test_the_loss_is_the_cross_entropy_between_the_states() -> None:
    config = LladaMoeConfig(**CONFIG)
    graphdef, params = init_params(config, jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    batch, key = batch_of(), jax.random.key(5)
    loss = partial(compression_loss, mask_id=MASK, weights=LossWeights(balance=0.5, router_z=0.25))
    total, losses = jax.jit(loss, static_argnums=0)(graphdef, params, batch, key)
    masked, asked = draw_states(key, batch.commit_step, batch.is_answer)

    @jax.jit
    def forward(tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden_and_router(
            tokens, positions=batch.positions, key_mask=batch.valid, remat=False)
        return model.unembed(hidden)

    logits = np.asarray(forward(jnp.where(masked, MASK, batch.tokens)), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = []
    for row in range(3):
        where = np.flatnonzero(asked[row])
        rows.append(-np.mean([log_probs[row, t, batch.tokens[row, t]] for t in where]) if len(where) else 0.0)
    np.testing.assert_allclose(losses.diffusion, np.mean(rows), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(rows) + 0.5 * losses.balance + 0.25 * losses.router_z, rtol=1e-5)


@pytest.mark.slow
def test_training_on_trajectories_lowers_the_loss() -> None:
    import optax

    from djax.train import init_state, make_step

    graphdef, params = init_params(LladaMoeConfig(**CONFIG), jax.random.key(1))
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_step(graphdef, optimizer, mask_id=MASK, objective=compression_loss))
    state, losses = init_state(nnx.to_pure_dict(params), optimizer), []
    for _ in range(60):
        state, report = step(state, batch_of(), jax.random.key(0))
        losses.append(float(report.losses.diffusion))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def generation(rows: int, length: int, *, seed: int = 0) -> Generation:
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 50, (rows, length)).astype(np.int32)
    is_open = np.broadcast_to(np.arange(length) >= 3, canvas.shape)
    no = np.zeros_like(is_open)
    counts = np.ones(rows, np.int32)
    return Generation(
        text=None, tokens=[row[3:] for row in canvas], canvas=canvas, canvas_mask=~no, is_open=is_open, is_masked=no,
        lengths=counts * (length - 3), nfe=counts, steps=counts, refreshes=counts, stop_reason=["length"] * rows,
        commit_step=np.where(is_open, rng.integers(0, 4, canvas.shape), NEVER), log_prob=np.zeros(canvas.shape))


def test_accepted_rows_are_kept_and_joined(tmp_path: Path) -> None:
    short, long = generation(3, 6), generation(2, 8, seed=1)
    parts = [kept(short, [True, False, True]), kept(long, [False, True])]
    found = concatenate(parts)
    assert len(found) == 3
    np.testing.assert_array_equal(found.tokens[:2, 2:], short.canvas[[0, 2]])
    assert not found.valid[:2, :2].any(), "shorter rows are padded on the left"
    assert not found.is_answer[:2, :2].any()
    assert (found.commit_step[:2, :2] == NEVER).all()
    np.testing.assert_array_equal(found.commit_step[2], long.commit_step[1])
    path = tmp_path / "found.npz"
    found.save(path)
    again = Trajectories.load(path)
    for name, array in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), array)
        assert getattr(again, name).dtype == array.dtype
    with pytest.raises(ValueError, match="accepted: got 2 verdicts; allowed one for each of the 3 rows"):
        kept(short, [True, False])
    with pytest.raises(ValueError, match="trajectories: got none"):
        concatenate([kept(short, [False] * 3)])


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    if content is None:
        np.savez(path, tokens=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"found.npz: got no trajectories .* remove it") as error:
        Trajectories.load(path)
    assert "\n" not in str(error.value)


def test_batches_follow_from_the_update() -> None:
    found = concatenate([kept(generation(7, 8), [True] * 7)])
    make = trajectory_batches(found, batch_size=3, seed=4)
    passes = [np.concatenate([np.asarray(make(2 * n + i).tokens) for i in range(2)]) for n in range(3)]
    rows = {tuple(row) for row in found.tokens.tolist()}
    for once in passes:
        assert len({tuple(row) for row in once.tolist()} & rows) == 6, "no row twice in a pass"
    assert any(not np.array_equal(passes[0], other) for other in passes[1:])
    again: Any = trajectory_batches(found, batch_size=3, seed=4)(3)
    for field in dataclasses.fields(again):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(make(3), field.name))
    with pytest.raises(ValueError, match="batch_size: got 8; allowed an integer from 1 to 7"):
        trajectory_batches(found, batch_size=8, seed=0)
