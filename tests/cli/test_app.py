"""The command line: what it prints, that every recipe and part is reachable, and one line for wrong input."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import djax
from djax import api, assets, recipes
from djax.api import DiffusionLM
from djax.cli.app import app
from djax.cli.flags import RecipeFlags
from djax.cli.inputs import read_template
from djax.cli.live import printable
from djax.cli.recipe import build_recipe
from djax.parts.cache_policies import Dual, NoCache, Prefix, Vicinity, WithWarmup
from djax.parts.schedules import Linear
from djax.parts.smoothing import HardTokens, SoftTokens
from djax.parts.strategies import Hierarchical, LocalLeap, Quota, RandomOrder, Remasking, Threshold
from djax.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SMALL = ["--max-new-tokens", "8", "--block-length", "4", "--recipe", "llada", "--dtype", "float32"]
QUESTIONS = ("Add 4827 and 10963.", "Sort these numbers: 42 7 19 30")
"""What the bundled model answers with more than eight tokens."""
REAL_LOAD = api.load


@functools.cache
def model() -> DiffusionLM:
    return REAL_LOAD(None, dtype="float32")


@pytest.fixture(autouse=True)
def shared_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands on the bundled model share one `DiffusionLM`, so that equal shapes compile once."""

    def load(source: Any = None, *, dtype: str | None = None, mesh: Any = None, mask_id: int | None = None,
             eos_id: int | None = None, progress: Any = None) -> DiffusionLM:
        if source is None and dtype == "float32" and mesh is None and mask_id is None and eos_id is None:
            return model()
        return REAL_LOAD(source, dtype=dtype, mesh=mesh, mask_id=mask_id, eos_id=eos_id, progress=progress)

    monkeypatch.setattr(api, "load", load)


def invoke(*arguments: str, input: str | bytes = "") -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def run_json(*arguments: str, input: str | bytes = "") -> list[dict[str, Any]]:
    full = "--json" if arguments[0] == "inspect" else "--json-full"
    result = invoke(*arguments, full, input=input)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def written(directory: Path, value: Any) -> str:
    file = directory / "input.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(file)


# What it prints.


def test_json_equals_the_api() -> None:
    got = run_json("generate", *QUESTIONS, *SMALL)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    expected = model().generate(chats, recipe=recipes.llada(), max_new_tokens=8, block_length=4)
    assert len(got) == 2
    for row, line in enumerate(got):
        assert line["index"] == row
        assert line["text"] == (expected.text or [])[row]
        assert line["tokens"] == expected.tokens[row].tolist()
        assert line["length"] == len(line["tokens"])
        assert line["nfe"] == expected.nfe[row]
        assert line["tokens_per_forward"] == pytest.approx(expected.tokens_per_forward[row])
        assert line["stop_reason"] == expected.stop_reason[row]
        assert line["masked_left"] == 0
        assert [line["canvas"][position] for position in line["positions"]][: line["length"]] == line["tokens"]
        assert len(line["positions"]) == len(line["commit_step"]) == len(line["log_prob"]) == 8
        assert set(line["commit_step"]) <= set(range(line["nfe"]))
        assert all(value <= 0 for value in line["log_prob"])


@pytest.mark.slow
def test_plain_output_is_the_text() -> None:
    result = invoke("generate", "hi", *SMALL)
    assert result.exit_code == 0, result.output
    text = run_json("generate", "hi", *SMALL)[0]["text"]
    assert result.stdout == text + "\n"
    assert result.stderr == ""


@pytest.mark.slow
def test_sources_of_prompts_agree(tmp_path: Path) -> None:
    """Argument, standard input, messages and token ids of the same chat are the same prompt."""
    tokenizer = model().tokenizer
    assert tokenizer is not None
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.chat_text(chat)
    expected = run_json("generate", "hi", *SMALL)
    assert expected[0]["canvas"][:-8] == tokenizer.encode(text, allow_special_tokens=True)
    assert run_json("generate", *SMALL, input="hi\n") == expected
    assert run_json("generate", "-", *SMALL, input="hi") == expected
    assert run_json("generate", text, "--raw", "--allow-special-tokens", *SMALL) == expected
    assert run_json("generate", text, "--raw", *SMALL) != expected, "control tokens in a prompt are text"
    for value in (chat, [chat], {"messages": chat}):
        assert run_json("generate", "--messages", written(tmp_path, value), *SMALL) == expected
    assert run_json("generate", "--messages", "-", *SMALL, input=json.dumps(chat)) == expected
    whole = tokenizer.encode(text, allow_special_tokens=True)
    for ids in (whole, [whole]):
        assert run_json("generate", "--token-ids", written(tmp_path, ids), *SMALL) == expected


