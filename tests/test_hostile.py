"""Wrong inputs that are refused by name, before anything of their size is made, and right ones of any library."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from djax import api, cache_policies, proposals, recipes, rl, schedules, smoothing, stopping, strategies, transforms
from djax.cli import train as cli_train
from djax.cli.app import app
from djax.cli.flags import RecipeFlags
from djax.cli.recipe import build_recipe
from djax.engine.options import Sampling, dtype_name, resolve_ids
from djax.errors import ArgumentError
from djax.recipes import RECIPES

CALL = {"max_new_tokens": 8, "block_length": 8, "mask_id": 150}
NAN, INF, HUGE = float("nan"), float("inf"), 10**9
WRONG_CALLS: list[dict[str, Any]] = [
    {"top_k": 2.5}, {"top_k": 0}, {"top_k": True}, {"top_k": "3"}, {"top_p": 0.0}, {"top_p": NAN}, {"top_p": 1.5},
    {"min_p": -0.1}, {"min_p": "x"}, {"guidance": INF}, {"guidance": -2}, {"temperature": None},
    {"temperature": 1e39}, {"temperature": -1}, {"temperature": NAN}, {"temperature": np.ones(2)},
    {"max_new_tokens": 1.5}, {"max_new_tokens": "8"}, {"max_new_tokens": None}, {"max_new_tokens": 0},
    {"max_new_tokens": HUGE}, {"block_length": HUGE}, {"block_length": 0}, {"block_length": 2.0},
    {"block_length": True}, {"eos_id": 150}, {"eos_id": [3, 150]}, {"eos_id": 1.5}, {"eos_id": "3"},
    {"eos_id": "</s>"}, {"eos_id": [[3]]}, {"top_k": [3]}, {"mask_id": -1}, {"mask_id": True}, {"mask_id": "x"},
    {"stop_on_eos": "no"}, {"align": "no"}, {"allow_special_tokens": "no"}, {"watch": "x"}]


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
    for shape in ((1, 4, HUGE), (0, 4, 4), (1, HUGE, 4), (1, 4, 1.5), (1, 4), ([1, 2], 4, 8), "abc", 1):
        with pytest.raises(ArgumentError, match="shapes: got "):
            golden_lm.warmup([shape])
    for shapes in ((1, 4, 8), None, "abc", 5):
        with pytest.raises(ArgumentError, match="shapes: got "):
            golden_lm.warmup(shapes)


@pytest.mark.parametrize("call", [
    {"streamer": "x"}, {"drafts": "x"}, {"drafts": None}, {"align": "no"}, {"stop_on_eos": "no"}], ids=str)
def test_a_wrong_option_of_a_stream_is_named_before_its_first_step(golden_lm: Any, call: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as error:
        golden_lm.stream([[1, 2]], **{**CALL, **call})
    assert error.value.name == next(iter(call))


def test_a_wrong_watch_of_infilling_is_named(golden_lm: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^watch: got 'x'; allowed a callable, or None"):
        golden_lm.infill([[1, 2]], [[False, True]], mask_id=150, watch="x")


def test_a_wrong_recipe_of_an_estimate_is_named(golden_lm: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^recipe: got a str; allowed djax\.Parts"):
        golden_lm.memory_estimate(1, 128, recipe="x")


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
    (strategies.Threshold, {"threshold": schedules.Linear(1.0, -0.02, minimum=7)}),
    (strategies.Threshold, {"threshold": schedules.Constant(5.0)}),
    (strategies.Hierarchical, {"high": schedules.Cosine(0.9, -0.1, 8)}),
    *((smoothing.SoftTokens, {"weight": value}) for value in (1.5, -0.1, NAN, "x", True, schedules.Constant(50))),
    (Sampling, {"mask_id": "x"}), (Sampling, {"mask_id": -1}), (Sampling, {"eos_id": []}),
    (Sampling, {"eos_id": "</s>"}), (Sampling, {"eos_id": [3, "x"]}), (Sampling, {"stop_on_eos": "no"}),
    (api.load, {"kernels": "x"}), (api.load, {"source": 5}),
    (stopping.OnEos, {"eos_ids": [-1]}), (schedules.Constant, {"value": NAN}),
    (schedules.Linear, {"start": NAN, "slope": 0.0}), (schedules.Linear, {"minimum": NAN, "start": 1, "slope": 0}),
    (schedules.Cosine, {"steps": 0, "start": 1.0, "end": 0.0}),
    (recipes.dinfer, {"threshold": -3}), (recipes.dinfer, {"threshold": NAN}), (recipes.dinfer, {"smoothing": 50}),
    (recipes.dinfer, {"warmup": -5}), (recipes.dinfer, {"before": -1}), (recipes.llada, {"steps_per_block": -1}),
    (recipes.fast_dllm, {"threshold": 7}), (recipes.fast_dllm, {"factor": NAN}), (recipes.fast_dllm, {"cache": "x"}),
    (recipes.dinfer_credit, {"alpha": NAN}), (recipes.dinfer_hierarchical, {"high": 2.0}),
    (recipes.dinfer_hierarchical, {"low": 0.99}), (recipes.llada2, {"threshold": NAN}),
    (dtype_name, {"dtype": "int8"}), (dtype_name, {"dtype": np.int32}), (dtype_name, {"dtype": 3})]


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


def test_numbers_of_any_library_are_taken(golden_lm: Any) -> None:
    for half in (jnp.float32(0.5), np.float64(0.5), jnp.bfloat16(0.5), np.asarray(0.5)):
        assert Sampling(temperature=half, top_p=half, min_p=half, guidance=half).temperature == 0.5
    for four in (jnp.int32(4), np.int64(4), np.asarray(4)):
        assert Sampling(top_k=four, block_length=four).top_k == 4
    for ids in (jnp.asarray([3, 4]), np.asarray([3, 4]), [3, 4], (jnp.int32(3), np.int64(4))):
        assert resolve_ids(Sampling(eos_id=ids, mask_id=150), golden_lm.config)[1] == (3, 4)
    assert resolve_ids(Sampling(eos_id=jnp.int32(3), mask_id=jnp.int32(5)), golden_lm.config) == (5, (3,))
    for dtype in (jnp.bfloat16, np.float32, np.dtype("float16"), "bfloat16"):
        assert dtype_name(dtype) in ("bfloat16", "float32", "float16")
    strategies.Threshold(jnp.asarray([0.1, 0.9]))
    strategies.Quota(jnp.int32(3))
    smoothing.SoftTokens(jnp.float32(0.3))


def test_an_array_of_prompts_is_a_batch(golden_lm: Any) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = golden_lm.logits(rows)
    for array in (jnp.asarray(rows), np.asarray(rows), [jnp.asarray(row) for row in rows]):
        np.testing.assert_array_equal(golden_lm.logits(array), expected)


@pytest.mark.parametrize(("name", "parameter"), [
    (name, parameter) for name, make in RECIPES.items() for parameter in inspect.signature(make).parameters])
def test_every_parameter_of_a_recipe_can_be_set(name: str, parameter: str) -> None:
    values: dict[str, Any] = {"steps_per_block": 3, "before": 3, "after": 3, "warmup": 3, "factor": 1.0, "low": 0.25}
    value = values.get(parameter, 0.7)
    if parameter == "cache":
        value = "prefix" if name == "fast_dllm" else False
    assert build_recipe(RecipeFlags(recipe=name, set=[f"{parameter}={value}"])) == RECIPES[name](**{parameter: value})


REAL_LOAD = api.load
RUN = """[data]
tasks = ["addition"]
[optimizer]
learning_rate = 1e-3
[training]
output = "out"
steps = 2
batch_size = 2
"""
FILES = {
    "ids": "[1, 2]", "wide": "[[1], [2, 999]]", "nulls": "[1, null]", "junk": "{", "deep": "[" * 100_000,
    "bot": '[{"role": "bot", "content": "x"}]', "no.toml": "[data", "seed.toml": RUN + "seed = -1",
    "mesh.toml": RUN + "[mesh]\ndata = 4096\n",
    "steps.toml": RUN.replace("steps = 2", "steps = 1.5"), "typo.toml": RUN.replace("steps", "stepz")}
"""What "@name" in a row of the table below is a file of."""
IDS = ["--token-ids", "@ids", "--mask-id", "155"]
PLAN = ["llada-moe", "--no-compile"]
COMMANDS: list[tuple[list[str], str]] = [
    (["genrate"], "COMMAND: got 'genrate'; allowed generate, infill, convert, train, plan, parts, inspect; "),
    (["--vresion"], "--vresion: got an option that does not exist"),
    (["generate", "hi", "--max-new-tokens", "1.5"], "--max-new-tokens: got '1.5'; allowed an integer"),
    (["generate", "hi", "--max-new-tokens", "-1"], "--max-new-tokens: got -1; allowed an integer of at least 1"),
    (["generate", *IDS, "--max-new-tokens", "1000000000"], "--max-new-tokens: got 1000000000 after a prompt of 2"),
    (["generate", *IDS, "--block-length", "1000000000"], "--block-length: got 1000000000; allowed an integer"),
    (["generate", *IDS, "--temperature", "1e38"], "--temperature: got 1e+38; allowed a finite number of at least 0"),
    (["generate", "hi", "--temperature", "1e39"], "--temperature: got 1e+39"),
    (["generate", "hi", "--top-p", "0"], "--top-p: got 0.0; allowed a finite number above 0 and at most 1"),
    (["generate", "hi", "--min-p", "nan"], "--min-p: got nan"),
    (["generate", "hi", "--guidance", "-2"], "--guidance: got -2.0; allowed a finite number of at least -1"),
    (["generate", "hi", "--seed", str(2**63)], f"--seed: got {2**63}; allowed an integer from 0 to {2**63 - 1}"),
    (["generate", "hi", "--seed", "0x1f"], "--seed: got '0x1f'; allowed an integer"),
    (["generate", "hi", "--dtype", "int8"], "--dtype: got 'int8'; allowed bfloat16, float16, float32"),
    (["generate", "hi", "--threshold", "-3"], "--threshold: got -3.0"),
    (["generate", "hi", "--smoothing", "50"], "--smoothing: got 50.0"),
    (["generate", "hi", "--set", "warmup=-5"], "--set warmup: got -5; allowed an integer of at least 0"),
    (["generate", "hi", "--cache", "none", "--set", "cache_policy.steps=2"], "--set cache_policy.steps: got 'steps'"),
    (["generate", "hi", "--recipe", "fast_dllm", "--set", "factor=nan"], "--set factor: got nan"),
    (["infill", "a [MASK]", "--set", "strategy"], "--set: got 'strategy'; allowed PATH=VALUE"),
    (["plan", *PLAN, "--topology", "h200:8", "--set", "cache=no"], "--set cache: got 'no'; allowed true, false"),
    (["generate", "hi", "--recipe", "os:path"], "--recipe: got 'os:path', which gives "),
    (["generate", "hi", "--steps"], "--steps: got nothing; allowed one value; give it, see 'djax generate --help'"),
    (["generate", "hi", "--json=1"], "--json: got a value; allowed no value"),
    (["generate", "hi", "--live"], "--live: got it with an output that is not a terminal"),
    (["generate", "hi", "--mesh", "tensor=0"], "--mesh: got 'tensor=0'; allowed a list of different axes"),
    (["generate", "hi", "--mesh", "rows=2"], "--mesh: got an axis 'rows'; allowed context, data"),
    (["generate", "hi", "--distributed", "auto"], "--mesh: got nothing with --distributed"),
    (["generate", "hi"], "PROMPT[0]: got chat messages, but this checkpoint has no tokenizer.json"),
    (["generate", "hi", "--raw"], "PROMPT[0]: got text, but this checkpoint has no tokenizer.json"),
    (["generate", "--token-ids", "@ids"], "--mask-id: got none, neither from the checkpoint nor from its tokenizer"),
    (["generate", "--token-ids", "@wide"], "--token-ids[1]: got token id 999"),
    (["generate", "--token-ids", "@nulls"], "--token-ids[1]: got None"),
    (["generate", "--token-ids", "@deep"], "--token-ids: got {deep}, which is not JSON"),
    (["generate", "--messages", "@junk"], "--messages: got {junk}, which is not JSON"),
    (["generate", "--messages", "@bot"], "--messages[0].role: got 'bot'; allowed system, user, assistant"),
    (["generate", "--messages", "@absent"], "--messages: got '{absent}' (No such file"),
    (["infill", "a [MASK]"], "TEMPLATE: got text for a checkpoint without tokenizer.json"),
    (["infill", "a", "b"], "arguments: got 'b' too many; allowed what the command takes; see 'djax infill --help'"),
    (["infill", "--token-ids", "@ids"], "--token-ids[0]: got no null"),
    (["infill", "--token-ids", "@nulls", "--mask-id", "155", "--recipe", "llada2"], "--recipe: got the cache"),
    (["infill", "--token-ids", "@nulls", "--top-k", "2.5"], "--top-k: got '2.5'"),
    (["convert", "@ids"], "DST: got nothing; allowed one value"),
    (["convert", "@ids", "@out"], "{ids}: is a file; give the directory"),
    (["convert", "djax:large", "@out"], "SRC: got 'djax:large'; allowed djax:base, djax:compressed"),
    (["convert", "djax:base", "@out", "--dtype", "int4"], "--dtype: got 'int4'"),
    (["convert", "djax:base", "@out", "--mesh", "tq"], "--mesh: got 'tq' for "),
    (["inspect"], "SRC: got nothing"),
    (["inspect", "@absent"], "{absent}: is no local directory"),
    (["plan", *PLAN], "--topology: got nothing"),
    (["plan", "llada-moe", "--topology", "v5e:3x5"], "--topology: got 'v5e:3x5', a slice that there is not; allowed"),
    (["plan", *PLAN, "--topology", "v5e:3x5"], "--topology: got 'v5e:3x5', a slice that there is not; allowed"),
    (["plan", *PLAN, "--topology", "v6e:2x8"], "--topology: got 'v6e:2x8', a slice that there is not; allowed"),
    (["plan", *PLAN, "--topology", "v5p:2x2x3"], "--topology: got 'v5p:2x2x3', a slice that there is not"),
    (["plan", *PLAN, "--topology", "h100:8"], "--topology: got 'h100:8'; allowed "),
    (["plan", *PLAN, "--topology", "h200:8", "--batch", "0"], "--batch: got 0; allowed an integer of at least 1"),
    (["plan", *PLAN, "--topology", "h200:8", "--batch", "x"], "--batch: got 'x'; allowed an integer"),
    (["plan", *PLAN, "--topology", "h200:8", "--block-length", "0"], "--block-length: got 0"),
    (["plan", *PLAN, "--topology", "h200:8", "--max-new-tokens", "9000"], "--max-new-tokens: got 9000 after a prompt"),
    (["plan", *PLAN, "--topology", "h200:8", "--tokens-per-forward", "nan"], "--tokens-per-forward: got nan"),
    (["plan", *PLAN, "--topology", "h200:8", "--mesh", "tensor=16"], "--mesh: got tensor=16, 16 devices; allowed 8"),
    (["plan", "absent", "--no-compile", "--topology", "h200:8"], "MODEL: got 'absent'; allowed llada-moe"),
    (["train"], "CONFIG.toml: got nothing"),
    (["train", "@absent"], "{absent}: got an error from the system (No such file"),
    (["train", "@no.toml"], "{no.toml}: got no TOML"),
    (["train", "@seed.toml"], "{seed.toml}: training.seed: got -1; allowed a number greater than or equal to 0"),
    (["train", "@steps.toml"], "{steps.toml}: training.steps: got 1.5; allowed a valid integer"),
    (["train", "@typo.toml"], "{typo.toml}: training.stepz: got a field that does not exist"),
    (["train", "@mesh.toml"], "{mesh.toml}: mesh: got data=4096"),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=[" ".join(command) for command, _ in COMMANDS])
def test_a_wrong_command_is_one_line(
    golden_lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], expected: str,
) -> None:
    def load(*given: Any, mask_id: int | None = None, **options: Any) -> Any:
        monkeypatch.setattr(golden_lm, "config", dataclasses.replace(golden_lm.config, mask_id=mask_id))
        return golden_lm

    assert cli_train.load is REAL_LOAD, "imported before it is replaced here"
    monkeypatch.setattr(api, "load", load)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    done = CliRunner().invoke(app, [str(tmp_path / word[1:]) if word.startswith("@") else word for word in command])
    for name in (*FILES, "absent"):
        expected = expected.replace("{" + name + "}", str(tmp_path / name))
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("djax: " + expected)
    assert ": got " not in done.stderr or re.search(": got .+; allowed .+; .+", done.stderr), done.stderr
