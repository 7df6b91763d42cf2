"""`--mesh` and `--distributed`: what the commands print on eight fake devices and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from djax.cli.app import app
from tests.cli.test_app import one_line
from tests.conftest import EIGHT_DEVICES, GOLDENS
from tests.devices.test_distributed import free_port, start

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
MODEL = ["--model", str(GOLDENS), "--dtype", "float32", "--mask-id", "150", "--block-length", "8", "--json-full"]
GENERATE = [*MODEL, "--recipe", "fast_dllm", "--threshold", "0.02", "--max-new-tokens", "8"]


def invoke(*arguments: str, input: str = "") -> Any:
    return CliRunner().invoke(app, list(arguments), input=input)


@pytest.fixture(scope="module")
def on_one_device() -> list[dict[str, Any]]:
    return parsed(invoke("generate", "--token-ids", "-", *GENERATE, input=json.dumps(PROMPTS)).stdout)


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    names = ("index", "tokens", "nfe", "commit_step", "canvas", "stop_reason")
    return [[row[name] for name in names] for row in got] == [[row[name] for name in names] for row in expected]


ON_EIGHT_DEVICES = """
    import json, sys
    from typer.testing import CliRunner
    from djax.cli.app import app

    results = []
    for arguments, text in json.loads(sys.argv[1]):
        got = CliRunner().invoke(app, arguments, input=text)
        results.append([got.exit_code, got.stdout, got.stderr])
    print(json.dumps(results))
"""

WRONG = [
    ("tensor=16", "--mesh: got tensor=16, 16 devices; allowed 1 to 8, the devices here; use a smaller mesh"),
    ("tensor=x", "--mesh: got 'tensor=x'; allowed a list of different axes"),
    ("rows=8", "--mesh: got an axis 'rows'; allowed "),
    ("tq", "--mesh: got 'tq' for 8 devices; allowed single, tp, ep, "),
    ("single", "--mesh: got 'single' for 8 devices; allowed single"),
    ("tensor=3", "embed: got axis 'vocab' of size 160, which cannot be split evenly over 3 devices"),
]


@pytest.mark.slow
def test_eight_devices_print_what_one_does(on_one_device, tmp_path):
    prompts = json.dumps(PROMPTS)
    infill = ["infill", "--token-ids", "-", *MODEL, "--recipe", "llada"]
    masked = json.dumps([5, None, 7, None, None, 9])
    target = tmp_path / "converted"
    calls = [
        (["generate", "--token-ids", "-", *GENERATE, "--mesh", "tensor=4,expert=2"], prompts),
        ([*infill, "--mesh", "tp_ep"], masked),
        (["convert", str(GOLDENS), str(target), "--mesh", "expert=4,tensor=2"], ""),
        *[(["generate", "--token-ids", "-", *GENERATE, "--mesh", mesh], prompts) for mesh, _ in WRONG]]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_EIGHT_DEVICES), json.dumps(calls)], cwd=ROOT, capture_output=True,
        text=True, check=False, env={
            **os.environ, "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": EIGHT_DEVICES})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for code, _, error in results[:3]:
        assert code == 0, error
    assert same(parsed(results[0][1]), on_one_device)
    assert same(parsed(results[1][1]), parsed(invoke(*infill, input=masked).stdout))
    assert results[2][1].strip() == str(target)
    for (code, out, error), (_, expected) in zip(results[3:], WRONG, strict=True):
        assert (code, out) == (2, "")
        assert len(error.splitlines()) == 1
        assert error.startswith("djax: " + expected), error


@pytest.mark.slow
def test_two_processes_print_once(on_one_device, tmp_path):
    """The first one reads its standard input, where the other has none, and prints; both succeed."""
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    running = []
    for process in (0, 1):
        # the file is there for the first process only
        source = str(tmp_path / ("prompts.json" if process == 0 else "none.json"))
        running.append(start(
            ["-m", "djax.cli", "generate", "--token-ids", source, *GENERATE, "--mesh", "tp",
             "--distributed", f"{address},2,{process}"]))
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert same(parsed(outputs[0][0]), on_one_device)
    assert parsed(outputs[1][0]) == []


@pytest.mark.slow
def test_wrong_prompts_end_both_processes(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    running = [start(["-m", "djax.cli", "generate", "--token-ids", str(tmp_path / "none.json"), *GENERATE, "--mesh",
                      "tp", "--distributed", f"{address},2,{process}"]) for process in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [2, 2]
    lines = [error.splitlines()[-1] for _, error in outputs]
    assert lines[0].startswith("djax: --token-ids: got ")
    assert lines[1].startswith("djax: process 0 of 2: --token-ids: got ")


@pytest.mark.parametrize(("flags", "expected"), [
    (["--distributed", "auto"], "--mesh: got nothing with --distributed; allowed a mesh of all processes' devices"),
    (["--distributed", "host", "--mesh", "tp"], "--distributed: got 'host'; allowed auto"),
    (["--distributed", "host:1,2", "--mesh", "tp"], "--distributed: got 'host:1,2'; allowed auto"),
    (["--distributed", "auto", "--mesh", "tp", "--live"], "--live: got it with --distributed; allowed one of them"),
    (["--mesh", "tensor=2"], "--mesh: got tensor=2, 2 devices; allowed 1 to 1, the devices here"),
])
def test_wrong_flags(flags, expected):
    assert one_line(invoke("generate", "hi", *flags)).startswith("djax: " + expected)
