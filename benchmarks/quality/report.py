"""How the quality benchmark's record is shown: a Markdown table, and accuracy against tokens per forward."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from benchmarks.harness import report
from djax import assets

HEAD = ("checkpoint", "recipe", "cache", "exact match, %", "against reference", "NFE", "TPF", "TPS", "speed-up")
_MARKERS = {"reference": "s", "fast_dllm": "o", "dinfer": "D", "dinfer_credit": "^", "dinfer_hierarchical": "*"}
_COLOURS = {"base": "#3060a0", "compressed": "#c05020"}


def digest(source: str) -> str | None:
    """SHA-256 of a checkpoint's weights, None where there are none."""
    path = Path(assets.resolve(source)) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _cells(row: dict[str, Any]) -> list[str]:
    difference, speedup = row["difference"], row["speedup"]
    return [
        row["checkpoint"], row["recipe"], "yes" if row["cache"] else "no",
        f"{row['accuracy']:.2f} ± {row['standard_error']:.2f}",
        "-" if difference is None else f"{difference['points']:+.2f} ± {difference['standard_error']:.2f}",
        f"{row['nfe']:.1f}", f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:.0f}",
        "-" if speedup is None else
        f"{speedup['median']:.2f} ({speedup['minimum']:.2f} to {speedup['maximum']:.2f})"]


def markdown(record: dict[str, Any]) -> str:
    """The summary, then each task's accuracy."""
    return "\n".join([summary(record), "", *_by_task(record["rows"]), ""])


def _by_task(rows: list[dict[str, Any]]) -> list[str]:
    tasks = sorted(rows[0]["tasks"]) if rows else []
    lines = ["Exact match in percent / TPF by task:", "", f"| checkpoint, recipe, cache | {' | '.join(tasks)} |",
             "|---" + "|--:" * len(tasks) + "|"]
    for row in rows:
        shares = (f"{row['tasks'][task]['accuracy']:.1f} / {row['tasks'][task]['tokens_per_forward']:.2f}"
                  for task in tasks)
        name = f"{row['checkpoint']}, {row['recipe']}, {'yes' if row['cache'] else 'no'}"
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def summary(record: dict[str, Any]) -> str:
    """The measurement, its machine, and the table."""
    rows, settings = record["rows"], record["settings"]
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---" + "|--:" * (len(HEAD) - 3) + "|",
             *(f"| {' | '.join(_cells(row))} |" for row in rows)]
    prompts, tasks = (rows[0]["prompts"], len(rows[0]["tasks"])) if rows else (0, 0)
    return "\n".join([
        f"The bundled model on {prompts} held-out prompts of {tasks} tasks, {settings['max_new_tokens']} open "
        f"positions in blocks of {settings['block_length']}, batches of {settings['batch']}, greedy, "
        f"{settings['dtype']} on CPU (`{record['command']}`; {record['hardware']['cpu']}, "
        f"{record['hardware']['cores']} cores; jax {record['versions']['jax']}; commit "
        f"{(record['commit'] or 'unknown')[:10]}). Exact match is of the whole worked answer, the mean over tasks with "
        "its standard error; the difference to the reference (base, one token a step, no cache) is paired. The "
        "speed-up is the median over batches, each timed beside the reference's, with its range.", "", *lines])


def plot(record: dict[str, Any], *paths: Path) -> None:
    """Accuracy against tokens per forward, to each of `paths` in the format of its name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "djax"  # the same record gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in record["rows"]:
        axes.errorbar(
            row["tokens_per_forward"], row["accuracy"], yerr=row["standard_error"], capsize=2, markersize=9,
            marker=_MARKERS[row["recipe"]], color=_COLOURS[row["checkpoint"]],
            markerfacecolor=_COLOURS[row["checkpoint"]] if row["cache"] else "white",
            label=f"{row['recipe']}, {'cache' if row['cache'] else 'no cache'} ({row['checkpoint']})", linestyle="none")
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("exact match on held-out prompts, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def write(directory: Path, record: dict[str, Any]) -> None:
    """quality.json, quality.md, quality.png and quality.svg."""
    report.save(directory / "quality.json", record)
    (directory / "quality.md").write_text(markdown(record), encoding="utf-8")
    plot(record, directory / "quality.png", directory / "quality.svg")
