"""benchmarks/README.md lists every command once, and every listed command says what it takes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = re.findall(
    r"^\|[^|]+\| `python -m (benchmarks\.\w+)[^`|]*` \|", (BENCHMARKS / "README.md").read_text(encoding="utf-8"), re.M)


def test_the_index_has_every_command_once() -> None:
    modules = [path.stem for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
    folders = [path.parent.name for path in BENCHMARKS.glob("*/__main__.py")]
    assert sorted(COMMANDS) == sorted(f"benchmarks.{name}" for name in modules + folders)


def test_every_line_of_the_index_is_full() -> None:
    rows = re.findall(r"^\|.*`python -m benchmarks\.\w+[^`|]*`.*$", (BENCHMARKS / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == len(COMMANDS)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_index_runs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"usage: python -m {command} ")
