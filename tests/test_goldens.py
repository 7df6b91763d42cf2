"""Every recorded dInfer trace, token for token and forward for forward.

The 359 cases need 64 programs with their own parts, and 22 where the decoder is chosen by leaves: threshold and
hierarchical decoding behind one `SelectStrategy`, credit with the weight 0 where a case has none.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

import djax
from djax import recipes
from djax.canvas import bucket_size
from djax.schedules import Linear
from djax.strategies import Hierarchical, Threshold
from djax.transforms import Credit
from tests.conftest import GOLDENS
from tests.replay_goldens import main, read_cases, recipe_of, replay
from tests.select import SelectStrategy

COVER = (
    "hard-dual-8-3", "hard-none-8-4-aligned", "hard-prefix-32-2", "hard-vicinity4-8-3", "soft-dual-8-3",
    "soft-none-32-2", "soft-prefix-8-3", "soft-vicinity4-8-3")
"""Every kind of cache with hard and soft tokens, both block lengths, alignment."""
OTHERS = (
    "hard-dual-32-2", "hard-none-32-2", "hard-none-32-3-aligned", "hard-none-8-3", "hard-prefix-8-3",
    "hard-vicinity0-32-2", "hard-vicinity0-8-3", "hard-vicinity4-32-2", "soft-dual-32-2", "soft-none-8-3",
    "soft-prefix-32-2", "soft-vicinity0-32-2", "soft-vicinity0-8-3", "soft-vicinity4-32-2")


@functools.cache
def cases() -> list[dict[str, Any]]:
    return read_cases(GOLDENS)


def program(case: dict[str, Any]) -> str:
    """What decides which compiled program a case runs, the decoder aside."""
    length, prompt = case["block_length"], len(case["prompt"])
    open_here = case["gen_length"] + (length - 1 if case["align"] else 0)
    cache = f"vicinity{case['before']}" if case["algo"].endswith("vicinity") else case["cache"]
    parts = ["soft" if case["algo"].startswith("itersmooth") else "hard", cache, str(length),
             str(bucket_size(-(-open_here // length), minimum=1)), *(["aligned"] if case["align"] else [])]
    assert prompt <= 16, "the smallest bucket of prompts"
    return "-".join(parts)


def own_program(case: dict[str, Any]) -> str:
    return "-".join(str(case[name]) for name in ("algo", "decoder", "cache", "block_length", "before", "align"))


def shared(case: dict[str, Any]) -> recipes.Recipe:
    """The case's recipe with its decoder chosen by leaves."""
    own = recipe_of(case)
    is_hierarchical = isinstance(own.strategy, Hierarchical)
    limit = own.strategy.high if is_hierarchical else own.strategy.threshold
    high = limit if isinstance(limit, Linear) else Linear(limit, 0.0, minimum=0.0)
    strategy = SelectStrategy(
        index=int(is_hierarchical), parts=(Threshold(high), Hierarchical(high, case["low_threshold"] or 0.0)))
    credit = own.transform if isinstance(own.transform, Credit) else Credit(alpha=0.0)
    return own.replace(strategy=strategy, transform=credit)


@pytest.mark.parametrize("name", [*COVER, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_tokens_and_nfe_equal_dinfer(golden_lm, name):
    mine = {number: case for number, case in enumerate(cases(), start=1) if program(case) == name}
    before = golden_lm.compile_count
    problems = {number: problem for number, case in mine.items()
                if (problem := replay(golden_lm, case, shared(case))) is not None}
    assert mine
    assert not problems
    assert golden_lm.compile_count - before <= 1, "cases of one name share a program"


def test_all_cases_are_covered():
    assert len(cases()) == 359
    assert {program(case) for case in cases()} == {*COVER, *OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [
    djax.Kernels(moe="reference", attention="reference", unembed="reference"),
    djax.Kernels(moe="xla_dense", attention="xla", unembed="xla_stream"),
], ids=["references", "xla"])
def test_every_implementation_reproduces_them(kernels):
    """Every third program of the cases' own parts; `python -m tests.replay_goldens --kernels` replays all."""
    lm = djax.load(GOLDENS, dtype="float32", kernels=kernels)
    chosen = sorted({own_program(case) for case in cases()})[::3]
    problems = {number: problem for number, case in enumerate(cases(), start=1)
                if own_program(case) in chosen and (problem := replay(lm, case)) is not None}
    assert not problems


def test_the_command_notices_a_difference(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDENS / name).read_bytes())
    case = next(case for case in cases() if program(case) == "hard-dual-8-3")
    wrong = case | {"tokens": [*case["tokens"][:-1], (case["tokens"][-1] + 1) % 150]}
    slow = case | {"steps": case["steps"] + 1}
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (case, wrong, slow)))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 2 failed"
