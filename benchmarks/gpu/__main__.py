"""Everything about the kernels that needs a GPU, in one command and at most nine minutes.

    python -m benchmarks.gpu --output out                 # one H100 or H200, nothing to download
    python -m benchmarks.gpu --output out --only moe,loop
    python -m benchmarks.gpu --output out --tiny          # toy shapes on any device, to see that it works

Checks, timings of every op, of whole forwards and of the generation loop with and without CUDA graphs, PyTorch and
tokamax where they are installed. Each group runs in a process of its own, one after the other, so that a kernel that
hangs or breaks the device costs one case: the process is replaced and goes on behind it. Results go to results.jsonl
as they come; at the end gpu.json holds them with their provenance, and gpu.md the tables and which targets are met.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.gpu import report as gpu_report
from benchmarks.harness import report
from benchmarks.harness.cases import BROKEN, Journal, in_progress
from benchmarks.harness.command import NO_GPU

GROUPS = ("check", "moe", "attention", "unembed", "forward", "loop", "torch", "tokamax")
NEEDS = {"torch": ("torch", "transformers"), "tokamax": ("tokamax",)}
"""Packages that a group measures. They are not imported here: the GPU belongs to the stages."""
HANG_SECONDS = 120.0
"""Silence after which a process is taken to hang: it starts, or traces and compiles the longest of its programs."""
RUN_HANG_SECONDS = 45.0
"""The same while a compiled case runs: the longest takes a few seconds."""
GRACE_SECONDS = 15.0
"""Between a process' own limit and its end by force."""
REPORT_SECONDS = 10.0
"""Kept of the budget for the report."""
MEMORY_FRACTION = "0.88"
"""Share of the GPU for JAX: CUDA graphs, cuDNN and loaded kernels need memory of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One process: a module of this package, its groups, and how long it may take."""

    module: str
    groups: tuple[str, ...]
    priorities: tuple[int, ...]
    seconds: float
    """At most; less where the budget leaves less."""
    together: int = 8
    options: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people."""
        return " ".join([",".join(self.groups), *self.options, f"(priority {','.join(map(str, self.priorities))})"])


def stages(only: Sequence[str], *, tiny: bool) -> list[Stage]:
    """The stages, the targets first and what varies around them last."""
    kernels, forward, torch = "benchmarks.kernels", "benchmarks.forward", "benchmarks.torch_moe"
    ops = ("moe", "attention", "unembed")
    loop = lambda buffers, seconds: Stage(  # noqa: E731
        module=forward, groups=("loop",), priorities=(0,), seconds=seconds, together=2,
        options=("--command-buffers", buffers))
    first = [
        Stage(module=kernels, groups=("check",), priorities=(0,), seconds=60),
        Stage(module=kernels, groups=ops, priorities=(0,), seconds=60),
        Stage(module=forward, groups=("forward",), priorities=(0,), seconds=130, together=3),
        loop("while", 130), loop("none", 110),
        Stage(module=torch, groups=("torch",), priorities=(0,), seconds=90, together=1),
        Stage(module=kernels, groups=("tokamax",), priorities=(0,), seconds=30),
    ]
    # what has a result is not run again, so these also take up what was skipped
    rest = [] if tiny else [
        Stage(module=kernels, groups=ops, priorities=(0, 1), seconds=60, together=12),
        Stage(module=forward, groups=("forward",), priorities=(0, 1), seconds=90),
        Stage(module=kernels, groups=("check",), priorities=(0, 1, 2), seconds=60, together=12),
        Stage(module=forward, groups=("loop",), priorities=(0, 1, 2), seconds=120, together=3),
        loop("default", 90),
        Stage(module=kernels, groups=(*ops, "tokamax"), priorities=(0, 1, 2), seconds=120, together=12),
        Stage(module=torch, groups=("torch",), priorities=(0, 1, 2), seconds=60, together=1),
        Stage(module=forward, groups=("forward",), priorities=(0, 1, 2), seconds=540),
    ]
    wanted = [dataclasses.replace(stage, groups=tuple(group for group in stage.groups if group in only))
              for stage in first + rest]
    return [stage for stage in wanted if stage.groups]


class Run:
    """The stages of one call, its budget and its journal."""

    def __init__(self, options: argparse.Namespace, console: Console, scratch: Path) -> None:
        self.options, self.console, self.scratch = options, console, scratch
        self.journal = Journal(options.output / "results.jsonl")
        self.deadline = time.monotonic() + options.budget - REPORT_SECONDS

    def left(self) -> float:
        """Seconds until the report has to be written."""
        return self.deadline - time.monotonic()

    def stage(self, stage: Stage, show: Progress) -> int:
        """Run a stage, replacing its process where a case took it down; returns the last exit code."""
        until = time.monotonic() + min(stage.seconds, self.left())
        task = show.add_task(stage.title, total=None)
        together = stage.together
        while True:
            seconds = until - time.monotonic()
            code = self.process(stage, seconds, together, show, task)
            victims = in_progress(self.journal.read())
            over = code in (0, NO_GPU) or until - time.monotonic() < GRACE_SECONDS
            if over or (code not in (BROKEN, None) and not victims):
                return self._close(stage, code, victims)
            if len(victims) == 1:
                self._lost(victims[0], "hung" if code is None else "crashed", code)
            # more than one were compiling: alone, so that the next time it is known which
            together = 1 if len(victims) > 1 else stage.together

    def process(self, stage: Stage, seconds: float, together: int, show: Progress, task: Any) -> int | None:
        """One process of a stage; None if it fell silent and was ended."""
        command = [
            sys.executable, "-m", stage.module, "--only", ",".join(stage.groups), "--seconds", f"{seconds:.0f}",
            "--priorities", *map(str, stage.priorities), "--together", str(together), "--output",
            str(self.options.output), *stage.options, *(["--tiny"] if self.options.tiny else [])]
        grace = min(GRACE_SECONDS, max(self.left() - seconds, 0.0) + REPORT_SECONDS / 2)
        hard_limit = time.monotonic() + seconds + grace
        size, heard = -1, time.monotonic()
        with (self.options.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=self._environment())
            try:
                while child.poll() is None:
                    time.sleep(0.2)
                    now = time.monotonic()
                    found = self.journal.path.stat().st_size if self.journal.path.exists() else 0
                    if found != size:
                        size, heard = found, now
                        self._tell(show, task, stage)
                    if now - heard > self._patience():
                        return None
                    if now > hard_limit:
                        return 0
                return child.returncode
            finally:
                end(child)

    def _patience(self) -> float:
        starts = [record for record in self.journal.read()[-1:] if record["event"] == "start"]
        return RUN_HANG_SECONDS if starts and starts[0]["phase"] == "run" else HANG_SECONDS

    def _environment(self) -> dict[str, str]:
        """XLA's autotuning is kept for the next process; JAX takes its memory at once, as it would in production."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={self.scratch}"
        return os.environ | {"XLA_FLAGS": flags.strip(), "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION}

    def _tell(self, show: Progress, task: Any, stage: Stage) -> None:
        records = self.journal.read()
        done = sum(record["event"] == "result" and record["status"] != "skipped" for record in records)
        show.update(task, description=f"{stage.title}: {done} results, {max(self.left(), 0):.0f} s left")

    def _lost(self, key: str, status: str, code: int | None) -> None:
        group, implementation, *shape = key.split("/")
        reason = f"no word for {RUN_HANG_SECONDS:.0f} s or more" if code is None else f"the process ended with {code}"
        self.journal.write({
            "event": "result", "key": key, "group": group, "implementation": implementation,
            "shape": dict(part.split("=", 1) for part in shape), "status": status, "reason": reason})

    def _close(self, stage: Stage, code: int | None, victims: Sequence[str]) -> int:
        """Record of a stage that ran out of time or could not start."""
        for key in victims:
            self._lost(key, "cut off", code)
        if code not in (0, NO_GPU):
            self.journal.write({"event": "failed stage", "stage": stage.title, "code": code})
        return code or 0


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process and its children (compilers), unless it has ended."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def gpu_facts() -> dict[str, Any]:
    """The driver's facts about the first GPU; {} where there is none."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True,
            check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = found.stdout.strip().splitlines() if found.returncode == 0 else []
    return dict(zip(fields, lines[0].split(", "), strict=False)) if lines else {}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for results.jsonl, gpu.json and gpu.md")
    parser.add_argument("--only", default=",".join(GROUPS), metavar="A,B", help=f"groups of {', '.join(GROUPS)}")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--commit", help="of this tree, for the record where git cannot tell")
    parser.add_argument("--tiny", action="store_true", help="toy shapes on any device: no figures worth quoting")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.only if name not in GROUPS]
    if unknown or not options.only:
        parser.error(f"--only: got {', '.join(unknown) or 'nothing'}; allowed: {', '.join(GROUPS)}")
    if options.budget < 2 * GRACE_SECONDS:
        parser.error(f"--budget: got {options.budget:.0f}; it must be at least {2 * GRACE_SECONDS:.0f} seconds")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    """All stages; an exit code."""
    with tempfile.TemporaryDirectory(prefix="djax-autotune-") as scratch, Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as show:
        running = Run(options, console, Path(scratch))
        missing = {group: package for group, packages in NEEDS.items() for package in packages
                   if group in options.only and importlib.util.find_spec(package) is None}
        for group, package in missing.items():
            running.journal.write({"event": "missing", "group": group, "reason": f"{package} is not installed"})
        for stage in stages([group for group in options.only if group not in missing], tiny=options.tiny):
            if running.left() < 2 * GRACE_SECONDS:
                running.journal.write({"event": "skipped stage", "stage": stage.title})
                continue
            if running.stage(stage, show) == NO_GPU and stage.module != "benchmarks.torch_moe":
                return NO_GPU
    return 0


def write(options: argparse.Namespace, gpu: Mapping[str, Any]) -> dict[str, Any]:
    """gpu.json and gpu.md from the journal; returns the record."""
    journal = Journal(options.output / "results.jsonl")
    records = journal.read()
    record = {
        "benchmark": "gpu", **report.provenance("benchmarks.gpu"), "gpu": dict(gpu),
        "settings": {"budget": options.budget, "only": options.only, "tiny": options.tiny},
        "ceilings": [entry for entry in records if entry["event"] == "ceilings"],
        "notes": [entry for entry in records if entry["event"] in (
            "missing", "skipped stage", "failed stage", "broken")],
        "results": journal.results(),
    }
    record["commit"] = record["commit"] or options.commit
    record["targets"] = gpu_report.targets(record["results"])
    report.save(options.output / "gpu.json", record)
    (options.output / "gpu.md").write_text(gpu_report.markdown(record), encoding="utf-8")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    options.output.mkdir(parents=True, exist_ok=True)
    gpu = gpu_facts()
    if not gpu and not options.tiny and not any(Path("/dev").glob("nvidia[0-9]*")):
        console.print("no GPU: nvidia-smi finds none. --tiny runs toy shapes on any device.", highlight=False)
        return NO_GPU
    if run(options, console) == NO_GPU:
        console.print(f"no GPU: JAX sees none, see {options.output / 'log.txt'}. --tiny runs toy shapes on any device.",
                      highlight=False)
        return NO_GPU
    record = write(options, gpu)
    console.print(gpu_report.summary(record), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{options.output / 'gpu.json'}, {options.output / 'gpu.md'}", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
