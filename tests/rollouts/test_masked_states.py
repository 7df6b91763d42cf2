"""Masked states against enumeration: all 64 masks of a 6-token completion, scored by a float64 model written apart."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import rl
from djax.contracts.types import Forbidden
from tests.support import toy

PROMPT, COMPLETION = [3, 1, 4], [5, 9, 2, 6, 11, 7]
LENGTH = len(COMPLETION)
DRAWS = 2000
FORBIDDEN = Forbidden(ids=np.asarray([toy.MASK], np.int32), limit=np.int32(toy.VOCAB))
OLD = toy.make_params(8)


def perturbed(scale: float) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + scale * np.abs(leaf).mean() * rng.normal(size=leaf.shape), OLD)


def table(params: dict) -> np.ndarray:
    """log p of each token at each of the 64 masks [64, 6]; bit i of the row's index hides token i."""
    model, found = toy.NumpyToy(params), np.zeros((2 ** LENGTH, LENGTH))
    for number in range(2 ** LENGTH):
        shown = [toy.MASK if number >> i & 1 else token for i, token in enumerate(COMPLETION)]
        logits = model.forward(model.embed(np.asarray(PROMPT + shown)), 0, None)[len(PROMPT):]
        logits[:, toy.MASK] = -np.inf
        top = logits.max(axis=1, keepdims=True)
        log_total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        found[number] = logits[np.arange(LENGTH), COMPLETION] - log_total
    return found


TABLE = table(OLD)
EVERYTHING = 2 ** LENGTH - 1


def members(number: int) -> list[int]:
    return [i for i in range(LENGTH) if number >> i & 1]


def of_size(size: int) -> float:
    """Mean over the sets of a size of the summed log-probs of their tokens."""
    sums = [sum(TABLE[sum(1 << i for i in chosen)][i] for i in chosen)
            for chosen in itertools.combinations(range(LENGTH), size)]
    return sum(sums) / len(sums)


ELBO = sum(LENGTH / size * of_size(size) for size in range(1, LENGTH + 1)) / LENGTH
ONE_STEP = float(TABLE[EVERYTHING].sum())
CHAIN = sum(float(TABLE[EVERYTHING >> i << i][i]) for i in range(LENGTH))


def at_ratio(t: float) -> float:
    """1/t times the expected sum over tokens masked with probability t each."""
    return sum(t ** len(members(s)) * (1 - t) ** (LENGTH - len(members(s))) * sum(TABLE[s][i] for i in members(s))
               for s in range(2 ** LENGTH)) / t


def rollouts(rows: int) -> rl.Rollout:
    return rl.as_rollout([PROMPT] * rows, [COMPLETION] * rows, mask_id=toy.MASK, pad_id=toy.PAD, forbidden=FORBIDDEN)


