"""Report of the GPU run: the targets with what was reached, and all tables in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.command import figures, shape_text

Result = Mapping[str, Any]
KERNELS = ("mosaic_gpu",)
"""Implementations that the ops' targets are about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to reach."""

    name: str
    group: str
    shape: Mapping[str, Any]
    implementations: tuple[str, ...]
    figure: Callable[[Result], float]
    limit: float
    unit: str
    at_most: bool

    def judge(self, results: Iterable[Result]) -> dict[str, Any]:
        """The best figure of its implementations, and whether it is reached; why not, where nothing was measured."""
        mine = [result for result in results if result["group"] == self.group
                and result["implementation"] in self.implementations
                and all(str(result["shape"].get(name)) == str(value) for name, value in self.shape.items())]
        measured = [(self.figure(result), result) for result in mine if result["status"] == "ok"]
        entry: dict[str, Any] = {
            "name": self.name, "limit": self.limit, "unit": self.unit, "at_most": self.at_most,
            "figure": None, "reached": None, "implementation": None}
        if not measured:
            reasons = [f"{result['implementation']} {result['status']}: {result.get('reason', '')}" for result in mine]
            return entry | {"reason": "; ".join(reasons) or "not measured"}
        figure, best = (min if self.at_most else max)(measured, key=lambda pair: pair[0])
        reached = figure <= self.limit if self.at_most else figure >= self.limit
        return entry | {"figure": figure, "reached": reached, "implementation": best["implementation"]}


def milliseconds(result: Result) -> float:
    """Median of one execution."""
    return 1e3 * result["seconds"]["median"]


def copy_share(result: Result) -> float:
    """Per cent of the copy bandwidth."""
    return 100 * result["share_of_copy_bandwidth"]


MAIN = {"batch": 1, "window": 96, "context": 1200}
LOOP = {"batch": 1, "block": 64, "cache": "vicinity", "command_buffers": "while"}
TARGETS = (
    Target(name="decode MoE layer, 96 rows", group="moe", shape={"rows": 96, "weights": None},
           implementations=KERNELS, figure=copy_share, limit=80, unit="% of copy bandwidth", at_most=False),
    Target(name="head, 64 rows", group="unembed", shape={"rows": 64, "expected": None}, implementations=KERNELS,
           figure=copy_share, limit=75, unit="% of copy bandwidth", at_most=False),
    Target(name="windowed forward, 96 of 1200", group="forward", shape=MAIN, implementations=("djax",),
           figure=milliseconds, limit=4.0, unit="ms", at_most=True),
    Target(name="windowed forward, 96 of 1200, goal", group="forward", shape=MAIN, implementations=("djax",),
           figure=milliseconds, limit=3.5, unit="ms", at_most=True),
    Target(name="windowed forward, 8-bit experts", group="forward", shape=MAIN,
           implementations=("djax.int8", "djax.float8_e4m3fn"), figure=milliseconds, limit=2.4, unit="ms",
           at_most=True),
    Target(name="loop overhead per window step", group="loop", shape=LOOP, implementations=("djax",),
           figure=lambda result: 100 * result["loop_overhead"], limit=5, unit="%", at_most=True),
    Target(name="TPS at TPF 3.87, one full refresh per block", group="loop", shape=LOOP, implementations=("djax",),
           figure=lambda result: result["tokens_per_second"]["3.87"], limit=900, unit="tokens/s", at_most=False),
)
"""LLaDA-MoE of full size on one H200."""


def targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every target, judged."""
    return [target.judge(results) for target in TARGETS]


def verdict(entry: Mapping[str, Any]) -> str:
    """One target in words."""
    if entry["figure"] is None:
        return f"not measured ({entry['reason'][:160]})"
    word = "reached" if entry["reached"] else "missed"
    return f"{word}: {entry['figure']:.2f} {entry['unit']} ({entry['implementation']})"


def summary(record: Mapping[str, Any]) -> str:
    """The targets and how many results there are, for the terminal."""
    counts: dict[str, int] = {}
    for result in record["results"]:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    lines = ["targets (toy shapes: none apply)" if record["settings"]["tiny"] else "targets", *(
        f"  {entry['name']}, {bound(entry)}: {verdict(entry)}" for entry in record["targets"]
        if not record["settings"]["tiny"])]
    wrong = [result["key"] for result in record["results"] if result["status"] in ("wrong", "hung", "crashed")]
    lines.append("results: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return "\n".join([*lines, *(f"  not right: {key}" for key in wrong)])


def bound(entry: Mapping[str, Any]) -> str:
    """A target's limit."""
    return f"{'at most' if entry['at_most'] else 'at least'} {entry['limit']:g} {entry['unit']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    clean = lambda cell: str(cell).replace("|", "/").replace("\n", " ")  # noqa: E731
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|",
            *(f"| {' | '.join(map(clean, row))} |" for row in rows)]


