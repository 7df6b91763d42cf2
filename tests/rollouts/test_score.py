"""The scorer against plain logits and finite differences, what it costs, and likelihoods with their errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax import rl
from djax.contracts.types import Forbidden
from djax.models import build
from djax.models.config import LladaMoeConfig
from tests.support import toy
from tests.support.tiny import MASK

LIMIT = 60
PROMPTS = [[9, 17, 10, 6, 13], [12, 10, 57, 32, 1, 49, 55, 29, 35], [7]]
ANSWERS = [[1, 2, 3, 4], [44, 45], [14, 7, 9, 11, 13]]
FORBIDDEN = Forbidden(ids=np.asarray([MASK, 17], np.int32), limit=np.int32(LIMIT))
score = jax.jit(rl.score, static_argnames=("reduce", "vocab_chunk", "remat"))


@pytest.fixture(scope="module")
def given() -> rl.Rollout:
    return rl.as_rollout(PROMPTS, ANSWERS, mask_id=MASK, pad_id=0, forbidden=FORBIDDEN)


@pytest.fixture(scope="module")
def states(given) -> rl.MaskedStates:
    return rl.masked_states(given, jax.random.key(1), scheme="fixed_k", n=3)


def test_log_probs_are_those_of_the_logits(tiny_lm, given, states) -> None:
    """Row by row, without padding, from `DiffusionLM.logits`, in float64."""
    temperature = 0.7
    got = score(tiny_lm.denoiser, tiny_lm.params, given, states, temperature=temperature, reduce="none",
                vocab_chunk=40)
    first, allowed = given.first_block, np.setdiff1d(np.arange(LIMIT), [MASK, 17])
    expected = np.zeros(got.shape)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        columns = np.arange(first, first + len(answer))
        for state in range(3):
            hidden = np.asarray(states.masks)[row, state, columns]
            shown = prompt + [MASK if hide else token for token, hide in zip(answer, hidden, strict=True)]
            logits = tiny_lm.logits([shown])[0, len(prompt):].astype(np.float64) / temperature
            log_total = np.log(np.exp(logits[:, allowed]).sum(1))
            values = logits[np.arange(len(answer)), answer] - log_total
            expected[row, state, columns] = values * np.asarray(states.weights)[row, state, columns]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    token = score(tiny_lm.denoiser, tiny_lm.params, given, states, temperature=temperature)
    np.testing.assert_allclose(token, expected.sum(1), rtol=1e-5, atol=5e-5)
    sequence = score(tiny_lm.denoiser, tiny_lm.params, given, states, temperature=temperature, reduce="sequence")
    np.testing.assert_allclose(sequence, expected.sum((1, 2)), rtol=1e-5)


@pytest.mark.slow
def test_a_forbidden_token_is_impossible_and_hurts_nobody_else() -> None:
    wrong = rl.as_rollout([[1], [1]], [[2, 17, 3], [2, 20, 3]], mask_id=toy.MASK, pad_id=toy.PAD,
                          forbidden=Forbidden(ids=np.asarray([17], np.int32), limit=np.int32(20)))
    whole = rl.masked_states(wrong, jax.random.key(0), scheme="one_step")
    without = whole.replace(weights=whole.weights.at[:, :, wrong.first_block + 1].set(0.0))
    params = jax.tree.map(jnp.asarray, toy.make_params())
    got = score(toy.ToyDenoiser(), params, wrong, whole)[:, wrong.first_block:]
    assert np.isneginf(got[:, 1]).all()
    assert np.isfinite(got[:, np.asarray([0, 2])]).all()

    def total(params: Any, heat: jax.Array) -> jax.Array:
        return rl.score(toy.ToyDenoiser(), params, wrong, without, temperature=heat, reduce="sequence").sum()

    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, jnp.float32(0.9))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def directional(function: Callable[[Any], jax.Array], params: Any, *, step: float) -> tuple[float, float, Any]:
    """The derivative along a random direction, from the gradient and from a central difference; and the gradient."""
    rng = np.random.default_rng(3)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * np.abs(leaf).mean(), leaf.dtype),
                         params)
    both = jax.jit(jax.value_and_grad(function))
    gradient = both(params)[1]
    exact = sum(jnp.vdot(g, a) for g, a in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True))
    up, down = (both(jax.tree.map(lambda p, a: p + sign * step * a, params, along))[0] for sign in (1, -1))  # noqa: B023
    return float(exact), float((up - down) / (2 * step)), gradient


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(tiny_lm, given, states) -> None:
    factor = jnp.asarray(np.random.default_rng(0).normal(size=given.tokens.shape), jnp.float32)

    def through_the_model(params: Any) -> jax.Array:
        return (factor * rl.score(tiny_lm.denoiser, params, given, states, vocab_chunk=40)).sum()

    # a router may choose otherwise at a step of 2e-3
    exact, difference, _ = directional(through_the_model, tiny_lm.params, step=5e-4)
    assert abs(exact) > 1.0
    np.testing.assert_allclose(exact, difference, rtol=2e-2)


@pytest.mark.slow
def test_gradients_of_any_denoiser() -> None:
    small = rl.as_rollout([[3, 1, 4]], [[5, 9, 2, 6]], mask_id=toy.MASK, pad_id=toy.PAD)
    states = rl.masked_states(small, jax.random.key(0), scheme="coupled")

    def through_logits(params: Any, *, remat: bool) -> jax.Array:
        return rl.score(toy.ToyDenoiser(), params, small, states, reduce="sequence", remat=remat).sum()

    params, gradients = jax.tree.map(jnp.asarray, toy.make_params()), []
    for remat in (True, False):
        exact, difference, gradient = directional(partial(through_logits, remat=remat), params, step=1e-3)
        assert abs(exact) > 0.1
        np.testing.assert_allclose(exact, difference, rtol=2e-2)
        gradients.append(gradient)
    for left, right in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


def test_states_without_weight_are_not_run() -> None:
    """They would turn everything NaN, and its gradient too."""
    given = rl.as_rollout([[3, 1]], [[5, 9]], mask_id=toy.MASK, pad_id=toy.PAD)
    states = rl.masked_states(given, jax.random.key(0), scheme="autoregressive")
    broken = rl.MaskedStates(masks=states.masks.at[:, 0].set(given.valid), weights=states.weights)
    params = toy.poison(toy.make_params(), toy.MASK)
    one = jnp.asarray([0.0, 1.0])[None, :, None]

    def total(params: Any, states: rl.MaskedStates) -> jax.Array:
        return rl.score(toy.ToyDenoiser(), params, given, states, reduce="sequence").sum()

    both = jax.jit(jax.value_and_grad(total))
    shown = broken.replace(masks=broken.masks.at[:, 1].set(False), weights=broken.weights * one)
    value, gradient = both(params, shown)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.isnan(both(params, broken)[0])


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_a_row_that_turns_nan_teaches_nobody_nan(remat: bool) -> None:
    """Row 1 is NaN once its second token is shown, in states where only others have weight: it ended before them."""
    prompts, answers, steps, poison = [[7], [3, 1], [4]], [[6, 2, 8], [5, 13, 9], [10, 2, 4]], (3, 2, 3), 13
    params = toy.poison(toy.make_params(), poison)

    def gradient(rows: list[int]) -> tuple[jax.Array, Any]:
        given = rl.as_rollout([prompts[row] for row in rows], [answers[row] for row in rows], mask_id=toy.MASK,
                              pad_id=toy.PAD)
        states = rl.masked_states(given, jax.random.key(0), scheme="autoregressive", n=4)
        ran = jnp.arange(4) < jnp.asarray([steps[row] for row in rows])[:, None]
        states = states.replace(weights=states.weights * ran[..., None])

        def total(params: Any) -> jax.Array:
            return rl.score(toy.ToyDenoiser(), params, given, states, reduce="sequence", remat=remat).sum()

        return jax.jit(jax.value_and_grad(total))(params)

    together, apart = gradient([0, 1, 2]), [gradient([0, 2]), gradient([1])]
    assert np.isfinite(together[0])
    assert together[0] == pytest.approx(float(apart[0][0] + apart[1][0]), rel=1e-5)
    for leaf, *others in zip(jax.tree.leaves(together[1]), *(jax.tree.leaves(part[1]) for part in apart), strict=True):
        assert np.isfinite(leaf).all()
        np.testing.assert_allclose(leaf, sum(others), atol=1e-4)


@pytest.mark.slow
def test_memory_is_one_state_and_no_logits() -> None:
    """Compiled for a vocabulary that dwarfs the rest: neither [B, T, V] nor n states' activations are held."""
    config = LladaMoeConfig(
        vocab_size=8192, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4,
        experts_per_token=2, expert_size=16, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=512, mask_id=1, eos_id=2,
        pad_id=3, dtype="float32")
    graphdef, params = nnx.split(build(config))
    given = rl.as_rollout([[5] * 16] * 2, [[6] * 192] * 2, mask_id=1, pad_id=3)

    n = 16
    shape = (given.batch, n, given.length)
    states = rl.MaskedStates(masks=jax.ShapeDtypeStruct(shape, bool), weights=jax.ShapeDtypeStruct(shape, jnp.float32))

    def loss(params: Any, states: rl.MaskedStates) -> jax.Array:
        return rl.score(graphdef, params, given, states, vocab_chunk=128).sum()

    used = jax.jit(jax.grad(loss)).lower(params, states).compile().memory_analysis().temp_size_in_bytes
    logits = 4 * given.batch * given.length * config.vocab_size
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert used < 6 * parameters < min(logits, n * parameters)


