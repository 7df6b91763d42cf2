from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convert
from convert import __main__ as command
from tests.support import builders

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return builders.write(tmp_path / "source", builders.tensors())


def run(*arguments: str) -> tuple[int, str, str]:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(app, list(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)
    return result.exit_code, result.stdout, result.stderr


def test_the_command(source: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "convert", str(source), str(tmp_path / "model"), "--dtype", "bfloat16"],
        capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path / 'model'}\n", "")
    assert convert.load_params(tmp_path / "model")[0].dtype == "bfloat16"


def test_force(source: Path, tmp_path: Path) -> None:
    arguments = (str(source), str(tmp_path / "model"))
    assert run(*arguments)[0] == 0
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert "--force" in error
    assert run(*arguments, "--force", "--dtype", "float16")[0] == 0
    assert convert.load_params(tmp_path / "model")[0].dtype == "float16"


@pytest.mark.parametrize("arguments", [("--dtype", "int8"), ("--dtype", "")])
def test_a_wrong_dtype_is_one_line(arguments: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    code, _, error = run(str(source), str(tmp_path / "model"), *arguments)
    assert code == 2
    assert error.startswith("error: dtype: got")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


def test_a_broken_source_is_one_line(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    code, _, error = run(str(source), str(tmp_path / "model"))
    assert code == 2
    assert error.startswith(f"error: {source / 'model.safetensors'}: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.slow
def test_a_terminated_run_cleans_up(source: Path, tmp_path: Path) -> None:
    # The parameters are written and the manifest is not: that is where the run is held.
    code = """
import sys, time
import convert.checkpoint, convert.__main__ as command, typer
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
convert.checkpoint._manifest = slow
sys.argv = ["convert", *sys.argv[1:]]
typer.run(command.main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tmp_path / "model")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 2  # the source and a hidden directory
    started = time.monotonic()
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - started < 30
    assert process.returncode == 130
    assert error == "error: interrupted; the destination is unchanged\n"
    assert os.listdir(tmp_path) == ["source"]
