"""Every part with every other one: the jitted loop against the NumPy oracle, token for token.

One program holds all transforms, strategies and proposals, each chosen by a leaf (`tests.support.select`): fourteen
serve the whole product of 1372 cases. They give the loop logits; what can do with a reading is run on readings by
programs of its own. The default run takes every cache once, on logits or on readings; the slow run takes the rest.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import cache_policies, proposals, smoothing, stopping, strategies, transforms
from djax.contracts.canvas import Canvas
from djax.loop.denoise import Result, denoise
from djax.parts.schedules import Linear
from tests.support import oracle, toy
from tests.support.select import SelectPropose, SelectStrategy, SelectTransform

BLOCK_LENGTH = 6
NEW_TOKENS = 12
PROMPT_LENGTHS = (3, 5)
TEMPERATURE = 0.8
# XLA's own optimisations are not under test, and compiling is what these tests wait for.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

TRANSFORMS: dict[str, tuple[Any, oracle.Transform]] = {
    "identity": (transforms.Identity(), oracle.identity),
    "forbid": (transforms.ForbidTokens(jnp.array([4, toy.MASK]), 21), oracle.forbid([4, toy.MASK], 21)),
    "top_k": (transforms.TopK(5), oracle.top_k(5)),
    "top_p": (transforms.TopP(0.8, 0.7), oracle.top_p(0.8, 0.7)),
    "min_p": (transforms.MinP(0.2, 1.3), oracle.min_p(0.2, 1.3)),
    "credit": (transforms.Credit(), oracle.credit()),
    "chain": (
        transforms.Chain((transforms.ForbidTokens(jnp.array([toy.MASK])), transforms.Credit(0.9, 0.7, 0.5),
                          transforms.TopP(0.9))),
        oracle.chain(oracle.forbid([toy.MASK]), oracle.credit(0.9, 0.7, 0.5), oracle.top_p(0.9))),
}
STRATEGIES: dict[str, tuple[Any, oracle.Strategy]] = {
    "threshold": (strategies.Threshold(0.6), oracle.threshold(0.6)),
    "quota": (strategies.Quota(4), oracle.quota(4)),
    "factor": (strategies.Factor(1.2), oracle.factor(1.2)),
    "hierarchical": (
        strategies.Hierarchical(Linear(0.95, -0.05, minimum=0.7), 0.4),
        oracle.hierarchical(oracle.linear(0.95, -0.05, minimum=0.7), 0.4)),
    "local_leap": (strategies.LocalLeap(0.6, 0.3, 2), oracle.local_leap(0.6, 0.3, 2)),
    "remasking": (
        strategies.Remasking(strategies.Hierarchical(0.7, 0.3), 0.45),
        oracle.remasking(oracle.hierarchical(0.7, 0.3), 0.45)),
    "random": (strategies.RandomOrder(strategies.Quota(4)), oracle.random_order(oracle.quota(4))),
}
CACHES: dict[str, tuple[Any, oracle.Policy]] = {
    "none": (cache_policies.NoCache(), oracle.no_cache),
    "prefix": (cache_policies.Prefix(), oracle.prefix),
    "dual": (cache_policies.Dual(), oracle.dual),
    "vicinity": (cache_policies.Vicinity(2, 3), oracle.vicinity(2, 3)),
    "block_causal": (cache_policies.BlockCausal(), oracle.block_causal),
    "periodic": (cache_policies.Periodic(cache_policies.Dual(), 2), oracle.periodic(oracle.dual, 2)),
    "warmup": (
        cache_policies.WithWarmup(cache_policies.Vicinity(3, 2), 1),
        oracle.with_warmup(oracle.vicinity(3, 2), 1)),
}
SMOOTHINGS: dict[str, tuple[Any, Any]] = {
    "hard": (smoothing.HardTokens(), None),
    "soft": (smoothing.SoftTokens(), oracle.SOFT),
}
PROPOSALS: dict[str, tuple[Any, oracle.Propose]] = {
    "greedy": (proposals.Greedy(), oracle.sample(0.0)),
    "sample": (proposals.Sample(TEMPERATURE), oracle.sample(TEMPERATURE)),
}
AXES = (TRANSFORMS, STRATEGIES, CACHES, SMOOTHINGS, PROPOSALS)
PRODUCT = list(itertools.product(*AXES))
Case = tuple[str, ...]
READERS = [name for name, (part, _) in TRANSFORMS.items() if not getattr(part, "needs_logits", True)]

MODEL = toy.NumpyToy(toy.make_params())
PARAMS = toy.make_params()


def make_prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 20, length).tolist() for length in PROMPT_LENGTHS]


def make_canvas(seed: int) -> Canvas:
    return Canvas.from_prompts(
        make_prompts(seed), max_new_tokens=NEW_TOKENS, block_length=BLOCK_LENGTH, mask_id=toy.MASK,
        pad_id=toy.PAD, bucket=False)


def expected_rows(case: Case, seed: int) -> list[oracle.Row]:
    """Each row decoded by the oracle, alone."""
    transform, strategy, policy, weight, propose = (axis[name][1] for axis, name in zip(AXES, case, strict=True))
    return [
        oracle.decode(
            MODEL, [*prompt, *[toy.MASK] * NEW_TOKENS], [False] * len(prompt) + [True] * NEW_TOKENS,
            jax.random.key(seed), first_block=len(prompt), block_length=BLOCK_LENGTH, row_id=row,
            strategy=strategy, policy=policy, transform=transform, propose=propose, weight=weight,
            eos_ids=[toy.EOS])
        for row, prompt in enumerate(make_prompts(seed))]


@functools.cache
def choose_seed(case: Case) -> tuple[int, list[oracle.Row]]:
    """The first seed without a decision inside float32 error, and what the oracle makes of it."""
    # of its own name: another part in the tables leaves this case's seed as it is
    first = zlib.crc32("-".join(case).encode()) % 10**7 * 100
    for seed in range(first, first + 20):
        rows = expected_rows(case, seed)
        if min(row.margin for row in rows) > oracle.RELIABLE:
            return seed, rows
    raise AssertionError(f"{case}: no seed from {first} on has reliable margins")


def check(result: Result, rows: list[oracle.Row], label: str, *, soft: bool) -> None:
    valid = np.asarray(result.valid)
    tolerance = 1e-3 if soft else 1e-4  # soft inputs hand a step's rounding on to the next
    for i, row in enumerate(rows):
        where = f"{label}, row {i}"
        assert np.asarray(result.tokens)[i, valid[i]].tolist() == row.tokens, where
        assert np.asarray(result.is_masked)[i, valid[i]].tolist() == row.is_masked, where
        assert np.asarray(result.commit_step)[i, valid[i]].tolist() == row.commit_step, where
        assert np.abs(np.asarray(result.log_prob)[i, valid[i]] - row.log_prob).max() < tolerance, where
        assert (int(result.nfe[i]), int(result.steps[i])) == (row.nfe, row.nfe), where
        assert int(result.refreshes[i]) == row.refreshes, where
        assert int(result.stop_reason[i]) == row.stop_reason, where


def run(canvas: Canvas, key: jax.Array, parts: dict[str, Any]) -> Result:
    return denoise(
        toy.ToyDenoiser(), PARAMS, canvas, key, stop_rule=stopping.OnEos(jnp.array([toy.EOS])), **parts)


def compiled(parts: dict[str, Any]) -> Any:
    lowered = jax.jit(run).lower(make_canvas(0), jax.random.key(0), parts)
    return lowered.compile(compiler_options=COMPILER_OPTIONS)


def among(select: Any, axis: dict[str, tuple[Any, Any]], names: list[str]) -> Any:
    return select(index=jnp.int32(0), parts=tuple(axis[name][0] for name in names))


def check_all(parts: dict[str, Any], *, transforms: list[str], cache: str, soft: str, proposes: list[str]) -> None:
    """Every strategy with these others, in one program."""
    program = compiled(parts)
    strategies = list(STRATEGIES)
    for case in itertools.product(transforms, strategies, [cache], [soft], proposes):
        seed, rows = choose_seed(case)
        chosen = {"transform": transforms.index(case[0]), "strategy": strategies.index(case[1]),
                  "propose": proposes.index(case[4])}
        given = parts | {name: parts[name].replace(index=jnp.int32(index)) for name, index in chosen.items()
                         if hasattr(parts[name], "index")}
        check(program(make_canvas(seed), jax.random.key(seed), given), rows, f"{case}, seed {seed}",
              soft=soft == "soft")


def shared_parts(cache: str, soft: str, transforms: list[str]) -> dict[str, Any]:
    return {"transform": among(SelectTransform, TRANSFORMS, transforms),
            "strategy": among(SelectStrategy, STRATEGIES, list(STRATEGIES)),
            "cache_policy": CACHES[cache][0], "smoothing": SMOOTHINGS[soft][0]}


def product_of(*axes: Any, default: list[tuple[str, ...]]) -> list[Any]:
    return [pytest.param(*names, marks=() if names in default else pytest.mark.slow, id="-".join(names))
            for names in itertools.product(*axes)]


@pytest.mark.parametrize(("cache", "soft"), product_of(CACHES, SMOOTHINGS, default=[("prefix", "soft")]))
def test_product(cache: str, soft: str) -> None:
    """On logits: 84 cases."""
    parts = shared_parts(cache, soft, list(TRANSFORMS))
    parts["propose"] = among(SelectPropose, PROPOSALS, list(PROPOSALS))
    check_all(parts, transforms=list(TRANSFORMS), cache=cache, soft=soft, proposes=list(PROPOSALS))


@pytest.mark.parametrize(("cache", "soft", "propose"), product_of(CACHES, SMOOTHINGS, PROPOSALS, default=[]))
def test_product_on_readings(cache: str, soft: str, propose: str) -> None:
    """The transforms that can do with a reading: 18 cases."""
    parts = shared_parts(cache, soft, READERS) | {"propose": PROPOSALS[propose][0]}
    assert not parts["transform"].needs_logits
    check_all(parts, transforms=READERS, cache=cache, soft=soft, proposes=[propose])


@pytest.mark.slow
def test_cases_differ() -> None:
    """The oracle's answer depends on every axis: no part of the table is a decoration."""
    base = ("identity", "remasking", "dual", "hard", "greedy")
    for axis, names in enumerate(AXES):
        seen = {}
        for name in names:
            case = (*base[:axis], name, *base[axis + 1:])
            rows = [row for seed in range(8) for row in expected_rows(case, seed)]
            seen[name] = str([(row.tokens, row.commit_step) for row in rows])
        assert len(set(seen.values())) == len(seen), f"axis {axis} has parts that act alike: {list(seen)}"
