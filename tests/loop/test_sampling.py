"""Sampling is exact: frequencies, log-probs and the random numbers' dependence on rows, positions and steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import cache_policies, proposals, strategies, transforms
from djax.contracts.canvas import Canvas
from djax.contracts.types import Candidates
from djax.loop.denoise import denoise
from tests.support import oracle, toy

ROWS, COLUMNS, VOCAB = 100, 1000, 12
"""1e5 draws of the same distribution in one call."""
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 1.5
REJECT = 1e-4
"""Seeds are fixed, so a p-value below this means that the sampler is wrong (or that its noise changed)."""

FILTERS: dict[str, tuple[Any, Any]] = {
    "none": (lambda t: transforms.Identity(), lambda t: oracle.identity),
    "top_k": (lambda t: transforms.TopK(4), lambda t: oracle.top_k(4)),
    "top_p": (lambda t: transforms.TopP(0.9, t), lambda t: oracle.top_p(0.9, t)),
    "min_p": (lambda t: transforms.MinP(0.1, t), lambda t: oracle.min_p(0.1, t)),
    "forbid": (lambda t: transforms.ForbidTokens(jnp.array([int(LOGITS.argmax())]), jnp.int32(11)),
               lambda t: oracle.forbid([int(LOGITS.argmax())], 11)),
}


@jax.jit
def draw(logits: jax.Array, key: jax.Array, propose: Any, transform: Any) -> tuple[Candidates, jax.Array]:
    logits = jnp.broadcast_to(logits, (ROWS, COLUMNS, VOCAB))
    mask = jnp.ones((ROWS, COLUMNS), bool)
    logits, _ = transform.step(logits, mask, transform.init(ROWS, COLUMNS))
    out = propose.step(jax.random.split(key, ROWS), logits, jnp.zeros((ROWS, COLUMNS), jnp.int32))
    return out, logits[0, 0]


def target(name: str, temperature: float) -> np.ndarray:
    """The distribution that the filter leaves, computed by the oracle."""
    margin = oracle.Margin()
    step = oracle.Step(0, 0, 0, 0, 1, 1, 1, [0], margin, None, None)
    logits = FILTERS[name][1](temperature)(LOGITS[None].astype(np.float64), step, {})[0]
    assert margin.value > oracle.RELIABLE
    return oracle.softmax(logits / temperature)


def p_value(counts: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square; tokens of probability 0 must not occur at all."""
    from scipy import stats  # takes a second, which every worker would spend on collecting

    assert counts[probability == 0].sum() == 0
    kept = probability > 0
    if kept.sum() == 1:
        return 1.0  # One token left: that it is the right one was just checked.
    return float(stats.chisquare(counts[kept], probability[kept] * counts.sum()).pvalue)


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies(name: str) -> None:
    for seed, temperature in enumerate((0.3, 1.0, 2.0)):
        out, _ = draw(LOGITS, jax.random.key(seed), proposals.Sample(jnp.float32(temperature)),
                      FILTERS[name][0](jnp.float32(temperature)))
        counts = np.bincount(np.asarray(out.token).ravel(), minlength=VOCAB)
        assert counts.sum() == 100_000
        probability = target(name, temperature)
        p = p_value(counts, probability)
        assert p > REJECT, f"{name}, temperature {temperature}, seed {seed}: p = {p:.2e}, {counts}"


def test_frequencies_test_has_power() -> None:
    """The same chi-square rejects a temperature that is off by 3 %."""
    out, _ = draw(LOGITS, jax.random.key(0), proposals.Sample(jnp.float32(1.03)), transforms.Identity())
    counts = np.bincount(np.asarray(out.token).ravel(), minlength=VOCAB)
    assert p_value(counts, target("none", 1.0)) < REJECT


