"""A setting of the draw never decides what is kept, and log-probs are log-probs at any temperature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import proposals, recipes, rl, stopping, strategies, transforms
from djax.contracts.canvas import Canvas
from djax.errors import ArgumentError
from djax.loop.denoise import denoise
from tests.support import oracle, toy

TEMPERATURE = 0.8
FILTERS: dict[str, tuple[Any, Any]] = {
    "top_k": (transforms.TopK(3), oracle.top_k(3)),
    "top_p": (transforms.TopP(0.7, TEMPERATURE), oracle.top_p(0.7, TEMPERATURE)),
    "min_p": (transforms.MinP(0.3, TEMPERATURE), oracle.min_p(0.3, TEMPERATURE)),
}
FILTERS["all"] = tuple(zip(*FILTERS.values(), strict=True))  # type: ignore[assignment]
MODEL, PARAMS = toy.NumpyToy(toy.make_params()), toy.make_params()
PROMPTS, NEW = [[3, 1, 4], [1, 5, 9]], 12
MASK = 150
CALL: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "mask_id": MASK}
TOKENS = [[1, 2, 3], [4, 5, 6]]


# --- against the oracle, through the loop ---


@pytest.mark.parametrize("name", [
    "all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("top_k", "top_p", "min_p"))])
def test_filtered_draws_equal_the_oracle(name: str) -> None:
    """Tokens, commit steps and log-probs of rows that a strategy decides on."""
    ours, theirs = (part if isinstance(part, tuple) else (part,) for part in FILTERS[name])
    canvas = Canvas.from_prompts(PROMPTS, max_new_tokens=NEW, block_length=6, mask_id=toy.MASK, pad_id=toy.PAD,
                                 bucket=False)

    @jax.jit
    def run(key: jax.Array, temperature: jax.Array) -> Any:
        return denoise(toy.ToyDenoiser(), PARAMS, canvas, key, strategy=strategies.Threshold(0.6),
                       propose=proposals.Sample(temperature, filters=ours),
                       stop_rule=stopping.OnEos(jnp.array([toy.EOS])))

    compared = 0
    for seed in range(6):
        for temperature in (TEMPERATURE, 0.0):
            got = run(jax.random.key(seed), jnp.float32(temperature))
            for row, prompt in enumerate(PROMPTS):
                want = oracle.decode(
                    MODEL, [*prompt, *[toy.MASK] * NEW], [False] * 3 + [True] * NEW, jax.random.key(seed),
                    first_block=3, block_length=6, row_id=row, strategy=oracle.threshold(0.6),
                    policy=oracle.no_cache, transform=oracle.identity, propose=oracle.sample(temperature, *theirs),
                    weight=None, eos_ids=[toy.EOS])
                if want.margin <= oracle.RELIABLE:
                    continue
                compared += 1
                assert got.tokens[row].tolist() == want.tokens
                assert got.commit_step[row].tolist() == want.commit_step
                np.testing.assert_allclose(got.log_prob[row], want.log_prob, atol=1e-4)
    assert compared >= 8


# --- one step ---


@jax.jit
def propose(part: Any, key: jax.Array, logits: jax.Array) -> Any:
    return part.step(jax.random.split(key, 2), logits, jnp.zeros(logits.shape[:2], jnp.int32))


@pytest.mark.parametrize("name", FILTERS)
def test_confidence_is_that_of_the_model(name: str) -> None:
    ours = FILTERS[name][0]
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 50, 9)) * 3, jnp.float32)
    probs = np.asarray(jax.nn.softmax(logits, -1))
    for temperature in (0.0, 0.3, 1.0, 3.0):
        sample = proposals.Sample(jnp.float32(temperature), filters=ours if isinstance(ours, tuple) else (ours,))
        got = propose(sample, jax.random.key(1), logits)
        want = np.take_along_axis(probs, np.asarray(got.token)[..., None], -1)[..., 0]
        np.testing.assert_allclose(got.confidence, want, rtol=1e-5)
        # published code that decides by what it draws from says so
        drawn = propose(sample.replace(confidence="drawn"), jax.random.key(1), logits)
        np.testing.assert_array_equal(drawn.token, got.token)
        np.testing.assert_allclose(drawn.confidence, np.exp(got.log_prob), rtol=1e-6)
        assert (np.asarray(drawn.confidence) > want).any()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 2e-38, 1e30])
@pytest.mark.parametrize("filters", [(), (transforms.TopP(0.9, jnp.float32(1e-6)), transforms.MinP(0.5))], ids=len)
def test_log_probs_are_finite_at_any_temperature(temperature: float, filters: Any) -> None:
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(2, 40, 9)) * 30, jnp.float32).at[:, :4, 1].set(-jnp.inf)
    got = propose(proposals.Sample(jnp.float32(temperature), filters=filters), jax.random.key(1), logits)
    log_prob = np.asarray(got.log_prob)
    assert np.isfinite(log_prob).all()
    assert log_prob.max() <= 0
    assert np.isfinite(np.asarray(got.confidence)).all()
    if temperature < 1e-3:
        np.testing.assert_array_equal(got.token, np.asarray(logits).argmax(-1))


# --- through the API ---


@pytest.mark.parametrize("call", [
    {"temperature": 0.0, "top_k": 1}, {"temperature": 1.0, "top_k": 1},
    pytest.param({"temperature": 1.0, "top_p": 1e-6}, marks=pytest.mark.slow),
    pytest.param({"temperature": 1.0, "min_p": 1.0}, marks=pytest.mark.slow)], ids=str)
def test_a_filter_that_leaves_the_best_token_is_greedy(golden_lm: djax.DiffusionLM, call: dict[str, Any]) -> None:
    greedy, got = golden_lm.generate(TOKENS, **CALL), golden_lm.generate(TOKENS, **CALL, **call)
    np.testing.assert_array_equal(got.canvas, greedy.canvas)
    np.testing.assert_array_equal(got.commit_step, greedy.commit_step)
    np.testing.assert_array_equal(got.log_prob, 0)


def test_log_probs_of_cold_rollouts_are_those_of_the_scorer(golden_lm: djax.DiffusionLM) -> None:
    score = jax.jit(lambda rollout, states: rl.score(golden_lm.denoiser, golden_lm.params, rollout, states))
    rollouts = [rl.rollout(golden_lm, TOKENS, key=0, temperature=heat, **CALL) for heat in (1e-3, 1e-6, 1e-30)]
    most = max(int(rollout.steps.max()) for rollout in rollouts)
    for rollout in rollouts:
        found = np.asarray(rollout.log_prob)[np.asarray(rollout.is_completion)]
        assert np.isfinite(found).all()
        assert found.max() <= 1e-6
        scored = np.asarray(score(rollout, rl.trace_states(rollout, num_states=most)))
        np.testing.assert_allclose(scored[np.asarray(rollout.is_completion)], found, atol=1e-4)


@pytest.mark.slow
def test_credit_reads_what_it_computes_at_low_temperatures() -> None:
    """The readings path and the logits path, for logits that credit raises."""
    recipe = recipes.dinfer_credit(smoothing=None)
    canvas = Canvas.from_prompts(PROMPTS, max_new_tokens=NEW, block_length=6, mask_id=toy.MASK, pad_id=toy.PAD,
                                 bucket=False)

    @jax.jit
    def run(denoiser: Any, temperature: jax.Array) -> Any:
        return denoise(denoiser, PARAMS, canvas, jax.random.key(2), strategy=recipe.strategy,
                       transform=recipe.transform, propose=proposals.Sample(temperature))

    class Logits(toy.ToyDenoiser):
        """Asked for logits, not for readings."""

        needs_logits = True

    jax.tree_util.register_pytree_node(Logits, lambda toy: ((toy.sharpness,), None), lambda _, leaves: Logits(*leaves))
    for temperature in (1e-30, 1e-3, 0.5):
        read, computed = (run(kind(1.0), jnp.float32(temperature)) for kind in (toy.ToyDenoiser, Logits))
        np.testing.assert_array_equal(read.tokens, computed.tokens)
        np.testing.assert_allclose(read.log_prob, computed.log_prob, atol=1e-3 if temperature < 0.1 else 1e-5)
        assert np.isfinite(np.asarray(read.log_prob)).all()


@pytest.mark.parametrize("temperature", [1e39, -1.0, float("nan"), None, "hot", True])
def test_a_wrong_temperature_is_named(golden_lm: djax.DiffusionLM, temperature: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^temperature: got "):
        golden_lm.generate(TOKENS, temperature=temperature, **CALL)
    with pytest.raises(ArgumentError, match=r"^temperature: got "):
        rl.rollout(golden_lm, TOKENS, key=0, temperature=temperature, **CALL)
