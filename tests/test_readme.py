"""The READMEs run as printed: their Python, their commands, the flags of all others, their links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
import typer
from typer.testing import CliRunner

from djax.cli.app import app

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "djax/README.md", "djax/DEVICES.md", "djax/train/README.md", "djax/rl/README.md",
           "kernels_pallas/README.md", "convert/README.md", "benchmarks/README.md")
REPLACED = {"inclusionAI/LLaDA-MoE-7B-A1B-Instruct": "djax:base", "max_new_tokens=256": "max_new_tokens=64",
            "(8, 200, 256)": "(1, 20, 64)"}
"""Text of a snippet that a test cannot run, and what stands in for it."""
NOT_RUN = {"make_mesh({": "a mesh of eight devices", "from tunix": "an extra, tested in tests/rl/test_tunix.py"}
"""Words of snippets that are compiled but not run, and why."""
SLOW_COMMANDS = [
    'djax generate "What is 4827 + 1963?" "Sort these numbers: 74 64 76 88 72" --max-new-tokens 64 --json',
    'djax generate "What is 5+4-7+3+(7+3)?" --recipe fast_dllm --threshold 0.8 --temperature 0.7 --seed 1',
    'djax generate "What is 4827 + 1963?" --set strategy=local_leap:near=0.7 --set cache_policy.before=8',
    'djax infill "The capital of [MASK:2] is Paris."',
    "djax inspect djax:base",
]
"""Commands that are run. Others need a file, a checkpoint, hours or another machine; only their flags are read."""


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """The words of every `djax ...` and `python -m ...`, in shell blocks and between backticks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = "\n".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`((?:djax|python -m) [^`\n]+)`", prose)
    found = []
    for line in lines:
        match = re.search(
            r"(?:^|[\s'&])((?:djax (?:generate|infill|convert|train|inspect|plan|parts)|python -m) ?.*)", line)
        if match:
            found.append(shlex.split(match[1].replace("'", ""), comments=True))
    return found


def test_the_shell_blocks_hold_commands() -> None:
    assert sum(len(commands(name)) for name in READMES) > 25


@pytest.mark.parametrize("name", READMES)
def test_flags_and_modules_exist(name: str) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(name):
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "djax":
            options = group.commands[words[1]].params
            known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
            assert flags <= known | {"--help"}, words
        elif words[2] != "pytest":
            spec = importlib.util.find_spec(words[2])
            assert spec is not None, words
            assert spec.origin is not None
            main = Path(spec.origin).with_name("__main__.py") if spec.submodule_search_locations else Path(spec.origin)
            shared = ROOT / "benchmarks" / "harness" / "command.py"
            sources = "".join(path.read_text(encoding="utf-8") for path in (main, shared))
            assert all(f'"{flag}"' in sources for flag in flags), words


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_decoder_of_ones_own_is_a_part() -> None:
    """All of the snippet but its last line, which generates."""
    snippet, _, last = blocks("README.md", "python")[1].rstrip().rpartition("\n")
    assert "generate" in last
    assert "check_part" in snippet
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", READMES)
def test_python_runs_as_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for snippet in blocks(name, "python"):
        for text, instead in REPLACED.items():
            snippet = snippet.replace(text, instead)
        code = compile(snippet, name, "exec")
        if not any(word in snippet for word in NOT_RUN):
            exec(code, namespace)
    if name == "README.md":
        assert "answer: 6790" in capsys.readouterr().out
        counted: list[str] = []

        def listen(event: str, _: float, **__: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                counted.append(event)

        again = [line for line in blocks(name, "python")[0].splitlines() if "# no compiling" in line]
        assert len(again) == 1
        jax.monitoring.register_event_duration_secs_listener(listen)
        exec(again[0].replace("0.7", "0.65"), namespace)
        jax.monitoring.unregister_event_duration_listener(listen)
        assert counted == []


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW_COMMANDS)
def test_commands_run_as_printed(command: str) -> None:
    assert command in "\n".join(blocks("README.md", "sh"))
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
