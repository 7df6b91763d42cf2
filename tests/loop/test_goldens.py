"""Every recorded dInfer trace, token for token and forward for forward."""

from __future__ import annotations

import json

import pytest

import djax
from tests.conftest import GOLDENS
from tests.replay_goldens import main, read_cases, replay

CASES = read_cases(GOLDENS)


def _program(case):
    """Cases that run the same compiled program, whatever their decoder: they are replayed together."""
    return "-".join(str(case[name]) for name in ("algo", "cache", "block_length", "before", "align"))


PROGRAMS = sorted({_program(case) for case in CASES})
QUICK = [
    "blockwise-none-32-0-True", "blockwise-prefix-8-0-False", "itersmooth_vicinity-dual-8-4-False"]
"""Every decoder and cache, smoothing and vicinity, both block lengths, with and without aligned blocks."""


@pytest.mark.parametrize("program", [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PROGRAMS])
def test_tokens_and_nfe_equal_dinfer(golden_lm, program):
    problems = {}
    for number, case in enumerate(CASES, start=1):
        if _program(case) == program and (problem := replay(golden_lm, case)) is not None:
            problems[number] = problem
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "first"), [
    (djax.Kernels(moe="reference", attention="reference", unembed="reference"), 0),
    (djax.Kernels(moe="xla_dense", attention="xla", unembed="xla_stream"), 3),
], ids=["references", "xla"])
def test_every_implementation_reproduces_them(kernels, first):
    """Every sixth program; `python -m tests.replay_goldens --kernels` replays all."""
    lm = djax.load(GOLDENS, dtype="float32", kernels=kernels)
    problems = {number: problem for number, case in enumerate(CASES, start=1)
                if _program(case) in PROGRAMS[first::6] and (problem := replay(lm, case)) is not None}
    assert not problems


def test_all_cases_are_covered():
    assert len(CASES) == 359
    assert set(QUICK) < set(PROGRAMS)
    quick = [case for case in CASES if _program(case) in QUICK]
    for name in ("algo", "decoder", "cache", "block_length", "threshold", "warmup_steps", "before", "align"):
        # smoothing and vicinity alone are slow: both are in one of the programs
        assert {case[name] for case in quick} == {case[name] for case in CASES} - {"itersmooth", "vicinity"}, name
    assert sum(_program(case) == program for program in PROGRAMS for case in CASES) == 359


@pytest.mark.slow
def test_the_command_notices_a_difference(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDENS / name).read_bytes())
    case = CASES[0]
    wrong = case | {"tokens": [*case["tokens"][:-1], (case["tokens"][-1] + 1) % 150]}
    slow = case | {"steps": case["steps"] + 1}
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (case, wrong, slow)))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 2 failed"


def test_a_directory_without_traces_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nosuch"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "python -m tests.replay_goldens: DIR: got 'nosuch', which has no config.json\n"
