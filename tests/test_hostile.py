"""Wrong inputs that are refused by name, before anything of their size is made, and right ones of any library."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from djax import cache_policies, proposals, recipes, rl, schedules, stopping, strategies, transforms
from djax.api import _dtype_name
from djax.calls import CallOptions, resolve_ids
from djax.cli_options import RecipeFlags
from djax.cli_recipe import RECIPES, build_recipe
from djax.errors import ArgumentError

CALL = {"max_new_tokens": 8, "block_length": 8, "mask_id": 150}
NAN, INF, HUGE = float("nan"), float("inf"), 10**9
WRONG_CALLS: list[dict[str, Any]] = [
    {"top_k": 2.5}, {"top_k": 0}, {"top_k": True}, {"top_k": "3"}, {"top_p": 0.0}, {"top_p": NAN}, {"top_p": 1.5},
    {"min_p": -0.1}, {"min_p": "x"}, {"guidance": INF}, {"guidance": -2}, {"temperature": None},
    {"temperature": 1e39}, {"temperature": -1}, {"temperature": NAN}, {"temperature": np.ones(2)},
    {"max_new_tokens": 1.5}, {"max_new_tokens": "8"}, {"max_new_tokens": None}, {"max_new_tokens": 0},
    {"max_new_tokens": HUGE}, {"block_length": HUGE}, {"block_length": 0}, {"block_length": 2.0},
    {"block_length": True}, {"eos_id": 150}, {"eos_id": [3, 150]}, {"eos_id": 1.5}, {"eos_id": "3"},
    {"mask_id": -1}, {"mask_id": True}]


@pytest.mark.parametrize("call", WRONG_CALLS, ids=str)
def test_a_wrong_option_is_named(golden_lm: Any, call: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as error:
        golden_lm.generate([[1, 2]], **{**CALL, **call})
    assert error.value.name == next(iter(call))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [
    {"num_samples": 1.5}, {"num_samples": 0}, {"num_samples": HUGE}, {"max_new_tokens": HUGE}, {"micro_batch": 0.5},
    {"block_length": HUGE}], ids=str)
def test_a_wrong_option_of_a_rollout_is_named(golden_lm: Any, call: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as error:
        rl.rollout(golden_lm, [[1, 2]], key=0, **{**CALL, **call})
    assert error.value.name == next(iter(call))


def test_lengths_beyond_the_model_are_refused(golden_lm: Any) -> None:
    with pytest.raises(ArgumentError, match="prompts"):
        golden_lm.logits([[1] * (golden_lm.config.max_positions + 1)])
    for shape in ((1, 4, HUGE), (0, 4, 4), (1, HUGE, 4), (1, 4, 1.5)):
        with pytest.raises(ArgumentError, match="shapes"):
            golden_lm.warmup([shape])


THRESHOLD = strategies.Threshold(0.5)
WRONG_PARTS: list[tuple[Any, dict[str, Any]]] = [
    *((strategies.Threshold, {"threshold": value}) for value in (5.0, -3, NAN, None, "x", True)),
    (strategies.Quota, {"steps": 0}), (strategies.Quota, {"steps": 1.5}), (strategies.Factor, {"factor": -1.0}),
    (strategies.Factor, {"factor": NAN}), (strategies.Hierarchical, {"low": 0.9, "high": 0.2}),
    (strategies.Hierarchical, {"high": 7, "low": 0.1}), (transforms.Credit, {"beta": 7.0}),
    (transforms.Credit, {"alpha": NAN}), (transforms.Credit, {"gamma": -1}),
    (transforms.ForbidTokens, {"token_ids": [0.5]}), (transforms.ForbidTokens, {"token_ids": [2**31]}),
    (proposals.Sample, {"temperature": -1.0}), (proposals.Sample, {"temperature": 1e39}),
    (cache_policies.Vicinity, {"before": -4, "after": 2}), (cache_policies.Vicinity, {"after": 1.5}),
    (stopping.OnEos, {"eos_ids": [-1]}), (schedules.Constant, {"value": NAN}),
    (schedules.Linear, {"start": NAN, "slope": 0.0}), (schedules.Linear, {"minimum": NAN, "start": 1, "slope": 0}),
    (schedules.Cosine, {"steps": 0, "start": 1.0, "end": 0.0}),
    (recipes.dinfer, {"threshold": -3}), (recipes.dinfer, {"threshold": NAN}), (recipes.dinfer, {"smoothing": 50}),
    (recipes.dinfer, {"warmup": -5}), (recipes.dinfer, {"before": -1}), (recipes.llada, {"steps_per_block": -1}),
    (recipes.fast_dllm, {"threshold": 7}), (recipes.fast_dllm, {"factor": NAN}), (recipes.fast_dllm, {"cache": "x"}),
    (recipes.dinfer_credit, {"alpha": NAN}), (recipes.dinfer_hierarchical, {"high": 2.0}),
    (recipes.dinfer_hierarchical, {"low": 0.99}), (recipes.llada2, {"threshold": NAN}),
    (_dtype_name, {"dtype": "int8"}), (_dtype_name, {"dtype": np.int32}), (_dtype_name, {"dtype": 3})]


@pytest.mark.parametrize(("make", "numbers"), WRONG_PARTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_number_is_refused_where_it_lives(make: Any, numbers: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as error:
        make(**numbers)
    assert error.value.name == next(iter(numbers))


@pytest.mark.parametrize(("make", "name"), [
    (lambda: strategies.Remasking(THRESHOLD, -0.1), "threshold"),
    (lambda: cache_policies.Periodic(cache_policies.Dual(), 0), "every"),
    (lambda: cache_policies.WithWarmup(cache_policies.Dual(), -1), "steps"),
    (lambda: proposals.RefuseToken(proposals.Greedy(), -1), "token_id")])
def test_parts_around_others_check_their_own_numbers(make: Any, name: str) -> None:
    with pytest.raises(ArgumentError) as error:
        make()
    assert error.value.name == name


def options(**changes: Any) -> CallOptions:
    return CallOptions(**{
        "recipe": recipes.llada(), "block_length": 8, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None,
        "guidance": None, "mask_id": 150, "eos_id": None, "stop_on_eos": True, **changes})


def test_numbers_of_any_library_are_taken(golden_lm: Any) -> None:
    for half in (jnp.float32(0.5), np.float64(0.5), jnp.bfloat16(0.5), np.asarray(0.5)):
        assert options(temperature=half, top_p=half, min_p=half, guidance=half).temperature == 0.5
    for four in (jnp.int32(4), np.int64(4), np.asarray(4)):
        assert options(top_k=four, block_length=four).top_k == 4
    for ids in (jnp.asarray([3, 4]), np.asarray([3, 4]), [3, 4], (jnp.int32(3), np.int64(4))):
        assert resolve_ids(options(eos_id=ids), golden_lm.config)[1] == (3, 4)
    assert resolve_ids(options(eos_id=jnp.int32(3), mask_id=jnp.int32(5)), golden_lm.config) == (5, (3,))
    for dtype in (jnp.bfloat16, np.float32, np.dtype("float16"), "bfloat16"):
        assert _dtype_name(dtype) in ("bfloat16", "float32", "float16")
    strategies.Threshold(jnp.asarray([0.1, 0.9]))
    strategies.Quota(jnp.int32(3))


def test_an_array_of_prompts_is_a_batch(golden_lm: Any) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = golden_lm.logits(rows)
    for array in (jnp.asarray(rows), np.asarray(rows), [jnp.asarray(row) for row in rows]):
        np.testing.assert_array_equal(golden_lm.logits(array), expected)


@pytest.mark.parametrize(("name", "parameter"), [
    (name, parameter) for name, make in RECIPES.items() for parameter in inspect.signature(make).parameters])
def test_every_parameter_of_a_recipe_is_a_flag(name: str, parameter: str) -> None:
    flags = {"steps_per_block": "steps", "alpha": "credit_alpha", "beta": "credit_beta", "gamma": "credit_gamma"}
    values: dict[str, Any] = {"steps_per_block": 3, "before": 3, "after": 3, "warmup": 3, "factor": 1.0, "low": 0.25}
    value = values.get(parameter, 0.7)
    if parameter == "cache":
        value = "prefix" if name == "fast_dllm" else False
    flag = {flags.get(parameter, parameter): "none" if value is False else value}
    assert build_recipe(RecipeFlags(recipe=name, **flag)) == RECIPES[name](**{parameter: value})
