"""Command lines of the kernel benchmarks: options, ceilings, the run, and the table at its end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import report
from benchmarks.harness.cases import FULL, TINY, Case, Journal, Sizes, run_cases
from benchmarks.harness.ceilings import Ceilings

NO_GPU = 2
"""Exit code where figures would say nothing."""


def options(program: str, description: str, groups: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of one command."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--only", default=",".join(groups), metavar="A,B",
                        help=f"groups of {', '.join(groups)} (default: all)")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop starting cases after this (default 540)")
    parser.add_argument("--priorities", type=int, nargs="+", default=[0, 1, 2], choices=[0, 1, 2], metavar="P",
                        help="0: the shapes that targets are about; 1: near them; 2: the rest (default: all)")
    parser.add_argument("--together", type=int, default=4, help="cases compiled at a time (default 4)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes on any device: no figures worth quoting")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"),
                        help="directory of results.jsonl; cases that have a result there are not run again")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, groups: Sequence[str]) -> Any:
    """The options, with `only` as a list of known groups."""
    found = parser.parse_args(arguments)
    found.only = [name for name in found.only.split(",") if name]
    unknown = [name for name in found.only if name not in groups]
    if unknown or not found.only:
        parser.error(f"--only: got {', '.join(unknown) or 'nothing'}; allowed: {', '.join(groups)}")
    if found.together < 1:
        parser.error(f"--together: got {found.together}; it must be at least 1")
    return found


def alive() -> bool:
    """Whether JAX's device still computes: after an illegal access it does not, whatever is asked of it."""
    import jax
    import jax.numpy as jnp

    try:
        return bool(jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()[0] == 1)
    except Exception:
        return False


def missing_gpu() -> str | None:
    """Why figures would mean nothing here, in one line; None on a GPU."""
    import jax

    if jax.default_backend() == "gpu":
        return None
    return f"no GPU: JAX sees only {jax.devices()[0].device_kind}. --tiny runs toy shapes on any device."


def jax_device() -> dict[str, Any]:
    """The device as JAX describes it."""
    import jax

    device = jax.devices()[0]
    return {"platform": jax.default_backend(), "device_kind": device.device_kind,
            "platform_version": getattr(device.client, "platform_version", None)}


def run(
    found: argparse.Namespace, program: str, build: Callable[[Sizes, Ceilings, Sequence[str]], Iterable[Case]],
    *, ceilings: Callable[[Sizes], dict[str, Any]] | None = None, missing: Callable[[], str | None] = missing_gpu,
    is_alive: Callable[[], bool] = alive, device: Callable[[], dict[str, Any]] = jax_device,
) -> int:
    """Measure the ceilings, run the cases, print a table; returns the exit code.

    The framework's own parts are given as functions: `ceilings` measures, `missing` says why there is no device,
    `is_alive` whether it still computes, `device` describes it.
    """
    from benchmarks.harness.timing import ceilings_of, measure_ceilings

    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 160)
    reason = None if found.tiny else missing()
    if reason is not None:
        console.print(reason, highlight=False)
        return NO_GPU
    sizes = TINY if found.tiny else FULL
    journal = Journal(found.output / "results.jsonl")
    measured = (ceilings or (lambda of: measure_ceilings(
        copy_bytes=of.copy_bytes, matmul_size=of.matmul_size, budget=of.budget)))(sizes)
    journal.write({"event": "ceilings", "program": program, "groups": found.only, "device": device(),
                   "versions": report.environment()["versions"], **measured})
    cases = [case for case in build(sizes, ceilings_of(measured), found.only) if case.priority in found.priorities]
    code = run_cases(
        cases, journal, seconds=found.seconds - (time.monotonic() - started), together=found.together,
        alive=is_alive, advance=lambda message: console.print(message, highlight=False, soft_wrap=True))
    wanted = {case.key for case in cases}
    show([record for record in journal.results() if record["key"] in wanted], console)
    return code


def show(records: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a result."""
    rows = [[record["group"], record["implementation"], shape_text(record["shape"]), *figures(record)]
            for record in records if record["status"] != "skipped"]
    console.print(report.table("results", ("group", "implementation", "shape", "ms", "copy %", "matmul %", ""), rows))
    skipped = sum(record["status"] == "skipped" for record in records)
    if skipped:
        console.print(f"{skipped} cases did not fit into the time.")


def shape_text(shape: Mapping[str, Any]) -> str:
    """A shape on one line."""
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def figures(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Milliseconds with their range, the shares of both ceilings, and what else there is to say."""
    note = record.get("note", "") if record["status"] == "ok" else f"{record['status']}: {record.get('reason', '')}"
    if "seconds" not in record:
        return "", "", "", note[:100]
    spread = report.Spread(**{name: 1e3 * value for name, value in record["seconds"].items()})
    share = lambda name: f"{100 * record[name]:.0f}" if name in record else ""  # noqa: E731
    return spread.show(3), share("share_of_copy_bandwidth"), share("share_of_matmul_rate"), note[:100]
