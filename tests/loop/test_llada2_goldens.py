"""Every recorded dInfer trace of LLaDA2, token for token and forward for forward; and that its cache is exact."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax import recipes
from djax.contracts.canvas import Canvas
from djax.engine.options import Sampling, resolve
from djax.loop.denoise import Result, denoise
from djax.models import ModelDenoiser, build
from djax.models.config import ModelConfig
from djax.parts.cache_policies import BlockCausal, Dual, NoCache, Periodic, WithWarmup
from djax.parts.proposals import Greedy, RefuseToken, Sample
from djax.parts.stopping import OnEos
from djax.parts.strategies import Threshold
from tests.replay_goldens import Case, main, read_cases, recipe_of
from tests.support import golden, golden_llada2

CASES = read_cases(golden_llada2.GOLDENS)
BLOCK = golden_llada2.CONFIG.block_length
MASK, EOS = 155, 152


@functools.cache
def graphdef(length: int) -> Any:
    return nnx.split(build(dataclasses.replace(golden_llada2.CONFIG, block_length=length)))[0]


def rows_of(lengths: list[tuple[list[int], int]], block_length: int) -> Canvas:
    """Prompts, each with open positions up to a length of its own, their blocks on one grid; laid out by hand."""
    leads = [len(prompt) // block_length * block_length for prompt, _ in lengths]
    rest = max(total - lead for lead, (_, total) in zip(leads, lengths, strict=True))
    shape = len(lengths), max(leads) + -(-rest // block_length) * block_length
    tokens, positions = np.full(shape, EOS, np.int32), np.zeros(shape, np.int32)
    is_masked, valid = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (lead, (prompt, total)) in enumerate(zip(leads, lengths, strict=True)):
        start = max(leads) - lead
        tokens[row, start:start + len(prompt)] = prompt
        tokens[row, start + len(prompt):start + total] = MASK
        is_masked[row, start + len(prompt):start + total] = True
        valid[row, start:start + total] = True
        positions[row, start:start + total] = np.arange(total)
    return Canvas(
        tokens=jnp.asarray(tokens), is_masked=jnp.asarray(is_masked), valid=jnp.asarray(valid),
        positions=jnp.asarray(positions), mask_id=jnp.int32(MASK), first_block=max(leads), block_length=block_length)


@functools.partial(jax.jit, static_argnames="length")
def decode(canvas: Canvas, parts: dict[str, Any], rows: Any, *, length: int) -> Result:
    return denoise(
        ModelDenoiser(graphdef(length)), golden_llada2.parameters(), canvas, jax.random.key(3),
        stop_rule=OnEos(jnp.array([EOS])), row_ids=rows, **parts)


def program(case: Case) -> tuple[str, str, int]:
    """Cases that agree in this are decoded together, as one ragged batch."""
    return case["algo"], case["decoder"], case["block_length"]


PROGRAMS = sorted({program(case) for case in CASES})
LONG = 4 * BLOCK
QUICK = [("bd", "hierarchy", LONG), ("bd_attnmask", "credit", BLOCK)]


@pytest.mark.parametrize(("algo", "decoder", "length"), [
    pytest.param(*key, id="-".join(map(str, key)), marks=[] if key in QUICK else [pytest.mark.slow])
    for key in PROGRAMS])
def test_tokens_and_nfe_equal_dinfer(algo: str, decoder: str, length: int) -> None:
    cases = [case for case in CASES if program(case) == (algo, decoder, length)]
    recipe = recipe_of(cases[0])
    parts = {"strategy": recipe.strategy, "transform": recipe.transform, "cache_policy": recipe.cache_policy,
             "propose": RefuseToken(Greedy(), MASK)}
    canvas = rows_of([(case["prompt"], -(-(len(case["prompt"]) + case["gen_length"]) // length) * length)
                      for case in cases], length)
    result = decode(canvas, parts, jnp.arange(len(cases)), length=length)
    for row, case in enumerate(cases):
        assert recipe_of(case) == recipe
        tokens = np.asarray(result.tokens[row])[np.asarray(result.valid[row])]
        assert [token for token in tokens.tolist() if token != EOS] == case["tokens"], case
        assert int(result.nfe[row]) == case["steps"], case


def test_all_cases_are_covered() -> None:
    assert len(CASES) == 34
    assert set(PROGRAMS) == {(algo, decoder, length) for algo in ("bd", "bd_attnmask")
                             for decoder in ("threshold", "credit", "hierarchy") for length in (BLOCK, LONG)}
    assert {(case["mask_id"], case["eos_id"], case["threshold"]) for case in CASES} == {(MASK, EOS, 0.9)}


@pytest.mark.slow
def test_the_command_replays_them_one_by_one() -> None:
    """Through `load` and `generate`, on the reference implementations."""
    assert main([str(golden_llada2.GOLDENS), "--kernels", "moe=reference,attention=reference,unembed=reference"]) == 0


# --- the cache is exact ---

PROMPTS = [[5, 17, 9, 3, 44, 8, 21, 7, 60, 33, 2], [71], [12, 90, 4, 18, 55, 101, 6, 77]]
PARTS = {"strategy": Threshold(0.8), "propose": Sample(jnp.float32(0.7))}


def drawn(policy: Any, block_length: int, rows: slice = slice(None)) -> Result:
    """27 tokens after each prompt, drawn so that every step differs."""
    canvas = jax.tree.map(
        lambda array: array[rows] if array.ndim else array,
        rows_of([(prompt, len(prompt) + 27) for prompt in PROMPTS], block_length))
    return decode(canvas, PARTS | {"cache_policy": policy}, jnp.arange(3)[rows], length=BLOCK)


def assert_same(got: Result, expected: Result) -> None:
    for name in ("tokens", "commit_step", "is_masked", "nfe"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    np.testing.assert_allclose(got.log_prob, expected.log_prob, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [BLOCK, 2 * BLOCK])
def test_a_ragged_batch_is_what_it_is_without_a_cache(block_length: int) -> None:
    """Also where two of the model's blocks are decoded together."""
    exact, cached = drawn(NoCache(), block_length), drawn(BlockCausal(), block_length)
    assert_same(cached, exact)
    assert (np.asarray(cached.steps) > 27 // block_length + 3).all()
    assert cached.refreshes.tolist() == [1, 1, 1]


@pytest.mark.slow
def test_a_row_is_what_it_is_alone() -> None:
    whole = drawn(BlockCausal(), BLOCK)
    for row in range(3):
        only = slice(row, row + 1)
        assert_same(drawn(BlockCausal(), BLOCK, only), jax.tree.map(lambda array: array[only], whole))  # noqa: B023


@pytest.mark.slow
def test_a_block_that_is_not_the_models_is_not_exact() -> None:
    """What `BlockCausal.check_model` refuses: half a block's keys were written before the other half was decoded."""
    exact, cached = drawn(NoCache(), BLOCK // 2), drawn(BlockCausal(), BLOCK // 2)
    assert (np.asarray(exact.tokens) != np.asarray(cached.tokens)).any()


# --- the recipe ---


def test_the_recipe_is_the_models_own_decoder() -> None:
    assert recipes.llada2() == recipes.Recipe(strategy=Threshold(0.95), cache_policy=BlockCausal())
    assert recipes.llada2(threshold=0.7, cache=False) == recipes.Recipe(strategy=Threshold(0.7))
    assert recipes.llada2().cache_policy.exact


def check(recipe: recipes.Recipe, config: ModelConfig, *, block_length: int, gaps: bool = False) -> None:
    sampling = Sampling(recipe=recipe, block_length=block_length, mask_id=150)
    resolve(sampling, config, vocab_limit=config.vocab_size, gaps=gaps)


def test_blocks_that_do_not_fit_are_refused() -> None:
    recipe, config = recipes.llada2(), golden_llada2.CONFIG
    check(recipe, config, block_length=3 * BLOCK)
    check(recipes.dinfer(), golden.CONFIG, block_length=5, gaps=True)
    check(dataclasses.replace(recipe, cache_policy=Dual()), config, block_length=5, gaps=True)
    with pytest.raises(ValueError, match=r"block_length: got 12 .* allowed a multiple of 8"):
        check(recipe, config, block_length=12)
    with pytest.raises(ValueError, match=r"recipe: got .* with llada_moe, whose attention is not causal"):
        check(recipe, golden.CONFIG, block_length=8)
    with pytest.raises(ValueError, match=r"recipe: got .* needs open positions in every block"):
        check(recipe, config, block_length=8, gaps=True)
    wrapped = dataclasses.replace(recipe, cache_policy=WithWarmup(Periodic(BlockCausal(), 2), 1))
    with pytest.raises(ValueError, match="block_length: got 4"):
        check(wrapped, config, block_length=4)
