"""Policy losses against plain float64 loops of the papers' formulas, their gradients against finite differences."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.contracts import types
from djax.rl import Rollout
from djax.rl.advantages import group_advantages
from djax.rl.losses import (
    coupled_grpo_loss,
    diffu_grpo_loss,
    espo_loss,
    gdpo_loss,
    grpo_loss,
    just_grpo_loss,
    k2,
    k3,
    trace_grpo_loss,
)

LOW, HIGH, BETA = 0.2, 0.3, 0.05
ROWS, LENGTH = 4, 6


def clipped(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    return min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)


def kl3(new, reference):
    return math.exp(reference - new) - (reference - new) - 1


def token_oracle(new, case, *, weight):
    """The loss, token by token; `weight(row, column)` is what a token counts for."""
    total = 0.0
    for row in range(ROWS):
        for column in range(LENGTH):
            if case["mask"][row, column]:
                term = clipped(new[row, column] - case["old"][row, column], case["advantages"][row])
                term -= BETA * kl3(new[row, column], case["reference"][row, column])
                total -= weight(row, column) * term
    return total


def per_sequence(case):
    return lambda row, column: 1 / ROWS / case["mask"][row].sum()


def per_batch(case):
    return lambda row, column: 1 / case["mask"].sum()


def per_step(case, shrink):
    def weight(row, column):
        step = case["commit_step"][row, column] // shrink
        mates = sum(case["mask"][row, other] and case["commit_step"][row, other] // shrink == step
                    for other in range(LENGTH))
        return 1 / ROWS / mates

    return weight


@pytest.fixture
def case():
    rng = np.random.default_rng(5)
    lengths = np.asarray([6, 3, 1, 5])
    new = rng.normal(-1.5, 0.5, (ROWS, LENGTH))
    return {
        "new": new, "old": new - rng.choice([-0.6, -0.1, 0.1, 0.6], new.shape) - 0.02 * rng.random(new.shape),
        "reference": new + rng.normal(0, 0.4, new.shape), "advantages": np.asarray([1.2, -0.7, 0.5, -1.4]),
        "mask": np.arange(LENGTH) < lengths[:, None], "lengths": lengths,
        "commit_step": np.asarray([[0, 2, 2, 0, 1, 3], [1, 1, 0, 4, 4, 4], [0] * 6, [2, 0, 0, 1, 2, 5]])}


def token_arguments(case):
    return {"mask": jnp.asarray(case["mask"]), "old": jnp.float32(case["old"]),
            "reference": jnp.float32(case["reference"]), "beta": BETA, "clip_low": LOW, "clip_high": HIGH}


TOKEN_LOSSES = {
    "grpo": (grpo_loss, {}, per_sequence),
    "grpo, batch": (grpo_loss, {"reduce": "batch"}, per_batch),
    "diffu": (diffu_grpo_loss, {}, per_sequence),
    "coupled": (coupled_grpo_loss, {}, per_sequence),
    "just": (just_grpo_loss, {}, per_sequence),
    "trace, tokens": (trace_grpo_loss, {}, per_sequence),
    "trace, steps": (trace_grpo_loss, {"shrink": 1}, lambda case: per_step(case, 1)),
    "trace, pairs of steps": (trace_grpo_loss, {"shrink": 2}, lambda case: per_step(case, 2)),
}


def check(loss, oracle, new):
    """Value and gradient against the oracle and its central differences."""
    (value, report), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(new))
    assert value == pytest.approx(oracle(new), rel=1e-5, abs=1e-6)
    assert report.loss == value
    differences = np.zeros_like(new)
    for place in np.ndindex(new.shape):
        for sign in (1, -1):
            moved = new.copy()
            moved[place] += sign * 1e-6
            differences[place] += sign * oracle(moved) / 2e-6
    np.testing.assert_allclose(gradient, differences, rtol=2e-4, atol=2e-6)
    assert np.abs(differences).max() > 1e-3
    return report


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_and_their_gradients(name, case):
    function, options, weights = TOKEN_LOSSES[name]
    options = dict(options)
    if "shrink" in options:
        options["commit_step"] = jnp.asarray(case["commit_step"])
    report = check(
        lambda new: function(new, jnp.float32(case["advantages"]), **token_arguments(case), **options),
        lambda new: token_oracle(new, case, weight=weights(case)), case["new"])
    ratios = np.exp(case["new"] - case["old"])[case["mask"]]
    signs = np.broadcast_to(np.sign(case["advantages"])[:, None], case["mask"].shape)[case["mask"]]
    outside = np.where(signs > 0, ratios > 1 + HIGH, ratios < 1 - LOW)
    assert 0 < outside.mean() < 1
    assert report.clip_fraction == pytest.approx(outside.mean())
    assert report.ratio == pytest.approx(ratios.mean(), rel=1e-5)
    assert report.count == case["mask"].sum()


@pytest.mark.parametrize("name", ["gdpo", "espo"])
def test_sequence_losses_and_their_gradients(name, case):
    rng = np.random.default_rng(6)
    elbos, lengths = rng.normal(-6, 1, ROWS), case["lengths"]
    old = elbos - np.asarray([0.5, -0.9, 0.1, 1.7])
    reference = elbos + rng.normal(0, 0.4, ROWS)

    def oracle(new):
        total = 0.0
        for row in range(ROWS):
            if name == "gdpo":
                weight, divisor, kl = 1 / lengths[row], 1.0, kl3(new[row], reference[row])
            else:
                weight, divisor, kl = 1.0, lengths[row], (new[row] - reference[row]) ** 2 / 2
            term = clipped((new[row] - old[row]) / divisor, case["advantages"][row]) - BETA * kl
            total -= weight * term / ROWS
        return total

    function = {"gdpo": gdpo_loss, "espo": espo_loss}[name]
    report = check(
        lambda new: function(new, jnp.float32(case["advantages"]), lengths=jnp.asarray(lengths), old=jnp.float32(old),
                             reference=jnp.float32(reference), beta=BETA, clip_low=LOW, clip_high=HIGH), oracle, elbos)
    assert report.count == ROWS


def test_without_old_log_probs_the_gradient_is_the_policy_gradient(case):
    mask, advantages = case["mask"], case["advantages"]
    gradient = jax.grad(lambda new: grpo_loss(new, jnp.float32(advantages), mask=jnp.asarray(mask))[0])(
        jnp.float32(case["new"]))
    expected = -advantages[:, None] * mask / mask.sum(1, keepdims=True) / ROWS
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_kl_estimators_are_what_they_estimate():
    rng = np.random.default_rng(7)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    exact = float(np.sum(p * np.log(p / q)))
    estimates = k3(jnp.float32(np.log(p)), jnp.float32(np.log(q)))
    assert np.all(estimates >= 0)
    assert float(np.sum(p * estimates)) == pytest.approx(exact, rel=1e-5)

    # k2's expected gradient is that of the KL, whose log-ratio counts as a constant
    def expected_k2(logits):
        return jnp.sum(p * k2(jax.nn.log_softmax(logits), jnp.float32(np.log(q))))

    def kl(logits):
        new = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(new) * (new - jnp.float32(np.log(q))))

    logits = jnp.float32(np.log(p))
    np.testing.assert_allclose(jax.grad(expected_k2)(logits), jax.grad(kl)(logits), rtol=1e-4, atol=1e-6)


def test_masked_tokens_have_no_effect_even_if_they_are_nan(case):
    arguments = token_arguments(case)
    advantages = jnp.float32(case["advantages"])
    poison = lambda values: jnp.where(arguments["mask"], jnp.float32(values), jnp.nan)  # noqa: E731
    loss = jax.value_and_grad(lambda new, **other: grpo_loss(new, advantages, **{**arguments, **other})[0])
    value, gradient = loss(jnp.float32(case["new"]))
    same, clean = loss(poison(case["new"]), old=poison(case["old"]), reference=poison(case["reference"]))
    assert value == same
    np.testing.assert_array_equal(gradient, clean)


def test_an_empty_completion_counts_as_zero(case):
    mask = case["mask"].copy()
    mask[1] = False
    new, advantages = jnp.float32(case["new"]), jnp.float32(case["advantages"])
    steps = jnp.asarray(case["commit_step"])
    for loss in (lambda x: grpo_loss(x, advantages, mask=jnp.asarray(mask))[0],
                 lambda x: grpo_loss(x, advantages, mask=jnp.zeros_like(jnp.asarray(mask)), reduce="batch")[0],
                 lambda x: trace_grpo_loss(x, advantages, mask=jnp.asarray(mask), commit_step=steps)[0]):
        value, gradient = jax.value_and_grad(loss)(new)
        assert np.isfinite(value)
        np.testing.assert_array_equal(gradient[1], 0.0)
    lengths = jnp.asarray([3, 0, 2, 1])
    elbos = jnp.asarray([-3.0, -jnp.inf, -2.0, -1.0])
    for sequence in (gdpo_loss, espo_loss):
        value, gradient = jax.value_and_grad(
            lambda x, loss=sequence: loss(x, advantages, lengths=lengths, reference=elbos, beta=0.1)[0])(elbos)
        assert np.isfinite(value)
        assert gradient[1] == 0.0
        assert np.all(np.isfinite(gradient))


def a_rollout(tokens, is_open, *, lengths, is_masked=None):
    """Only what a loss mask reads is of interest."""
    shape = np.shape(tokens)
    row, nothing = np.zeros(shape[0], np.int32), np.zeros(shape, bool)
    return Rollout(
        tokens=np.asarray(tokens), valid=~nothing, is_open=np.broadcast_to(is_open, shape),
        is_masked=nothing if is_masked is None else np.asarray(is_masked), positions=np.zeros(shape, np.int32),
        lengths=np.asarray(lengths), nfe=row, steps=row, stop_reason=row, commit_step=np.zeros(shape, np.int32),
        log_prob=np.zeros(shape, np.float32), row_ids=np.arange(shape[0]), mask_id=np.int32(8),
        temperature=np.float32(1), forbidden=types.FORBID_NOTHING, first_block=1,
        block_length=shape[1] - 1, max_steps=shape[1] - 1)


def test_a_row_that_stopped_at_step_one_teaches_nothing():
    never = [[False, True, True, True], [False, False, False, False]]
    rollout = a_rollout([[1, 8, 8, 8], [1, 2, 3, 4]], [False, True, True, True], lengths=[0, 3], is_masked=never)
    log_probs = jnp.asarray([[jnp.nan] * 4, [0.0, -1.0, -1.0, -1.0]])
    steps = jnp.asarray([[-1] * 4, [-1, 0, 0, 0]])
    value, gradient = jax.value_and_grad(
        lambda x: trace_grpo_loss(x, jnp.asarray([1.0, -1.0]), mask=rollout.is_completion, commit_step=steps)[0])(
            log_probs)
    assert value == pytest.approx(0.5)  # of one row of two, the advantage -1 at a ratio of 1
    np.testing.assert_allclose(gradient, [[0.0] * 4, [0.0, 1 / 6, 1 / 6, 1 / 6]], rtol=1e-6)


def test_huge_ratios_stay_finite():
    new, old = jnp.asarray([[500.0, -500.0]]), jnp.zeros((1, 2))
    mask = jnp.ones((1, 2), bool)
    value, gradient = jax.value_and_grad(
        lambda x: grpo_loss(x, jnp.asarray([-1.0]), mask=mask, old=old, reference=old, beta=0.1)[0])(new)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    # the advantage and the KL both want the first to fall; the second's ratio is clipped, and the KL wants it to rise
    assert gradient[0, 0] > 0
    assert gradient[0, 1] < 0


def test_ratios_above_the_bound_go_on_along_the_tangent():
    bound, far = math.exp(20.0), jnp.asarray([[21.0, 60.0, 0.0]])
    (value, report), gradient = jax.value_and_grad(
        lambda x: grpo_loss(x, jnp.asarray([-1.0]), mask=jnp.ones((1, 3), bool), old=jnp.zeros((1, 3))),
        has_aux=True)(far)
    np.testing.assert_allclose(value, (2 * bound + 41 * bound + 1) / 3, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[bound / 3, bound / 3, 1 / 3]], rtol=1e-5)
    assert report.clip_fraction == pytest.approx(2 / 3)
    # k3 against log p alone: below the bound it is what it was, also where the exponential is nothing
    slope = jax.vmap(jax.grad(lambda x: k3(x, 0.0)))(jnp.asarray([60.0, 30.0, 1.0, -1.0, -60.0]))
    np.testing.assert_allclose(slope, [1.0, 1.0, 1 - math.exp(-1), 1 - math.e, 1 - bound], rtol=1e-5)
    np.testing.assert_allclose(k3(jnp.float32(60.0), jnp.float32(0.0)), 59.0, rtol=1e-6)


def test_the_end_of_sequence_is_learned_though_it_is_the_padding_token():
    eos = 9
    tokens = [[1, 5, 6, eos, eos, eos], [1, eos, eos, eos, eos, eos], [1, 4, 4, 4, 4, 4]]
    rollout = a_rollout(tokens, [False] + [True] * 5, lengths=[3, 1, 5])
    gradient = jax.grad(lambda x: grpo_loss(x, -jnp.ones(3), mask=rollout.is_completion, reduce="batch")[0])(
        jnp.zeros((3, 6)))
    learned = [np.asarray(tokens[row])[np.asarray(gradient[row]) > 0].tolist() for row in range(3)]
    assert learned == [[5, 6, eos], [eos], [4] * 5]


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out"])
def test_advantages_against_loops(scale):
    rng = np.random.default_rng(8)
    rewards = rng.normal(size=(3, 5))
    got = np.asarray(group_advantages(jnp.float32(rewards.reshape(-1)), 5, scale=scale, epsilon=0.0)).reshape(3, 5)
    for group, values in enumerate(rewards):
        for row, value in enumerate(values):
            others = np.delete(values, row)
            expected = {"std": (value - values.mean()) / values.std(ddof=1), "none": value - values.mean(),
                        "leave_one_out": value - others.mean()}[scale]
            assert got[group, row] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out"])
def test_advantages_of_rewards_that_say_nothing(scale):
    nan, infinity = math.nan, math.inf
    rewards = jnp.asarray([0.1, 0.1, 0.1, 0.1,  # no variance: their mean is not exactly 0.1
                           nan, 1.0, 3.0, infinity,  # two that count
                           nan, nan, 2.0, nan,  # only one does
                           nan, nan, nan, nan])
    got = np.asarray(group_advantages(rewards, 4, scale=scale)).reshape(4, 4)
    np.testing.assert_array_equal(got[[0, 2, 3]], 0.0)
    assert got[1, 0] == got[1, 3] == 0.0
    expected = {"std": math.sqrt(0.5), "none": 1.0, "leave_one_out": 2.0}[scale]
    np.testing.assert_allclose(got[1, 1:3], [-expected, expected], rtol=1e-5)


def test_wrong_arguments_are_named():
    rewards = jnp.zeros(6)
    with pytest.raises(ValueError, match="group_size: got 4; allowed a divisor of the 6"):
        group_advantages(rewards, 4)
    with pytest.raises(ValueError, match="scale: got 'mean'; allowed std, none"):
        group_advantages(rewards, 3, scale="mean")
    zeros, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="reduce: got 'sum'; allowed sequence, batch"):
        grpo_loss(zeros, jnp.zeros(2), mask=mask, reduce="sum")
    with pytest.raises(ValueError, match="shrink: got 0"):
        trace_grpo_loss(zeros, jnp.zeros(2), mask=mask, shrink=0)