@pytest.mark.parametrize(("change", "message"), [
    ({"reduce": "mean"}, "reduce: got 'mean'; allowed token, sequence, none"),
    ({"states": "short"}, "states: got masks (3, 3, 5) and weights (3, 3, 5) for tokens"),
])
def test_wrong_arguments_are_named(tiny_lm, given, states, change: dict, message: str) -> None:
    if "states" in change:
        change = {"states": rl.MaskedStates(masks=states.masks[..., :5], weights=states.weights[..., :5])}
    with pytest.raises(ValueError, match=r".") as caught:
        rl.score(tiny_lm.denoiser, tiny_lm.params, given, **({"states": states} | change))
    assert str(caught.value).startswith(message)


# --- likelihoods ---


@pytest.mark.slow
def test_the_standard_error_is_the_spread(tiny_lm) -> None:
    """96 rows of one target are 96 independent estimates: their spread is what the errors say, whatever the scheme."""
    rows, n = 96, 6
    for scheme in ("stratified", "fixed_k", "gauss"):
        mean, error = rl.log_likelihood(
            tiny_lm, [PROMPTS[0]] * rows, [ANSWERS[2]] * rows, key=5, n=n, scheme=scheme, mask_id=MASK)
        assert mean.shape == error.shape == (rows,)
        said, seen = np.sqrt((error ** 2).mean()), mean.std()
        assert 0.7 < said / seen < 1.4, f"{scheme}: errors of {said}, spread {seen}"