@pytest.mark.parametrize("name", FILTERS)
def test_log_prob_is_that_of_the_distribution_drawn_from(name: str) -> None:
    for temperature in (0.3, 1.0, 2.0):
        out, filtered = draw(LOGITS, jax.random.key(7), proposals.Sample(jnp.float32(temperature)),
                             FILTERS[name][0](jnp.float32(temperature)))
        expected = target(name, temperature)[np.asarray(out.token)]
        np.testing.assert_allclose(out.log_prob, np.log(expected), atol=2e-5)
        # The confidence is the one at temperature 1, whatever the sampler does.
        at_one = oracle.softmax(np.asarray(filtered, np.float64))[np.asarray(out.token)]
        np.testing.assert_allclose(out.confidence, at_one, rtol=1e-5)


@pytest.mark.slow
def test_temperature_zero_is_greedy() -> None:
    """Exactly at 0, and in the limit; the log-prob is the greedy one (temperature 1) at 0."""
    rng = np.random.default_rng(1)
    # A permutation of spread values: no two logits closer than 0.5, so that tiny noise cannot swap them.
    logits = jnp.asarray(np.stack([rng.permutation(VOCAB) * 0.5 for _ in range(32)])[None], jnp.float32)
    tokens, keys = jnp.zeros((1, 32), jnp.int32), jax.random.split(jax.random.key(1), 1)
    greedy = proposals.Greedy().step(keys, logits, tokens)
    zero = proposals.Sample(jnp.float32(0.0)).step(keys, logits, tokens)
    for a, b in zip(jax.tree.leaves(greedy), jax.tree.leaves(zero), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(greedy.token, logits.argmax(-1))
    np.testing.assert_allclose(greedy.log_prob, jax.nn.log_softmax(logits, -1).max(-1), rtol=1e-5)
    near = proposals.Sample(jnp.float32(1e-3)).step(keys, logits, tokens)
    np.testing.assert_array_equal(near.token, greedy.token)
    assert not np.isnan(near.log_prob).any()


@pytest.mark.slow
def test_large_logits_do_not_overflow() -> None:
    logits = jnp.asarray([[[500.0, 499.0, -500.0, -jnp.inf]]])
    for temperature in (0.0, 0.01, 1.0, 100.0):
        out = proposals.Sample(jnp.float32(temperature)).step(
            jax.random.split(jax.random.key(0), 1), logits, jnp.zeros((1, 1), jnp.int32))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), temperature
        assert int(out.token[0, 0]) != 3


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "positions"])
def test_neighbours_are_independent(axis: int) -> None:
    """Pairs of draws of neighbouring rows or positions have the product distribution."""
    out, _ = draw(LOGITS, jax.random.key(3), proposals.Sample(jnp.float32(1.0)), transforms.TopK(4))
    token = np.moveaxis(np.asarray(out.token), axis, 0)
    pairs = (token[0::2] * VOCAB + token[1::2]).ravel()
    single = target("top_k", 1.0)
    p = p_value(np.bincount(pairs, minlength=VOCAB ** 2), np.outer(single, single).ravel())
    assert p > REJECT, f"p = {p:.2e}"


# --- through the loop ---

LENGTH = 8


