"""Cases: the model's shapes, the matrix of windows, contexts and batches, and how a run of cases goes on.

A case prepares (traces and compiles, beside others in threads), then runs alone on the device. Every result is
appended to a JSON Lines file at once, and so is what is about to run: if the process dies, whoever started it sees
which case it was, and a new process goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.timing import Budget
from djax.models.config import LladaMoeConfig

BROKEN = 3
"""Exit code of a process whose device no longer computes, as after an illegal access."""


class Unsupported(Exception):
    """The implementation does not take the call; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model and the matrix of shapes to measure it on."""

    config: LladaMoeConfig
    windows: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    around: int
    """Positions of a window beside its block: the head runs on window - around."""
    main: tuple[int, int, int]
    """Window, context and batch that the targets are about."""
    prompt: int
    """Positions before the first generated one in the whole loop."""
    generated: int
    steps_per_block: tuple[int, int]
    """Two fixed numbers of steps: the difference of their times is that of window steps alone."""
    copy_bytes: int
    matmul_size: int
    budget: Budget

    def block(self, window: int) -> int:
        """Positions that the head reads in a window; a window no longer than `around` is all block."""
        return window - self.around if window > self.around else window

    def head_rows(self) -> tuple[int, ...]:
        """Rows of the head, over all windows and batches, the ones that are targets first."""
        window, _, batch = self.main
        rows = {batch * self.block(window)} | {b * w for b in self.batches for w in self.windows}
        return tuple(sorted(rows))

    def priority(self, window: int, context: int, batch: int) -> int:
        """0 for the targets' shape, 1 where it varies in one of the three, 2 for the rest."""
        return min(2, sum(a != b for a, b in zip((window, context, batch), self.main, strict=True)))


FULL = Sizes(
    config=LladaMoeConfig(
        vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
        num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
        max_positions=8192, mask_id=156895, eos_id=156892, pad_id=156892),
    windows=(32, 64, 96, 128), contexts=(512, 1200, 4096), batches=(1, 4, 8, 32), around=32, main=(96, 1200, 1),
    prompt=176, generated=1024, steps_per_block=(8, 16), copy_bytes=2**31, matmul_size=8192, budget=Budget())
"""LLaDA-MoE-7B-A1B, a window of 64 + 32 positions, 1024 tokens generated."""
TINY = Sizes(
    config=LladaMoeConfig(
        vocab_size=128, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, num_experts=4,
        experts_per_token=2, expert_size=16, rms_norm_eps=1e-5, rope_theta=50000.0, max_positions=256, mask_id=2,
        eos_id=1, pad_id=1),
    windows=(6, 8), contexts=(16, 24), batches=(1, 2), around=4, main=(8, 24, 1), prompt=8, generated=16,
    steps_per_block=(1, 2), copy_bytes=2**20, matmul_size=64,
    budget=Budget(sample_seconds=0.002, samples=3, max_calls=20))
"""Shapes that say nothing about speed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure or to check."""

    group: str
    implementation: str
    shape: Mapping[str, Any]
    prepare: Callable[[], Callable[[], dict[str, Any]]]
    """Compiles, and returns what runs and says what it saw. Raises `Unsupported` where there is nothing to run."""
    priority: int = 0

    @property
    def key(self) -> str:
        """Identity across processes."""
        return "/".join([self.group, self.implementation, *(f"{name}={value}" for name, value in self.shape.items())])

    def record(self, status: str, **fields: Any) -> dict[str, Any]:
        """A result as it is written."""
        return {"event": "result", "key": self.key, "group": self.group, "implementation": self.implementation,
                "shape": dict(self.shape), "status": status, **fields}


class Journal:
    """The JSON Lines file that a process appends to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = path, threading.Lock()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the disk."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a process that was killed may have left half of one."""
        records = []
        for line in self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else ():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def done(self) -> set[str]:
        """Keys of the cases that have a result; one that was skipped may still get it."""
        return {record["key"] for record in self.read() if record["event"] == "result"
                and record["status"] != "skipped"}

    def results(self) -> list[dict[str, Any]]:
        """The last result of every case, in the order in which they came."""
        latest = {record["key"]: record for record in self.read() if record["event"] == "result"}
        return list(latest.values())


def run_cases(
    cases: Iterable[Case], journal: Journal, *, seconds: float, together: int,
    alive: Callable[[], bool], advance: Callable[[str], None] = lambda message: None,
) -> int:
    """Run what has no result yet, by priority, until the time is up; returns the exit code.

    Args:
        cases: in the order in which cases of one priority run.
        journal: where results go.
        seconds: no further cases are started when the next ones would probably end later.
        together: cases that are compiled at a time, in as many threads.
        alive: whether the device still computes, asked after a failure.
        advance: is told of every result.
    """
    deadline = time.monotonic() + seconds
    finished = journal.done()
    left = sorted((case for case in cases if case.key not in finished), key=lambda case: case.priority)
    last_chunk = 0.0
    while left:
        started = time.monotonic()
        if started + last_chunk > deadline:
            break
        chunk, left = left[:together], left[together:]
        journal.write({"event": "start", "phase": "compile", "keys": [case.key for case in chunk]})
        with ThreadPoolExecutor(together) as pool:
            prepared = list(pool.map(partial(_prepare, journal=journal), chunk))
        for case, (action, seconds_taken) in zip(chunk, prepared, strict=True):
            record = _run(case, action, seconds_taken, journal)
            journal.write(record)
            advance(f"{case.key}: {record['status']}")
            if record["status"] == "failed" and not alive():
                journal.write({"event": "broken", "key": case.key})
                return BROKEN
        last_chunk = time.monotonic() - started
    for case in left:
        journal.write(case.record("skipped", reason="the time budget was spent"))
    return 0


Action = Callable[[], dict[str, Any]]


def _prepare(case: Case, journal: Journal) -> tuple[Action | dict[str, Any], float]:
    """The case's action, or the record's status where there is none; and the seconds that it took.

    That it is ready is written down as a sign of life.
    """
    started = time.perf_counter()
    try:
        action: Action | dict[str, Any] = case.prepare()
    except Unsupported as error:
        action = {"status": "unsupported", "reason": str(error)}
    except Exception as error:
        action = {"status": "failed", "reason": _describe(error), "phase": "compile"}
    seconds = time.perf_counter() - started
    journal.write({"event": "prepared", "key": case.key, "seconds": seconds})
    return action, seconds


def _run(case: Case, action: Action | dict[str, Any], compile_seconds: float, journal: Journal) -> dict[str, Any]:
    if isinstance(action, dict):
        return case.record(**action, compile_seconds=compile_seconds)
    journal.write({"event": "start", "phase": "run", "keys": [case.key]})
    try:
        return case.record(**{"status": "ok"} | action(), compile_seconds=compile_seconds)
    except Unsupported as error:
        return case.record("unsupported", reason=str(error), compile_seconds=compile_seconds)
    except Exception as error:
        return case.record("failed", reason=_describe(error), phase="run", compile_seconds=compile_seconds)


def _describe(error: Exception) -> str:
    """The error's kind and the beginning of its text: a compiler's can be pages long."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 600 else text[:600] + "..."


def in_progress(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that were started last and have no result: what a process died of, or one of them."""
    finished = {record["key"] for record in records if record["event"] == "result"}
    for record in reversed(records):
        if record["event"] == "start":
            return [key for key in record["keys"] if key not in finished]
    return []