@pytest.mark.slow
def test_seed_decides_the_sample() -> None:
    hot = [*SMALL, "--temperature", "1.5"]
    first = run_json("generate", "hi", *hot, "--seed", "1")
    assert run_json("generate", "hi", *hot, "--seed", "1") == first
    assert any(run_json("generate", "hi", *hot, "--seed", str(seed)) != first for seed in range(2, 5))


def test_flags_reach_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Stop(ValueError):
        pass

    def generate(prompts: Any, **arguments: Any) -> None:
        seen.update(arguments, prompts=prompts)
        raise Stop("stop here")

    monkeypatch.setattr(model(), "generate", generate)
    result = invoke("generate", "hi", "--dtype", "float32", "--max-new-tokens", "7", "--block-length", "3",
                    "--temperature", "0.5", "--top-k", "4", "--top-p", "0.9", "--min-p", "0.1", "--guidance", "1.5",
                    "--seed", "9", "--no-stop", "--align", "--recipe", "llada", "--steps", "2")
    assert (result.exit_code, result.stderr) == (2, "djax: stop here\n")
    assert callable(seen.pop("watch"))
    assert seen == {
        "prompts": [[{"role": "user", "content": "hi"}]], "recipe": recipes.llada(steps_per_block=2),
        "max_new_tokens": 7, "block_length": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1,
        "guidance": 1.5, "key": 9, "stop_on_eos": False, "align": True, "allow_special_tokens": False}


def test_flags_reach_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(source: Any, **arguments: Any) -> DiffusionLM:
        seen.update(arguments, source=source)
        return model()

    monkeypatch.setattr(api, "load", load)
    run_json("generate", "hi", *SMALL, "--model", "owner/name", "--eos-id", "4", "--mask-id", "3")
    assert seen.pop("progress") is None, "no progress bar unless standard error is a terminal"
    assert seen == {"source": "owner/name", "dtype": "float32", "mesh": None, "mask_id": 3, "eos_id": 4}


@pytest.mark.slow
def test_infill_text(tmp_path: Path) -> None:
    tokenizer = model().tokenizer
    assert tokenizer is not None
    small = ["--block-length", "4", "--recipe", "llada", "--dtype", "float32"]
    line = run_json("infill", "The [MASK:3] fox [MASK] end.", *small)[0]
    head, middle, tail = (tokenizer.encode(text) for text in ("The ", " fox ", " end."))
    assert line["tokens"][: len(head)] == head
    assert line["tokens"][-len(tail):] == tail
    assert line["tokens"][len(head) + 3:][: len(middle)] == middle
    assert line["positions"] == [*range(len(head), len(head) + 3), len(head) + 3 + len(middle)]
    assert model().config.mask_id not in line["tokens"]
    plain = invoke("infill", *small, input="The [MASK:3] fox [MASK] end.\n")
    assert plain.stdout == line["text"] + "\n"
    ids: list[Any] = list(line["tokens"])
    for position in line["positions"]:
        ids[position] = None
    assert run_json("infill", "--token-ids", written(tmp_path, ids), *small) == [line]


def test_template_without_text_around() -> None:
    assert read_template("[MASK:2]", model().tokenizer, mask_id=9) == ([9, 9], [True, True])
    ids, mask = read_template("a[MASK][MASK:2]", model().tokenizer, mask_id=9)
    assert ids[-3:] == [9, 9, 9]
    assert mask == [False] * (len(ids) - 3) + [True] * 3


def test_a_literal_mask_in_the_text_is_not_a_position_to_fill() -> None:
    mask_id = model().config.mask_id
    assert mask_id is not None
    ids, mask = read_template("<|mask|> x [MASK]", model().tokenizer, mask_id=mask_id)
    assert ids[-1] == mask_id
    assert mask_id not in ids[:-1], "it is the text that it looks like"
    assert [mask[0], mask[-1]] == [False, True]