def numbers(states: rl.MaskedStates, rollout: rl.Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Each state's index in a table [B, n], and its weights [B, n, 6]."""
    here = slice(rollout.first_block, rollout.first_block + LENGTH)
    masks, weights = np.asarray(states.masks), np.asarray(states.weights, np.float64)
    assert not masks[..., :here.start].any()
    assert not weights[..., :here.start].any()
    assert not weights[..., here.stop:].any()
    assert not (weights[..., here] * ~masks[..., here]).any(), "a token that is shown is scored"
    return (masks[..., here] * (1 << np.arange(LENGTH))).sum(-1), weights[..., here]


def estimates(scheme: str, n: int | None, *, seed: int = 0, values: np.ndarray = TABLE) -> np.ndarray:
    rollout = rollouts(DRAWS)
    states = rl.masked_states(rollout, jax.random.key(seed), scheme=scheme, n=n)
    index, weights = numbers(states, rollout)
    return (values[index] * weights).sum((1, 2))


def test_bernoulli_and_fixed_sizes_have_one_bound() -> None:
    """The enumeration itself: averaged over t ~ U(0, 1) the Bernoulli form is the fixed-size form."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    assert math.isclose(sum(w / 2 * at_ratio((1 + x) / 2) for x, w in zip(nodes, weights, strict=True)), ELBO,
                        rel_tol=1e-9)


@pytest.mark.parametrize(("scheme", "n"), [
    ("fixed_k", 1), ("fixed_k", 8), ("stratified", 1), ("stratified", 4), ("stratified", 8), ("stratified", 6)])
def test_unbiased_schemes_give_the_enumerated_bound(scheme: str, n: int) -> None:
    found = estimates(scheme, n)
    error = found.std() / math.sqrt(DRAWS)
    assert abs(found.mean() - ELBO) < 3 * error, f"{found.mean()} +- {error}, enumerated {ELBO}"
    assert error < 0.03 * abs(ELBO), "the draws say nothing"


def test_coupled_estimates_what_it_says() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    low, high = 0.2, 0.8
    pair = sum(w / 2 * at_ratio(low + (high - low) * (1 + x) / 2) for x, w in zip(nodes, weights, strict=True))
    for n, expected in ((3, (ONE_STEP + 2 * pair) / 2), (7, (ONE_STEP + 6 * pair) / 4)):
        found = estimates("coupled", n)
        assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(DRAWS)
    index, pair_weights = numbers(rl.masked_states(rollouts(64), jax.random.key(4), scheme="coupled"), rollouts(64))
    assert (index[:, 0] == EVERYTHING).all()
    assert (index[:, 1] + index[:, 2] == EVERYTHING).all()
    assert ((pair_weights > 0).sum(1) == 2).all(), "every token is scored twice, once with everything masked"


def test_gauss_estimates_its_quadrature() -> None:
    for n in (1, 3):
        nodes, weights = np.polynomial.legendre.leggauss(n)
        times = (1 + nodes) / 2
        expected = sum(w / 2 / t * of_size(max(round(t * LENGTH), 1)) for t, w in zip(times, weights, strict=True))
        found = estimates("gauss", n)
        assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(DRAWS)


def test_fixed_schemes_are_exact() -> None:
    np.testing.assert_allclose(estimates("one_step", None), ONE_STEP, rtol=1e-6)
    np.testing.assert_allclose(estimates("one_step", 4), ONE_STEP, rtol=1e-6)
    np.testing.assert_allclose(estimates("autoregressive", None), CHAIN, rtol=1e-6)


def test_strata_take_spread_out() -> None:
    """Eight strata have less than half the spread of four Bernoulli masks, and every size occurs."""
    rng = np.random.default_rng(0)
    ratio = rng.uniform(1e-3, 1.0, (DRAWS, 4, 1))
    hidden = rng.random((DRAWS, 4, LENGTH)) < ratio
    bernoulli = (TABLE[(hidden * (1 << np.arange(LENGTH))).sum(-1)] * hidden / ratio).sum((1, 2)) / 4
    assert estimates("stratified", 8).std() < 0.5 * bernoulli.std()
    index, _ = numbers(rl.masked_states(rollouts(3), jax.random.key(0), scheme="stratified", n=6), rollouts(3))
    assert [[len(members(s)) for s in row] for row in index] == [[1, 2, 3, 4, 5, 6]] * 3


def test_policies_compared_at_the_same_states() -> None:
    """The spread of old minus new falls at least fourfold."""
    new = table(perturbed(0.05))
    old_values, same = (estimates("stratified", 8, seed=0, values=values) for values in (TABLE, new))
    apart = estimates("stratified", 8, seed=1, values=new)
    together, independent = (old_values - same).std(), (old_values - apart).std()
    assert together > 0
    assert independent > 4 * together, f"{independent} against {together}"


def test_the_scorer_agrees_with_the_table() -> None:
    """All 64 masks through `score`, against the float64 model written apart."""
    rollout = rollouts(1)
    masks = np.zeros((1, 64, rollout.length), bool)
    for number in range(64):
        masks[0, number, rollout.first_block + np.asarray(members(number), int)] = True
    states = rl.MaskedStates(masks=jnp.asarray(masks), weights=jnp.asarray(masks, jnp.float32))
    got = jax.jit(rl.score, static_argnames="reduce")(toy.ToyDenoiser(), OLD, rollout, states, reduce="none")
    hidden = np.asarray([[number >> i & 1 for i in range(LENGTH)] for number in range(64)], bool)
    here = slice(rollout.first_block, rollout.first_block + LENGTH)
    np.testing.assert_allclose(got[0, :, here], np.where(hidden, TABLE, 0.0), atol=2e-4)


def test_rows_of_different_lengths() -> None:
    """Sizes follow each row's own length; an empty completion has no weight; what lies behind one is hidden."""
    rollout = rl.as_rollout([[1], [2, 3], []], [[4, 5, 6, 7], [], [8]], mask_id=toy.MASK, pad_id=toy.PAD)
    cut = rollout.replace(lengths=np.asarray([2, 0, 1], np.int32))
    for scheme, n in (("one_step", 2), ("coupled", 5), ("fixed_k", 4), ("stratified", 4), ("gauss", 3),
                      ("autoregressive", None)):
        states = rl.masked_states(cut, jax.random.key(0), scheme=scheme, n=n)
        masks, weights, first = np.asarray(states.masks), np.asarray(states.weights), cut.first_block
        assert np.isfinite(weights).all()
        assert not weights[1].any()
        assert not masks[1:, :, first + 1:].any()
        assert masks[0, :, first + 2:first + 4].all()
        assert not weights[0, :, first + 2:].any()
        assert weights[0].any()
        assert weights[2].any()
    one = rl.masked_states(cut, jax.random.key(0), scheme="autoregressive")
    assert np.asarray(one.weights).sum((1, 2)).tolist() == [2, 0, 1]


def test_prompts_are_masked_where_asked() -> None:
    rollout = rollouts(500)
    states = rl.masked_states(rollout, jax.random.key(3), scheme="one_step", n=2, prompt_mask_probability=0.15)
    masks, given = np.asarray(states.masks), np.asarray(rollout.valid & ~rollout.is_open)
    share = masks[np.broadcast_to(given[:, None], masks.shape)].mean()
    assert abs(share - 0.15) < 3 * math.sqrt(0.15 * 0.85 / (500 * 2 * 3))
    assert not masks[np.broadcast_to(~np.asarray(rollout.valid)[:, None], masks.shape)].any()
    assert (masks[:, 0] != masks[:, 1]).any()
    assert not np.asarray(states.weights)[np.broadcast_to(given[:, None], masks.shape)].any()


def test_states_can_be_drawn_in_a_traced_function() -> None:
    rollout = rollouts(2)

    @jax.jit
    def both(rollout: rl.Rollout, key: jax.Array) -> tuple[rl.MaskedStates, rl.MaskedStates]:
        return rl.masked_states(rollout, key, scheme="autoregressive"), rl.trace_states(rollout, exact=False)

    chain, trace = both(rollout, jax.random.key(0))
    assert chain.num_states == trace.num_states == rollout.length - rollout.first_block
    assert np.asarray(chain.weights).sum() == 2 * LENGTH
    assert not np.asarray(trace.weights).any()  # given tokens have no steps


def test_too_few_states_are_seen_in_a_traced_function() -> None:
    """No length is known there: what is left out has the weight NaN, and nothing else has."""
    rollout = rollouts(1)
    here = slice(rollout.first_block, rollout.first_block + LENGTH)
    order = np.full(rollout.tokens.shape, -1, np.int32)
    order[:, here] = [0, 3, 1, 1, 2, 4]
    stepped = rollout.replace(commit_step=order)

    @jax.jit
    def both(rollout: rl.Rollout, key: jax.Array) -> tuple[rl.MaskedStates, rl.MaskedStates]:
        return (rl.masked_states(rollout, key, scheme="autoregressive", n=4),
                rl.trace_states(rollout, num_states=3, exact=False))

    chain, trace = both(stepped, jax.random.key(0))
    for states, lost in ((chain, [4, 5]), (trace, [1, 5])):
        wrong = np.isnan(np.asarray(states.weights))
        assert wrong.all(axis=1)[0].nonzero()[0].tolist() == [here.start + place for place in lost]
        assert wrong.sum() == states.num_states * 2
    enough = jax.jit(lambda given: rl.trace_states(given, num_states=5, exact=False))(stepped)
    assert np.asarray(enough.weights).sum() == LENGTH


@pytest.mark.parametrize(("change", "message"), [
    ({"scheme": "elbo"}, "scheme: got 'elbo'; allowed one_step, coupled"),
    ({"n": 0}, "n: got 0; it must be at least 1"),
    ({"scheme": "coupled", "n": 4}, "n: got 4; coupled states are one and pairs"),
    ({"scheme": "autoregressive", "n": 5}, "n: got 5; the longest row needs 6"),
    ({"prompt_mask_probability": 0.1}, "prompt_mask_probability: got 0.1 with scheme='fixed_k'"),
    ({"scheme": "one_step", "prompt_mask_probability": 1.5}, "prompt_mask_probability: got 1.5; allowed a finite"),
])
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        rl.masked_states(rollouts(1), jax.random.key(0), **({"scheme": "fixed_k"} | change))
    assert str(caught.value).startswith(message)
