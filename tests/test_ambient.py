"""What a caller's ambient JAX state may not change: results, where they lie, and how often something is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import djax
import kernels_pallas
from djax import proposals, recipes, rl, strategies
from djax.contracts.canvas import Canvas
from djax.contracts.keys import as_key
from djax.rl.advantages import group_advantages
from djax.rl.losses import trace_grpo_loss
from djax.rollouts.rollout import EXACT
from djax.train.loss import Batch
from djax.train.step import init_state, make_step
from kernels_pallas.testing import attention_cases, moe_cases, unembed_cases
from tests.support import tiny, toy

ROOT = Path(__file__).parents[1]
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]
LENGTHS: dict[str, Any] = {"max_new_tokens": 8, "block_length": 4}
SAMPLED = recipes.dinfer(threshold=0.6, before=2, after=2, warmup=1)
CREDIT = recipes.dinfer_credit()


@contextmanager
def ambient_mesh() -> Iterator[None]:
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        yield


Setting = Callable[[], AbstractContextManager[Any]]
EVERYWHERE: dict[str, Setting] = {
    "x64": lambda: jax.enable_x64(True),
    "strict_dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "strict_ranks": lambda: jax.numpy_rank_promotion("raise"),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "mesh": ambient_mesh,
}
SETTINGS: dict[str, Setting] = EVERYWHERE | {"no_transfers": lambda: jax.transfer_guard("disallow")}


@contextmanager
def under(*names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SETTINGS[name]())
        yield


@pytest.fixture(scope="module")
def lm() -> djax.DiffusionLM:
    return tiny.load()


def generated(lm: djax.DiffusionLM) -> dict[str, Any]:
    """What the object gives, under any setting; the program is that of `rl.rollout`."""
    got = lm.generate(PROMPTS, recipe=EXACT, temperature=1.0, key=3, **LENGTHS)
    return {"canvas": got.canvas, "commit_step": got.commit_step, "log_prob": got.log_prob, "nfe": got.nfe}


def otherwise_generated(lm: djax.DiffusionLM) -> dict[str, Any]:
    """Its other calls."""
    call: dict[str, Any] = {"temperature": 1.0, "key": 3}
    filled = lm.infill([[1, 2, 3, 4, 5, 6]], [[False, True, True, False, True, False]], block_length=4, **call)
    credit = lm.generate(PROMPTS, recipe=CREDIT, **LENGTHS, **call)
    *_, last = lm.stream(PROMPTS, recipe=SAMPLED, **LENGTHS, **call)
    guided = lm.generate(PROMPTS[:2], guidance=1.0, top_k=5, top_p=0.9, min_p=0.01, **LENGTHS, **call)
    return {
        "infill": filled.canvas, "stream": last.tokens, "logits": lm.logits(PROMPTS),
        "credit": credit.canvas, "guided": guided.canvas}


def trained(lm: djax.DiffusionLM) -> dict[str, Any]:
    """Rollout, states, scores with their gradient, and a training step."""
    r = rl.rollout(lm, PROMPTS, key=3, **LENGTHS)
    states, drawn = rl.trace_states(r), rl.masked_states(r, 5, scheme="coupled")

    def loss(params: Any) -> jax.Array:
        log_probs = rl.score(lm.denoiser, params, r, states)
        rewards = jnp.asarray(r.lengths, jnp.float32)
        return trace_grpo_loss(log_probs, group_advantages(rewards, 2), mask=r.is_completion, old=r.log_prob)[0]

    gradient = jax.jit(jax.grad(loss))(lm.params)
    pure = nnx.to_pure_dict(lm.params)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(lm.denoiser.graphdef, optimizer, mask_id=tiny.MASK))
    batch = Batch(*jax.device_put((np.asarray(r.tokens), np.asarray(r.is_open), np.asarray(r.valid)), jax.devices()[0]))
    state, _ = step(init_state(pure, optimizer), batch, as_key(1))
    return {
        "tokens": r.tokens, "log_prob": r.log_prob, "masks": drawn.masks, "weights": drawn.weights,
        "score": rl.score(lm.denoiser, lm.params, r, states), "gradient": jax.tree.leaves(gradient)[0],
        "trained": jax.tree.leaves(state.params)[0]}


def estimated(lm: djax.DiffusionLM) -> dict[str, Any]:
    mean, error = rl.log_likelihood(lm, PROMPTS, [[1, 2], [3], [4, 5, 6], [7]], key=2, n=4)
    return {"mean": mean, "error": error}


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, value in want.items():
        ours, theirs = np.asarray(jax.device_get(got[name])), np.asarray(jax.device_get(value))
        assert ours.dtype == theirs.dtype, name
        if np.issubdtype(ours.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_all_settings_at_once_change_nothing(lm) -> None:
    want = generated(lm)
    with under(*SETTINGS):
        same(generated(lm), want)


@pytest.fixture(scope="module")
def all_wanted(lm) -> tuple[dict[str, Any], ...]:
    return generated(lm), otherwise_generated(lm), trained(lm), estimated(lm)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("x64",), ("strict_dtypes", "strict_ranks"), ("rbg",), ("mesh",), ("no_transfers",)],
                         ids="+".join)
def test_a_setting_changes_nothing(lm, all_wanted, names) -> None:
    want, other, wanted, estimates = all_wanted
    with under(*names):
        same(generated(lm), want)
        same(otherwise_generated(lm), other)
        if names[0] in ("no_transfers", "mesh"):  # a caller's own `jax.grad` and eager arrays would break on these
            r = rl.rollout(lm, PROMPTS, key=3, **LENGTHS)
            masks = rl.masked_states(r, 5, scheme="coupled").masks
            same({"tokens": r.tokens, "masks": masks, "score": rl.score(lm.denoiser, lm.params, r, rl.trace_states(r))},
                 {field: wanted[field] for field in ("tokens", "masks", "score")})
        else:
            same(trained(lm), wanted)
        same(estimated(lm), estimates)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_model_made_under_a_setting_is_the_same(lm, golden_lm, name) -> None:
    want = golden_lm.logits(PROMPTS)
    with under(name):
        again = djax.load(ROOT / "tests" / "goldens" / "llada_moe", dtype="float32")
        again.update_params(golden_lm.params)
        leaves = jax.tree.leaves(again.params)
        np.testing.assert_allclose(again.logits(PROMPTS), want, rtol=1e-5, atol=1e-5)
    assert {leaf.sharding for leaf in leaves} == {leaf.sharding for leaf in jax.tree.leaves(golden_lm.params)}


def test_no_parameter_is_put_on_the_ambient_mesh(lm) -> None:
    host = jax.device_get(lm.params)
    with under("mesh"):
        again = djax.DiffusionLM(tiny.CONFIG, host, kernels=tiny.KERNELS)
    assert {type(leaf.sharding) for leaf in jax.tree.leaves(again.params)} == {jax.sharding.SingleDeviceSharding}


def test_an_ambient_mesh_does_not_compile_at_every_call(lm) -> None:
    with under("mesh"):
        generated(lm)
    before = lm.compile_count
    with under("mesh"):
        generated(lm)
    assert lm.compile_count == before


AMBIENT_PROCESS = """
import os
import jax
{setup}
import numpy as np
from tests import test_ambient as t
lm = t.tiny.load()
got = t.generated(lm) | t.estimated(lm)
np.savez(os.environ["OUT"], **got)
"""


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["jax.config.update('jax_enable_x64', True)"], ids=["x64"])
def test_a_process_under_a_setting_gives_the_same(lm, tmp_path, setup) -> None:
    """Set before djax is imported, for everything that happens at import."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"OUT": str(tmp_path / "got.npz"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", AMBIENT_PROCESS.format(setup=setup)], env=environment, check=True, cwd=ROOT)
    with np.load(tmp_path / "got.npz") as got:
        same(dict(got), generated(lm) | estimated(lm))


