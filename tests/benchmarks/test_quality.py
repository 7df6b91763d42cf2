"""The quality benchmark: its figures are what they say, and a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import report as quality_report
from benchmarks.quality.__main__ import Case, Log, Outcome, batches, summarize
from djax import tasks

REFERENCE = Case("base", "reference", False)
FAST = Case("compressed", "dinfer", True)
SETTINGS = {"prompts": 4}


def outcome(exact: list[int], *, seconds: float, tokens: int, nfe: int) -> Outcome:
    flags = [bool(flag) for flag in exact]
    return Outcome(seconds=seconds, tokens=[tokens] * len(flags), nfe=[nfe] * len(flags), exact=flags,
                   final=[True] * len(flags))


def filled(path: Path) -> Log:
    log = Log(path, SETTINGS)
    log.add(REFERENCE.name, "sort", 0, outcome([1, 1, 1, 0], seconds=8.0, tokens=60, nfe=60))
    log.add(REFERENCE.name, "record", 0, outcome([1, 1], seconds=4.0, tokens=40, nfe=40))
    log.add(FAST.name, "sort", 0, outcome([1, 0, 1, 1], seconds=2.0, tokens=60, nfe=10))
    log.add(FAST.name, "record", 0, outcome([1, 0], seconds=2.0, tokens=40, nfe=10))
    return log


def test_a_row_of_the_table(tmp_path: Path) -> None:
    reference, fast = summarize([REFERENCE, FAST], filled(tmp_path / "log"))
    assert reference["accuracy"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    assert reference["standard_error"] == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 4 + 0) / 2)
    assert reference["difference"] == {"points": 0.0, "standard_error": 0.0}
    assert reference["speedup"] == {"median": 1.0, "minimum": 1.0, "maximum": 1.0}
    assert fast["accuracy"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
    assert fast["final"] == 100
    # sort: -1, 0, 0, +1; record: 0, -1
    assert fast["difference"]["points"] == pytest.approx(100 * (0 - 1 / 2) / 2)
    assert fast["difference"]["standard_error"] == pytest.approx(100 * np.sqrt(2 / 16 + (2 * 0.25) / 4) / 2)
    assert fast["speedup"] == {"median": 3.0, "minimum": 2.0, "maximum": 4.0}
    assert fast["tokens_per_forward"] == pytest.approx((4 * 60 + 2 * 40) / (6 * 10))
    assert fast["tokens_per_second"] == pytest.approx((4 * 60 + 2 * 40) / 4)
    assert fast["nfe"] == 10
    assert fast["prompts"] == 6
    assert fast["tasks"]["sort"] == {"accuracy": 75.0, "prompts": 4, "tokens_per_forward": 6.0}


def test_only_batches_that_every_row_has_are_compared(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    log.add(FAST.name, "sort", 1, outcome([0, 0, 0, 0], seconds=1.0, tokens=1, nfe=1))
    assert summarize([REFERENCE, FAST], log)[1]["prompts"] == 6
    alone = summarize([FAST], log)[0]
    assert alone["prompts"] == 10
    assert alone["difference"] is None, "not every batch has a reference"


def test_the_log_goes_on_after_a_kill_and_refuses_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "log"
    before = filled(path).outcomes
    with path.open("a") as file:
        file.write('{"case": "base/dinf')
    assert Log(path, SETTINGS).outcomes == before
    log = Log(path, SETTINGS)
    log.add(FAST.name, "sort", 1, outcome([1], seconds=1.0, tokens=1, nfe=1))
    assert len(Log(path, SETTINGS).outcomes) == len(before) + 1
    with pytest.raises(ValueError, match="holds outcomes of other settings"):
        Log(path, {"prompts": 5})


def test_batches_are_the_held_out_prompts_and_a_longer_run_begins_alike() -> None:
    got = list(batches(5, 2))
    assert [(name, number) for name, number, _ in got[:6]] == [
        *((name, 0) for name in tasks.TASKS), (next(iter(tasks.TASKS)), 1)]
    for name in tasks.TASKS:
        prompts = [example.prompt for task, _, examples in got if task == name for example in examples]
        assert len(prompts) == len(set(prompts)) == 5
        assert all(tasks.split_of(prompt) == "held_out" for prompt in prompts)
    assert [examples for *_, examples in got[:5]] == [examples for *_, examples in list(batches(9, 2))[:5]]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "3", "--batch", "2", "--recipes", "dinfer", "--output", str(tmp_path),
                 "--skip", "compressed/dinfer/no"]
    assert quality.main(arguments) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    assert [(row["checkpoint"], row["recipe"], row["cache"]) for row in record["rows"]] == [
        ("base", "dinfer", False), ("base", "dinfer", True), ("compressed", "dinfer", True)]
    for row in record["rows"]:
        assert row["prompts"] == 15
        assert 0 <= row["accuracy"] <= 100
        assert row["nfe"] >= 1
    table = (tmp_path / "quality.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| base | dinfer |") == 2
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "quality.svg").read_text()
    log = (tmp_path / "quality.log.jsonl").read_bytes()
    assert quality.main(arguments) == 0
    assert (tmp_path / "quality.log.jsonl").read_bytes() == log, "nothing was decoded again"
    assert (tmp_path / "quality.svg").read_text() == first
    with pytest.raises(SystemExit):
        quality.main([*arguments[:3], "1", *arguments[4:]])
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--prompts", "0"], ["--batch", "-1"], ["--recipes", "magic"],
                                       ["--skip", "base/", "compressed/"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        quality.main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_weights_digest_names_the_bundled_file() -> None:
    assert len(quality_report.digest("djax:base") or "") == 64
    assert quality_report.digest("/nowhere") is None