def test_inspect(tmp_path: Path) -> None:
    line = run_json("inspect", str(assets.path()))[0]
    assert line["format"] == "huggingface"
    assert line["parameter_count"] * 2 == line["bytes"] == line["bytes_per_dtype"]["bfloat16"] == 4041472
    assert line["config"] == dataclasses.asdict(model().config) | {"dtype": "bfloat16", "other_eos_ids": []}
    by_name = {parameter["name"]: parameter for parameter in line["parameters"]}
    assert by_name["layers.1.moe.gate"]["keys"] == [
        f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in range(8)]
    assert by_name["embed"]["shape"] == [704, 128]
    text = invoke("inspect", str(assets.path())).stdout
    assert "parameters: 2,020,736" in text
    assert "embed [704 vocab, 128 embed] <- model.embed_tokens.weight" in text
    assert "4 x layers.*.moe.down" in text
    assert "<- 32 x model.layers.*.mlp.experts.*.down_proj.weight" in text
    assert text.endswith("ignored keys: none\n")


def test_bundled_checkpoints_have_names(tmp_path: Path) -> None:
    for name in assets.NAMES:
        assert run_json("inspect", f"djax:{name}")[0]["directory"] == str(assets.path(name))
    assert invoke("convert", "djax:base", str(tmp_path / "out")).exit_code == 0
    line = one_line(invoke("inspect", "djax:huge"))
    assert "SRC: got 'djax:huge'; allowed djax:base, djax:compressed" in line


def test_convert_then_inspect_and_generate(tmp_path: Path) -> None:
    target = tmp_path / "converted"
    result = invoke("convert", str(assets.path()), str(target), "--dtype", "float32")
    assert (result.exit_code, result.stdout) == (0, f"{target}\n"), result.output
    line = run_json("inspect", str(target))[0]
    assert line["format"] == "djax"
    assert line["parameter_count"] == 2020736
    assert line["bytes_per_dtype"] == {"float32": 4 * 2020736}
    again = invoke("convert", str(assets.path()), str(target))
    assert again.exit_code == 2
    assert one_line(again)
    assert invoke("convert", str(assets.path()), str(target), "--dtype", "float32", "--force").exit_code == 0
    loaded = api.load(str(target)).params
    jax.tree.map(np.testing.assert_array_equal, loaded, model().params)


def test_version_and_bare_call() -> None:
    assert invoke("--version").stdout == f"djax {djax.__version__}\n"
    bare = invoke()
    assert bare.exit_code == 0
    assert "generate" in bare.stdout