XLA_IMPLEMENTATIONS = {
    "moe": (moe_cases, ("reference", "xla_dense", "xla_grouped")),
    "attention": (attention_cases, ("reference", "xla")),
    "unembed": (unembed_cases, ("reference", "xla_stream")),
}


def kernel_calls(*, in_turn: bool = False) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A function and its arguments: each case with each implementation that XLA runs, or with one of them in turn."""
    for op, (table, names) in XLA_IMPLEMENTATIONS.items():
        for row, case in enumerate(table.CASES):
            given = table.operands(case, 0)
            operands, options = (given, {}) if op == "moe" else given
            for name in (names[row % len(names)],) if in_turn else names:
                yield partial(getattr(kernels_pallas, op), **options, implementation=name), operands


@pytest.mark.slow
def test_kernels_are_the_same_programs_under_strict_rules() -> None:
    for call, operands in kernel_calls():
        want = jax.jit(call).lower(*operands).as_text()
        with under("strict_dtypes", "strict_ranks"):
            assert jax.jit(call).lower(*operands).as_text() == want


@pytest.mark.slow
def test_kernels_give_the_same_with_64_bits() -> None:
    for call, operands in kernel_calls(in_turn=True):
        run = jax.jit(call)
        want = run(*operands)
        with under("x64"):
            got = run(*operands)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            same({"out": ours}, {"out": theirs})


def sample_toy(key: Any, row_ids: list[int]) -> np.ndarray:
    canvas = Canvas.from_prompts([[1, 2]] * len(row_ids), max_new_tokens=8, block_length=4, mask_id=toy.MASK,
                                 pad_id=toy.PAD)
    got = djax.denoise(
        toy.ToyDenoiser(), toy.make_params(), canvas, key, strategy=strategies.RandomOrder(strategies.Quota(4)),
        propose=proposals.Sample(np.float32(2.0)), row_ids=np.asarray(row_ids, np.int32))
    return np.asarray(got.tokens)


@pytest.mark.parametrize("key", [
    jax.random.key(7, impl="rbg"), jax.random.key(7, impl="unsafe_rbg"), jax.random.PRNGKey(7), 7],
    ids=["rbg", "unsafe_rbg", "raw", "seed"])
def test_rows_depend_on_key_and_row_id_only(key) -> None:
    together = sample_toy(key, [0, 1, 2])
    np.testing.assert_array_equal(together[1], sample_toy(key, [1, 5, 9])[0])
    np.testing.assert_array_equal(together, sample_toy(as_key(key), [0, 1, 2]))
    assert (together[0] != together[1]).any()


def words(key: Any) -> list[int]:
    return np.asarray(jax.random.key_data(as_key(key))).tolist()


def test_a_seed_gives_jax_own_key_and_another_seed_another() -> None:
    for seed in (0, 3, 2**31 + 5, 2**32 - 1):
        assert words(seed) == np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()
    with jax.enable_x64(True):
        wide = np.asarray(jax.random.key_data(jax.random.key(2**32 + 7))).tolist()
    assert words(2**32 + 7) == wide == [1, 7]
    assert words(2**63 - 1) == [2**31 - 1, 2**32 - 1]
    with jax.default_prng_impl("rbg"):
        assert words(3) == [0, 3]
    assert words(np.asarray(3)) == words(jnp.int32(3)) == words(np.uint8(3)) == words(3)
    traced = jax.jit(lambda seed: jax.random.key_data(as_key(seed)))(np.int32(3))
    assert np.asarray(traced).tolist() == words(3)


def test_keys_of_other_implementations_stay_different() -> None:
    keys = [jax.random.key(seed, impl="rbg") for seed in range(3)]
    found = [words(jax.random.fold_in(key, fold)) for key in keys for fold in range(3)]
    assert len({tuple(pair) for pair in found}) == 9


@pytest.mark.parametrize("key", [
    2**63, -1, 1.5, "7", True, None, np.bool_(True), np.float32(1), [1], np.zeros(2, np.int32),
    np.zeros(3, np.uint32)], ids=repr)
def test_a_wrong_key_is_named(lm, key) -> None:
    with pytest.raises(djax.errors.ArgumentError, match=r"^key: "):
        lm.generate(PROMPTS, key=key, **LENGTHS)
    with pytest.raises(djax.errors.ArgumentError, match=r"^key: "):
        sample_toy(key, [0])


def test_several_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^key: got keys of shape"):
        as_key(jax.random.split(jax.random.key(0)))


def test_rows_of_a_rollout_keep_their_states_when_it_is_cut(lm) -> None:
    r = rl.rollout(lm, PROMPTS, key=0, row_ids=[5, 6, 7, 8], **LENGTHS)
    np.testing.assert_array_equal(r.row_ids, [5, 6, 7, 8])
    rows = np.asarray([2, 3, 3, 1])
    for scheme, hidden in (("coupled", 0.0), ("stratified", 0.0), ("one_step", 0.3)):
        call: dict[str, Any] = {"scheme": scheme, "prompt_mask_probability": hidden}
        whole, cut = (rl.masked_states(part, 3, **call) for part in (r, r.take(rows)))
        np.testing.assert_array_equal(cut.masks, whole.masks[rows])
        np.testing.assert_array_equal(cut.weights, whole.weights[rows])
    assert (whole.masks[0] != whole.masks[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["coupled", "fixed_k", "stratified", "gauss", "one_step", "autoregressive"])
def test_one_row_keeps_its_states(lm, scheme) -> None:
    r = rl.rollout(lm, PROMPTS, key=0, row_ids=[5, 6, 7, 8], micro_batch=3, **LENGTHS)
    whole, cut = (rl.masked_states(part, 3, scheme=scheme) for part in (r, r.take(slice(2, 3))))
    np.testing.assert_array_equal(cut.masks, whole.masks[2:3])
    np.testing.assert_array_equal(cut.weights, whole.weights[2:3])


@pytest.fixture(scope="module")
def compilations() -> Iterator[list[str]]:
    """A growing list with an entry for each program that XLA is asked for."""
    found: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("differentiated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_calls_outside_of_jit_compile_once(lm, compilations, differentiated) -> None:
    def run(key: int) -> None:
        sample_toy(key, [0, 1, 2])
        r = rl.rollout(lm, PROMPTS, key=key, **LENGTHS)
        rl.masked_states(r, key, scheme="coupled")
        rl.score(lm.denoiser, lm.params, r, rl.trace_states(r))
        if differentiated:
            jax.grad(lambda params: rl.score(lm.denoiser, params, r, rl.trace_states(r)).sum())(lm.params)

    run(1)
    before = len(compilations)
    assert before
    run(2)
    assert len(compilations) == before


@pytest.mark.slow
def test_a_jitted_update_is_compiled_once(lm, compilations) -> None:
    """The loop that the README prints."""
    optimizer = optax.sgd(1e-3)

    @jax.jit
    def update(params, opt_state, r, states, advantages):
        def loss(params):
            log_probs = rl.score(lm.denoiser, params, r, states)
            return trace_grpo_loss(log_probs, advantages, mask=r.is_completion, old=r.log_prob)

        gradients, report = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, report

    params, opt_state, shapes, counts = lm.params, optimizer.init(lm.params), set(), []
    for step, recipe in enumerate((EXACT, recipes.fast_dllm(threshold=0.1, cache="none"))):
        r = rl.rollout(lm, PROMPTS, key=step, recipe=recipe, **LENGTHS)
        states = rl.trace_states(r)
        shapes.add(states.masks.shape)
        advantages = group_advantages(jnp.asarray(r.lengths, jnp.float32), 2)
        params, opt_state, _ = update(params, opt_state, r, states, advantages)
        lm.update_params(params)
        counts.append((len(compilations), int(r.steps.max())))
    assert len(shapes) == 1
    assert counts[0][1] != counts[1][1]  # the rollouts took different numbers of steps
    assert counts[0][0] == counts[1][0]
