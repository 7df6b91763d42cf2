"""Reports of benchmarks: where a number was measured, its spread, and how it is shown and kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; a ValueError from `statistics` for none."""
        return cls(median=statistics.median(values), minimum=min(values), maximum=max(values))

    def show(self, digits: int = 2) -> str:
        """Median and range on one line."""
        return f"{self.median:.{digits}f} ({self.minimum:.{digits}f} to {self.maximum:.{digits}f})"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as well as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """The name under which a record of this machine is kept: its processor and the cores in use."""
    return f"{cpu_model()}, {cores()} cores"


def load_average() -> float | None:
    """Processes that wanted to run over the last minute: above `cores()` the machine was shared."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def environment() -> dict[str, Any]:
    """Hardware and versions, as JSON values; packages that are not installed are null."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "hardware": {"cpu": cpu_model(), "cores": cores(), "machine": platform.machine(), "system": platform.system()},
        "load_average": load_average(), "versions": versions,
    }


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it; both null outside a checkout."""
    def git(*arguments: str) -> str | None:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain") if head else None
    return {"commit": head, "modified": None if changes is None else bool(changes)}


def provenance(module: str) -> dict[str, Any]:
    """Everything that says where a record comes from; `module` is what `python -m` ran."""
    return {"command": " ".join(["python -m", module, *sys.argv[1:]]), **commit(), **environment()}


def save(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON; directories are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table, its first column aligned left and all others right."""
    result = Table(title=title)
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left")
    for row in rows:
        result.add_row(*row)
    return result