@pytest.mark.slow
def test_likelihoods_of_texts_and_edges(tiny_lm) -> None:
    ask = {"key": jax.random.key(0), "mask_id": MASK}
    chain, none = rl.log_likelihood(tiny_lm, PROMPTS, ANSWERS, scheme="autoregressive", **ask)
    cut, _ = rl.log_likelihood(tiny_lm, PROMPTS, ANSWERS, scheme="autoregressive", micro_batch=2, **ask)
    np.testing.assert_allclose(cut, chain, rtol=1e-5)
    assert not none.any()
    by_hand = 0.0
    for index in range(len(ANSWERS[0])):
        shown = PROMPTS[0] + ANSWERS[0][:index] + [MASK] * (len(ANSWERS[0]) - index)
        logits = tiny_lm.logits([shown])[0, len(PROMPTS[0]) + index].astype(np.float64)
        logits[MASK] = -np.inf
        by_hand += logits[ANSWERS[0][index]] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(chain[0], by_hand, rtol=1e-5)
    mean, error = rl.log_likelihood(tiny_lm, PROMPTS, [[], *ANSWERS[1:]], n=6, **ask)
    assert (mean[0], error[0]) == (0.0, 0.0)
    assert (mean[1:] < 0).all()
    for change, message in (
        ({"targets": [[1]]}, "targets: got 1, as list, for 2 prompts"), ({"targets": "ab"}, "targets: got 1, as str"),
        ({"targets": [[1], [3, MASK]]}, r"targets\[1\]: got the token 63, which the model cannot generate; allowed"),
        ({"targets": [[1], [3] * 64]}, r"targets\[1\]: got 64 tokens, 65 with the prompt; allowed 64 in all"),
        ({"targets": [[1], ["x"]]}, r"targets\[1\]: got"), ({"targets": [[1], "x"]}, r"targets\[1\]: got text"),
        ({"n": 3}, "n: got 3; it must be even"), ({"scheme": "coupled"}, "scheme: got 'coupled'"),
        ({"micro_batch": 0}, "micro_batch: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rl.log_likelihood(tiny_lm, [[1], [2]], **({"targets": [[1], [3]]} | ask | change))