def markdown(record: Mapping[str, Any]) -> str:
    """The whole report."""
    gpu, versions = record["gpu"], record["versions"]
    where = gpu.get("name") or record["hardware"]["cpu"]
    lines = [
        f"# Kernels on {where}", "",
        f"`{record['command']}`; driver {gpu.get('driver_version')}; jax {versions['jax']}, torch {versions['torch']}, "
        f"python {versions['python']}; commit {record['commit']}{' and changes' if record['modified'] else ''}.", ""]
    if record["settings"]["tiny"]:
        lines += ["Toy shapes: nothing here says anything about speed.", ""]
    lines += ["## Ceilings", "", *table(("process", "copy TB/s", "bfloat16 TFLOP/s"), (
        (",".join(entry["groups"]), f"{entry['copy']['bytes_per_second'] / 1e12:.2f}",
         f"{entry['matmul']['flops_per_second'] / 1e12:.0f}") for entry in record["ceilings"])), ""]
    lines += ["## Targets", "", *table(("target", "limit", "outcome"), (
        (entry["name"], bound(entry), verdict(entry)) for entry in record["targets"])), ""]
    for group in dict.fromkeys(result["group"] for result in record["results"]):
        mine = [result for result in record["results"] if result["group"] == group]
        write = {"check": check_lines, "loop": loop_lines}.get(group, group_lines)
        lines += [f"## {group}", "", *write(mine), ""]
    if record["notes"]:
        lines += ["## Notes", "", *(
            "- " + ", ".join(f"{name} {value}" for name, value in note.items() if value is not None)
            for note in record["notes"]), ""]
    return "\n".join(lines)


def check_lines(results: Sequence[Result]) -> list[str]:
    """How many checks every implementation passed, and all that it did not."""
    pairs = dict.fromkeys((result["shape"]["op"], result["implementation"]) for result in results)
    statuses = ("ok", "wrong", "failed", "hung", "crashed", "cut off", "unsupported", "skipped")
    rows = []
    for op, implementation in pairs:
        mine = [result["status"] for result in results
                if (result["shape"]["op"], result["implementation"]) == (op, implementation)]
        rows.append((op, implementation, *(str(mine.count(status) or "") for status in statuses)))
    bad = [f"- {result['key']}: {result['status']}, {result.get('reason', '')}" for result in results
           if result["status"] not in ("ok", "unsupported", "skipped")]
    return [*table(("op", "implementation", *statuses), rows), *([""] if bad else []), *bad]


def is_baseline(result: Result) -> bool:
    """Whether it is something to compare with: neither djax as it is nor one of its kernels."""
    name = result["implementation"]
    return not (name.startswith("djax") or name in KERNELS)


def speedups(results: Sequence[Result]) -> dict[str, float]:
    """For what is not a baseline: the time of the fastest baseline on the same shape over its own, by key."""
    fastest: dict[str, float] = {}
    plain = lambda result: str({**result["shape"], "weights": None})  # noqa: E731 (8-bit weights against 16-bit ones)
    timed = [result for result in results if result["status"] == "ok" and "seconds" in result]
    for result in filter(is_baseline, timed):
        median = result["seconds"]["median"]
        fastest[plain(result)] = min(median, fastest.get(plain(result), median))
    return {result["key"]: fastest[plain(result)] / result["seconds"]["median"] for result in timed
            if not is_baseline(result) and plain(result) in fastest}


def by_shape(result: Result) -> list[tuple[bool, Any]]:
    """Sorts shapes number by number."""
    return [(isinstance(value, str), value) for value in result["shape"].values()]


def group_lines(results: Sequence[Result]) -> list[str]:
    """A table of what was measured; what was not, as counts with their reasons."""
    order = sorted((result for result in results if result["status"] == "ok"), key=by_shape)
    faster = speedups(results)
    rows = ((result["implementation"], shape_text(result["shape"]), *figures(result)[:3],
             f"{faster[result['key']]:.2f}" if result["key"] in faster else "", f"{result['bytes'] / 1e9:.2f}",
             f"{result['flops'] / 1e9:.0f}", f"{result['compile_seconds']:.0f}", result.get("note", ""))
            for result in order)
    head = ("implementation", "shape", "ms (range)", "% of copy", "% of matmul", "x best baseline", "GB", "GFLOP",
            "compile s", "")
    return [*table(head, rows), "", *other_lines(results)]


def loop_lines(results: Sequence[Result]) -> list[str]:
    """The generation loop: its two kinds of step, the same forward outside it, and what follows."""
    rows = ((
        result["implementation"], shape_text(result["shape"]),
        *(f"{run['forwards_per_second']:.0f}" for run in result["generations"]),
        f"{1e3 * result['window_seconds']:.3f}", f"{1e3 * result['back_to_back']['seconds']['median']:.3f}",
        f"{100 * result['loop_overhead']:.1f} %", f"{1e3 * result['refresh_seconds']:.2f}",
        *(f"{value:.0f}" for value in result["tokens_per_second"].values()), f"{result['compile_seconds']:.0f}")
        for result in results if result["status"] == "ok")
    steps = next((tuple(run["steps_per_block"] for run in result["generations"]) for result in results
                  if result["status"] == "ok"), ("", ""))
    rates = next((tuple(result["tokens_per_second"]) for result in results if result["status"] == "ok"), ("", ""))
    head = ("implementation", "shape", *(f"forwards/s, {count} steps a block" for count in steps), "window step, ms",
            "back to back, ms", "overhead", "refresh, ms", *(f"TPS at TPF {rate}" for rate in rates), "compile s")
    return [*table(head, rows), "", *other_lines(results)]


def other_lines(results: Sequence[Result]) -> list[str]:
    """Cases without a figure: how often, and why."""
    counts: dict[str, int] = {}
    for result in results:
        if result["status"] != "ok":
            reason = f"{result['implementation']} {result['status']}: {result.get('reason', '')}"
            counts[reason] = counts.get(reason, 0) + 1
    return [f"- {count} x {reason[:300]}" for reason, count in counts.items()]
