"""The block-diffusion loss against forwards of the rows that its two readings stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from djax.train import LossWeights
from djax.train.block import (
    BlockBatch,
    Blocks,
    block_diffusion_loss,
    block_mask,
    draw_blocks,
    noised_log_probs,
    with_places,
)
from kernels_pallas import attention
from tests.train.test_loss import GRAPHDEF, MASK, PARAMS, SEED, batch_of, log_probs_of

PROMPT, ANSWER, PADDING = 2, 6, 1


def placed(rows: int) -> BlockBatch:
    return with_places(lambda update: batch_of(rows, prompt=PROMPT, answer=ANSWER, padding=PADDING))(0)


@jax.jit
def all_log_probs(batch: BlockBatch, blocks: Blocks) -> Any:
    return noised_log_probs(nnx.merge(GRAPHDEF, PARAMS), batch, blocks, mask_id=MASK)[0]


def log_probs(batch: BlockBatch, blocks: Blocks) -> NDArray[np.float32]:
    """Of the answer tokens, without the padding of `places`."""
    return np.asarray(all_log_probs(batch, blocks))[:, :ANSWER]


def blocks_of(batch: BlockBatch, number: Any, masked: Any) -> Blocks:
    wide = jnp.pad(jnp.asarray([number]), ((0, 0), (0, batch.places.shape[1] - ANSWER)), mode="edge")
    return Blocks(number=wide, noise=jnp.ones(wide.shape),
                  masked=jnp.zeros(wide.shape, bool).at[0, :ANSWER].set(jnp.asarray(masked)))


def block_causal(batch: BlockBatch, number: list[int], masked: list[bool]) -> NDArray[np.float32]:
    """The same from one forward a block: what is before it as it is, itself noised, nothing behind it."""
    row = np.asarray(batch.tokens[0])
    of_block = np.array([0] * (PADDING + PROMPT) + number)
    found = np.zeros(ANSWER, np.float32)
    for block in sorted(set(number)):
        here = of_block == block
        noised = np.array([False] * (PADDING + PROMPT) + masked) & here
        # what is behind the block stays, at one width for one program, where nothing that counts sees it
        mask = (of_block[:, None] >= of_block[None]) & np.asarray(batch.valid[0])[None]
        got = np.asarray(log_probs_of(
            np.where(noised, MASK, row)[None], row[None], batch.positions[:1], mask[None]))[0]
        found[np.flatnonzero(np.array(number) == block)] = got[here]
    return found


@pytest.mark.parametrize(("number", "masked"), [
    ([1, 1, 1, 1, 1, 1], [True] * 6), ([1, 2, 3, 4, 5, 6], [True] * 6),
    ([1, 1, 2, 2, 2, 3], [True, False, True, True, False, True]), ([1, 1, 1, 2, 2, 2], [False, True] * 3)])
def test_both_readings_are_one_forward_a_block(number: list[int], masked: list[bool]) -> None:
    batch = placed(1)
    np.testing.assert_allclose(
        log_probs(batch, blocks_of(batch, number, masked))[0], block_causal(batch, number, masked), atol=2e-4)


def test_a_masked_token_does_not_see_itself() -> None:
    """Another token in its place, and all others' log-probs in its block and before are the same."""
    batch = placed(1)
    blocks = blocks_of(batch, [1, 1, 2, 2, 3, 3], [True] * 6)
    place = PADDING + PROMPT + 2
    other = dataclasses.replace(batch, tokens=batch.tokens.at[0, place].set((batch.tokens[0, place] + 1) % 10))
    before, after = log_probs(batch, blocks), log_probs(other, blocks)
    keep = [0, 1, 3]
    np.testing.assert_array_equal(before[0, keep], after[0, keep])
    assert before[0, 2] != after[0, 2], "it is another token's log-prob"
    assert not np.array_equal(before[0, 4:], after[0, 4:]), "what is behind the block sees it"
    everything = np.asarray(jax.nn.logsumexp(jnp.stack([jnp.asarray(log_probs(dataclasses.replace(
        batch, tokens=batch.tokens.at[0, place].set(token)), blocks)) for token in range(11)]), axis=0))
    np.testing.assert_allclose(everything[0, 2], 0.0, atol=1e-5)