@jax.jit
def decode_scripted(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> Any:
    """512 rows of one block, one position per step in random order: every draw is a fresh one."""
    canvas = Canvas.from_prompts([[1]] * 512, max_new_tokens=LENGTH, block_length=LENGTH, mask_id=toy.MASK,
                                 pad_id=toy.PAD, bucket=False)
    params = {"script": jnp.broadcast_to(logits, (512, LENGTH + 1, VOCAB))}
    return denoise(toy.ScriptedDenoiser(), params, canvas, key, propose=proposals.Sample(temperature),
                   strategy=strategies.RandomOrder(strategies.Quota(LENGTH)))


@pytest.mark.slow
def test_frequencies_through_the_loop() -> None:
    for temperature in (0.3, 1.0, 2.0):
        counts, steps = np.zeros(VOCAB), np.zeros((LENGTH, LENGTH))
        expected = oracle.softmax(LOGITS.astype(np.float64) / temperature)
        for seed in range(25):
            result = decode_scripted(LOGITS, jax.random.key(seed), jnp.float32(temperature))
            token, step = np.asarray(result.tokens)[:, 1:], np.asarray(result.commit_step)[:, 1:]
            counts += np.bincount(token.ravel(), minlength=VOCAB)
            np.add.at(steps, (np.broadcast_to(np.arange(LENGTH), step.shape), step), 1)
            np.testing.assert_allclose(np.asarray(result.log_prob)[:, 1:], np.log(expected[token]), atol=2e-5)
        assert counts.sum() == 512 * LENGTH * 25
        p = p_value(counts, expected)
        assert p > REJECT, f"temperature {temperature}: p = {p:.2e}, {counts}"
        # Every position is as likely to be committed at every step.
        p = p_value(steps.ravel(), np.full(steps.size, 1 / steps.size))
        assert p > REJECT, f"order, temperature {temperature}: p = {p:.2e}"


@pytest.mark.slow
def test_tokens_and_order_are_independent() -> None:
    """The proposal's and the strategy's randomness come from different keys."""
    from scipy import stats

    table = np.zeros((LENGTH, VOCAB))
    for seed in range(25):
        result = decode_scripted(LOGITS * 0.3, jax.random.key(100 + seed), jnp.float32(1.0))
        token, step = np.asarray(result.tokens)[:, 1:], np.asarray(result.commit_step)[:, 1:]
        np.add.at(table, (step.ravel(), token.ravel()), 1)
    p = float(stats.chi2_contingency(table).pvalue)
    assert p > REJECT, f"p = {p:.2e}"


PARAMS = toy.make_params()


@jax.jit
def generate(canvas: Canvas, key: jax.Array, temperature: jax.Array, row_ids: jax.Array) -> Any:
    return denoise(toy.ToyDenoiser(), PARAMS, canvas, key, strategy=strategies.Threshold(0.9),
                   cache_policy=cache_policies.Dual(), propose=proposals.Sample(temperature), row_ids=row_ids)


def same_prompts(count: int) -> Canvas:
    return Canvas.from_prompts([[3, 1, 4]] * count, max_new_tokens=12, block_length=6, mask_id=toy.MASK,
                               pad_id=toy.PAD, bucket=False)


@pytest.mark.slow
def test_eight_rows_of_one_prompt_differ() -> None:
    rows = jnp.arange(8)
    hot = np.asarray(generate(same_prompts(8), jax.random.key(0), jnp.float32(1.0), rows).tokens)
    assert len({tuple(row) for row in hot}) == 8
    cold = np.asarray(generate(same_prompts(8), jax.random.key(0), jnp.float32(0.0), rows).tokens)
    assert len({tuple(row) for row in cold}) == 1
    other = np.asarray(generate(same_prompts(8), jax.random.key(1), jnp.float32(1.0), rows).tokens)
    assert (other != hot).any(-1).all()


@pytest.mark.slow
def test_a_row_is_its_row_id() -> None:
    """Reversed ids give reversed rows; a part of the batch with its ids gives that part."""
    key, warm = jax.random.key(5), jnp.float32(1.0)
    whole = generate(same_prompts(8), key, warm, jnp.arange(8))
    reverse = generate(same_prompts(8), key, warm, jnp.arange(8)[::-1])
    np.testing.assert_array_equal(whole.tokens, np.asarray(reverse.tokens)[::-1])
    np.testing.assert_array_equal(whole.commit_step, np.asarray(reverse.commit_step)[::-1])
    part = generate(same_prompts(3), key, warm, jnp.array([2, 7, 0]))
    np.testing.assert_array_equal(part.tokens, np.asarray(whole.tokens)[[2, 7, 0]])
    np.testing.assert_allclose(part.log_prob, np.asarray(whole.log_prob)[[2, 7, 0]], atol=1e-5)


def test_rare_tokens_occur() -> None:
    """Noise that is too coarse never draws a token of probability 1e-4."""
    logits = np.full(VOCAB, math.log(1e-4), np.float32)
    logits[0] = math.log(1 - 11e-4)
    out, _ = draw(logits, jax.random.key(9), proposals.Sample(jnp.float32(1.0)), transforms.Identity())
    counts = np.bincount(np.asarray(out.token).ravel(), minlength=VOCAB)
    assert p_value(counts, np.exp(logits.astype(np.float64))) > REJECT