@pytest.mark.parametrize("command", [(), ("generate",), ("infill",), ("convert",), ("inspect",), ("parts",)])
def test_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_help_and_wrong_flags_import_no_jax() -> None:
    code = """
import sys
from djax.cli.app import app
for arguments in (["--help"], ["generate", "--help"], ["parts", "--help"], ["generate", "hi", "--top-p", "7"],
                  ["generate", "hi", "--no-such-flag"], ["generate", "hi", "--max-new-tokens", "0"]):
    try:
        app(arguments)
    except SystemExit:
        pass
heavy = [name for name in ("jax", "flax", "transformers", "torch", "orbax") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-200:]


# Every recipe and part is reachable.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_as_published(name: str) -> None:
    assert build_recipe(RecipeFlags(recipe=name)) == getattr(recipes, name)()
    assert build_recipe(RecipeFlags(recipe=name.replace("_", "-"))) == getattr(recipes, name)()


def test_every_recipe_has_a_name() -> None:
    functions = {name for name, value in vars(recipes).items()
                 if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Recipe"}
    assert functions - {"default_for"} == set(RECIPES)


FALLING = Linear(1.0, -0.02, minimum=0.7)


@pytest.mark.parametrize(("flags", "axis", "expected"), [
    ({"threshold": 0.7}, "strategy", Threshold(FALLING)),
    ({"threshold": 0.7, "smoothing": 0.0}, "strategy", Threshold(0.7)),
    ({"strategy": "quota"}, "strategy", Quota()),
    ({"strategy": "quota", "steps": 5}, "strategy", Quota(5)),
    ({"recipe": "llada", "steps": 5}, "strategy", Quota(5)),
    ({"strategy": "hierarchical"}, "strategy", Hierarchical()),
    ({"strategy": "local_leap"}, "strategy", LocalLeap()),
    ({"strategy": "Local-Leap"}, "strategy", LocalLeap()),
    ({"recipe": "llada", "strategy": "threshold", "threshold": 0.7}, "strategy", Threshold(0.7)),
    ({"recipe": "llada", "strategy": "threshold"}, "strategy", Threshold(0.9)),
    ({"recipe": "llada", "set": ["strategy=random_order", "strategy.steps=4"]}, "strategy",
     RandomOrder(Quota(4))),
    ({"strategy": "remasking", "threshold": 0.4}, "strategy", Remasking(recipes.dinfer().strategy, 0.4)),
    ({"recipe": "fast_dllm"}, "strategy", Threshold(0.9)),
    ({"cache": "none"}, "cache_policy", NoCache()),
    ({"cache": "prefix"}, "cache_policy", Prefix()),
    ({"recipe": "fast_dllm", "cache": "prefix"}, "cache_policy", Prefix()),
    ({"cache": "vicinity"}, "cache_policy", Vicinity()),
    ({"cache": "vicinity", "set": ["cache_policy=with_warmup:steps=2"]}, "cache_policy", WithWarmup(Vicinity(), 2)),
    ({"smoothing": 0.0}, "smoothing", HardTokens()),
    ({"recipe": "llada", "smoothing": 0.0}, "smoothing", HardTokens()),
    ({"smoothing": 0.2}, "smoothing", SoftTokens(Linear(0.15, 0.02, maximum=0.2))),
])
def test_parts(flags: dict[str, Any], axis: str, expected: Any) -> None:
    assert getattr(build_recipe(RecipeFlags(**flags)), axis) == expected


def test_parts_leave_the_others_alone() -> None:
    changed = build_recipe(RecipeFlags(recipe="dinfer_credit", cache="dual"))
    assert changed == dataclasses.replace(recipes.dinfer_credit(), cache_policy=Dual())


# Wrong input: one line, exit code 2, no traceback.


def one_line(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("djax: ")
    assert "Traceback" not in lines[0]
    assert len(lines[0]) < 700
    return lines[0]


FLAGS: list[tuple[list[str], str]] = [
    (["--threshold", "1.5"], "--threshold: got 1.5; allowed a finite number of at least 0 and at most 1"),
    (["--threshold", "nan"], "--threshold: got nan"),
    (["--threshold", "abc"], "--threshold: got 'abc'; allowed a number"),
    (["--threshold"], "--threshold: got "),
    (["--treshold", "0.5"], "--treshold: got an option that does not exist; .* did you mean .*--threshold"),
    (["--recipe", "dinfre"], "--recipe: got 'dinfre'; allowed llada, fast_dllm, dinfer, dinfer_credit"),
    (["--recipe", "dinfre"], "--recipe: got 'dinfre'; .*; did you mean dinfer"),
    (["--strategy", "greedy"], "--strategy: got 'greedy'; allowed factor, hierarchical, local_leap, quota"),
    (["--strategy", "local_lap"], "--strategy: got 'local_lap'; .*; did you mean local_leap"),
    (["--cache", "full"], "--cache: got 'full'; allowed none, block_causal, dual, "),
    (["--strategy", "factor"], "--set strategy=factor:factor: got nothing; allowed a number; give it: --set strategy="),
    (["--steps", "3"], "--steps: got 3 with strategy threshold; allowed with a strategy that has steps"),
    (["--recipe", "llada", "--steps", "0"], "--steps: got 0; allowed an integer of at least 1"),
    (["--recipe", "llada", "--steps", "99999999999"], "--steps: got 99999999999"),
    (["--recipe", "llada", "--threshold", "0.5"], "--threshold: got 0.5 with strategy quota"),
    (["--strategy", "quota", "--threshold", "0.5"], "--set strategy=quota:threshold: got 'threshold'; allowed steps"),
    (["--recipe", "llada", "--strategy", "threshold", "--threshold", "7"],
     "--set strategy=threshold:threshold: got 7.0; allowed a finite"),
    (["--smoothing", "2"], "--smoothing: got 2.0"),
    (["--steps", "2", "--recipe", "llada", "--strategy", "threshold"], "--set strategy=threshold:steps: got 'steps'"),
    (["--recipe", "llada", "--steps", "2", "--set", "strategy=quota"], "--steps: got 2, a parameter of a part that"),
    (["--recipe", "llada", "--smoothing", "2"], "--smoothing: got 2.0; allowed a finite number of at least 0"),
    (["--temperature", "-1"], "--temperature: got -1.0"),
    (["--temperature", "inf"], "--temperature: got inf"),
    (["--top-k", "0"], "--top-k: got 0; allowed an integer of at least 1"),
    (["--top-k", "2.5"], "--top-k: got '2.5'; allowed an integer"),
    (["--top-p", "1.5"], "--top-p: got 1.5"),
    (["--top-p", "0", *SMALL], "--top-p: got 0.0"),
    (["--min-p", "-0.1"], "--min-p: got -0.1"),
    (["--guidance", "nan"], "--guidance: got nan"),
    (["--max-new-tokens", "0"], "--max-new-tokens: got 0"),
    (["--max-new-tokens", "100000", "--dtype", "float32"], "--max-new-tokens: got 100000 after a prompt"),
    (["--block-length", "0"], "--block-length: got 0"),
    (["--seed", "-1"], "--seed: got -1; allowed an integer from 0 to 9223372036854775807"),
    (["--dtype", "int8"], "--dtype: got 'int8'; allowed bfloat16, float16, float32"),
    (["--mask-id", "9999"], "--mask-id: got 9999"),
    (["--eos-id", "-4"], "--eos-id: got -4"),
    (["--live"], "--live: got it with an output that is not a terminal"),
    (["--live", "--json"], "--live: got it with --json"),
    (["--model", "no/such/place"], "no/such/place: .*no local directory"),
    (["--model", "a\nb\x1b[2J"], r"a b .*no local directory"),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=[" ".join(map(repr, flags)) for flags, _ in FLAGS])
def test_wrong_flags(flags: list[str], expected: str) -> None:
    line = one_line(invoke("generate", "hi", *flags))
    assert_matches(line, expected)


def assert_matches(line: str, expected: str) -> None:
    pattern = expected if ".*" in expected else re.escape(expected)
    assert re.match("djax: " + pattern, line), line
    assert re.search(": got .*; allowed .*; .|no local directory", line), line


CONTENT: list[tuple[list[str], Any, str]] = [
    (["generate", "--messages"], "{oops", "which is not JSON"),
    (["generate", "--messages"], "[" * 100_000, "which is not JSON"),
    (["generate", "--messages"], [], "--messages: got []"),
    (["generate", "--messages"], 3, "--messages: got 3"),
    (["generate", "--messages"], [{"role": "robot", "content": "x"}], "--messages[0].role: got 'robot'"),
    (["generate", "--messages"], [{"role": "user"}], "--messages[0].content: got nothing"),
    (["generate", "--messages"], [[{"role": "user", "content": "x"}], []], "--messages[1]: got an empty list"),
    (["generate", "--messages"], ["hi"], "--messages[0]: got 'hi'"),
    (["generate", "--raw", "--messages"], [{"role": "user", "content": "x"}], "--raw: got it with --messages"),
    (["generate", "hi", "--messages"], [], "--messages: got PROMPT and --messages together"),
    (["generate", "--token-ids"], ["a"], "--token-ids[0]: got 'a'"),
    (["generate", "--token-ids"], [1, 2.5], "--token-ids[1]: got 2.5"),
    (["generate", "--token-ids"], [1, True], "--token-ids[1]: got True"),
    (["generate", "--token-ids"], [1, -1], "--token-ids[1]: got -1"),
    (["generate", "--token-ids"], [[1], [2, None]], "--token-ids[1][1]: got None"),
    (["generate", "--token-ids"], [[1], 2], "--token-ids[1]: got 2"),
    (["generate", "--token-ids"], [[]], "--token-ids[0]: got []"),
    (["generate", "--token-ids"], {"ids": [1]}, "--token-ids: got {'ids': [1]}"),
    (["generate", *SMALL, "--token-ids"], [1, 704], "--token-ids[0]: got token id 704"),
    (["infill", "--dtype", "float32", "--token-ids"], [1, 2], "--token-ids[0]: got no null"),
    (["infill", "--dtype", "float32", "--token-ids"], [1, "x", None], "--token-ids[1]: got 'x'"),
    (["infill", "--dtype", "float32", "--token-ids"], [None, 704], "--token-ids[0]: got token id 704"),
    (["infill", "x [MASK]", "--token-ids"], [None], "--token-ids: got TEMPLATE and --token-ids together"),
]


@pytest.mark.parametrize(("arguments", "content", "expected"), CONTENT)
def test_wrong_files(tmp_path: Path, arguments: list[str], content: Any, expected: str) -> None:
    line = one_line(invoke(*arguments, written(tmp_path, content)))
    assert expected in line
    assert "; allowed " in line


@pytest.mark.parametrize(("arguments", "input", "expected"), [
    (["generate"], "", "PROMPT: got an empty text"),
    (["generate", "  "], "", "PROMPT: got an empty text"),
    (["generate"], b"\xff\xfe", "PROMPT: got standard input with a byte that is not UTF-8"),
    (["generate", "--messages", "-"], "nope", "--messages: got standard input, which is not JSON"),
    (["generate", "--messages", "no-such-file.json"], "", "--messages: got 'no-such-file.json' (No such file"),
    (["generate", "--token-ids", "."], "", "--token-ids: got '.' (Is a directory)"),
    (["infill", "--dtype", "float32"], "plain", "TEMPLATE: got 'plain' without a placeholder"),
    (["infill", "a [MASK:0]", "--dtype", "float32"], "", "TEMPLATE: got '[MASK:0]'"),
    (["infill", "a [MASK:x]", "--dtype", "float32"], "", "TEMPLATE: got '[MASK:x]'"),
    (["infill", "a [MASK:99999999999999]", "--dtype", "float32"], "", "TEMPLATE: got '[MASK:99999999999999]'"),
    (["infill", "a", "b"], "", "arguments: got 'b' too many"),
    (["genrate", "hi"], "", "COMMAND: got 'genrate'; allowed generate, infill, convert, train, plan, parts, inspect"),
    (["convert", "somewhere"], "", "DST: got nothing"),
    (["convert", "a", "b", "--dtype", "int4"], "", "--dtype: got 'int4'"),
])
def test_wrong_calls(arguments: list[str], input: str | bytes, expected: str) -> None:
    line = one_line(invoke(*arguments, input=input))
    assert expected in line
    assert "; allowed " in line


@pytest.mark.parametrize("command", [["inspect"], ["convert"], ["generate", "hi", "--model"]])
@pytest.mark.parametrize("damage", ["empty", "no weights", "bad config", "lfs pointer"])
def test_damaged_checkpoints(tmp_path: Path, command: list[str], damage: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if damage != "empty":
        config = (assets.path() / "config.json").read_text()
        (source / "config.json").write_text("{" if damage == "bad config" else config)
    if damage == "lfs pointer":
        (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    extra = [str(tmp_path / "out")] if command == ["convert"] else []
    line = one_line(invoke(*command, str(source), *extra))
    assert "source" in line
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback() -> None:
    result = invoke("--debug", "generate", "hi", "--top-p", "7")
    assert isinstance(result.exception, ValueError)
    after_dashes = invoke("generate", "--top-p", "7", "--", "--debug")
    assert "--top-p: got 7.0" in one_line(after_dashes)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(prompts: Any, **arguments: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(model(), "generate", broken)
    assert isinstance(invoke("generate", "hi", *SMALL).exception, AttributeError)


def test_interrupt_and_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> None:
        def generate(prompts: Any, **arguments: Any) -> None:
            raise error

        monkeypatch.setattr(model(), "generate", generate)

    raising(KeyboardInterrupt())
    assert invoke("generate", "hi", *SMALL).exit_code == 130
    raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 byte"))
    result = invoke("generate", "hi", *SMALL)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "device memory" in result.stderr


# As a process.


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "djax.cli", *arguments], cwd=ROOT, capture_output=True, check=False,
                          **options)


def test_a_wrong_flag_as_a_process() -> None:
    done = process("generate", "hi", "--threshold", "7")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        "djax: --threshold: got 7.0; allowed a finite number of at least 0 and at most 1; change it"]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "djax.cli", "inspect", str(assets.path()), "--json"], cwd=ROOT,
                              stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
def test_live_view_on_a_terminal() -> None:
    """A real terminal: masks are drawn, the view goes away, the text and a summary stay."""
    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "djax.cli", "generate", QUESTIONS[0], *SMALL], cwd=ROOT,
        stdin=worker, stdout=worker, stderr=worker,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"})
    os.close(worker)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # how Linux reports that the other end of a terminal is closed
        pass
    finally:
        os.close(main)
    assert child.wait(timeout=60) == 0, output[-500:]
    shown = output.decode()
    assert "compiling" in shown
    assert "░░░" in shown
    final, status = [line for line in shown.split("\x1b[2K")[-1].split("\r\n") if line][-2:]
    expected = model().generate([[{"role": "user", "content": QUESTIONS[0]}]], recipe=recipes.llada(),
                                max_new_tokens=8, block_length=4)
    assert printable((expected.text or [""])[0]).splitlines()[-1].strip() in final
    assert status.startswith("block 2/2  step 8  NFE 8  1.00 tokens/forward")
    assert np.all(expected.nfe == 8)