@pytest.mark.slow
def test_blocks_of_one_token_give_the_chain_rule() -> None:
    """4096 draws of a row: their mean is -log p from left to right, a token each."""
    single = placed(1)
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, 512, axis=0), single)
    loss = jax.jit(lambda key: block_diffusion_loss(
        GRAPHDEF, PARAMS, many, key, mask_id=MASK, longest=1)[1].diffusion)
    means = np.array([float(loss(key)) for key in jax.random.split(jax.random.key(SEED), 8)]) * ANSWER
    expected = -log_probs(single, blocks_of(single, [1, 2, 3, 4, 5, 6], [True] * 6)).sum()
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - expected) < 4 * error
    assert error < 0.05 * expected


def test_draws_of_blocks() -> None:
    rows, tokens = 256, 64
    is_token = jnp.arange(tokens)[None] < jnp.asarray([[tokens - 4]] * rows)
    blocks = jax.jit(draw_blocks)(jax.random.key(SEED), is_token)
    number, noise, masked = (np.asarray(leaf) for leaf in (blocks.number, blocks.noise, blocks.masked))
    assert (number[:, 0] == 1).all()
    assert set(np.unique(np.diff(number, axis=1))) == {0, 1}
    lengths = np.sort(tokens / number[:, -1])
    assert lengths[0] < 1.2
    assert lengths[-1] > 20
    assert 4 < np.median(lengths) < 8, "the logarithm is uniform between 1 and 32"
    for row in range(0, rows, 16):
        levels = {(int(block), float(level)) for block, level in zip(number[row], noise[row], strict=True)}
        assert len(levels) == number[row, -1], "one level a block"
    assert not masked[:, -4:].any()
    assert abs(masked[:, :-4].mean() - 0.5) < 0.02
    assert np.corrcoef(masked[:, :-4].ravel(), noise[:, :-4].ravel())[0, 1] > 0.5


@pytest.mark.slow
def test_places_are_those_of_the_answer() -> None:
    batch = placed(3)
    loss = jax.jit(lambda batch: block_diffusion_loss(GRAPHDEF, PARAMS, batch, jax.random.key(0), mask_id=MASK)[1])
    assert batch.places.shape == (3, 9)
    assert batch.places[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 9, 9]
    empty = with_places(lambda update: dataclasses.replace(
        batch_of(2), is_answer=jnp.zeros((2, 8), bool)))(0)
    assert float(loss(empty).diffusion) == 0.0


def test_what_is_given_between_answers_belongs_to_what_is_before_it() -> None:
    """Learned, given, learned: the given one must not be seen from the block before it."""
    valid = jnp.ones((1, 4), bool)
    mask = np.asarray(block_mask(valid, jnp.asarray([[1, 3]]), jnp.asarray([[1, 2]])))[0].astype(int)
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0],  # the first answer and what is given behind it
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]]  # noised


@pytest.mark.slow
def test_gradients_are_finite_differences() -> None:
    batch, key = placed(3), jax.random.key(SEED)
    weights = LossWeights(balance=0.3, router_z=0.2)
    total = jax.jit(lambda params: block_diffusion_loss(
        GRAPHDEF, params, batch, key, mask_id=MASK, weights=weights, vocab_chunk=4)[0])
    gradient = jax.jit(jax.grad(total))(PARAMS)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))))
    step = 2e-3 / norm
    up, down = (float(total(jax.tree.map(lambda value, slope, sign=sign: value + sign * step * slope,
                                         PARAMS, gradient))) for sign in (1, -1))
    assert (up - down) / 2 == pytest.approx(2e-3 * norm, rel=0.03)


def test_a_mask_for_each_query_is_that_of_all_where_they_are_equal() -> None:
    rng = np.random.default_rng(SEED)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 5, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    mask = jnp.asarray(rng.random((2, 5)) < 0.6)
    np.testing.assert_array_equal(
        attention(query, key, value, key_mask=mask),
        attention(query, key, value, key_mask=jnp.broadcast_to(mask[:, None], (2, 5, 5))))
    one = jnp.zeros((2, 5, 5), bool).at[:, jnp.arange(5), (jnp.arange(5) + 1) % 5].set(True)
    np.testing.assert_allclose(
        attention(query, key, value, key_mask=one), jnp.roll(jnp.repeat(value, 2, axis=2), -1, axis=1), atol=1e-6)
