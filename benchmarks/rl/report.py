"""Runs of `benchmarks.rl` as a table and as curves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import report
from benchmarks.rl.task import Run, Settings


def keep(path: Path, run: Run, settings: Settings, *, devices: int) -> None:
    """Put a finished run into rl.json beside its metrics."""
    trainer, method, placement = path.stem.split("-")
    measured = [record for record in run.records if "held_out" in record]
    first, last = measured[0], measured[-1]
    summary = {
        "trainer": trainer, "method": method, "placement": placement, "devices": devices,
        "settings": dataclasses.asdict(settings), "metrics": path.name, "updates": last["update"],
        "held_out": [first["held_out"], last["held_out"]], "greedy": [first["greedy"], last["greedy"]],
        "seconds": last["seconds"], "syncs_checked": len(run.checked - {0}),
        "rollout_programs": last["rollout_programs"],
        "compiled_after_two_updates": last["compilations"] - next(
            record["compilations"] for record in run.records if record["update"] == min(2, last["update"])),
        **report.provenance("benchmarks.rl")}
    file = path.parent / "rl.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}
    report.save(file, {"runs": dict(sorted({**runs, path.stem: summary}.items()))})


def write(directory: Path) -> str:
    """rl.md and, where matplotlib is installed, rl.png; the text of the first, or a hint that there is nothing yet."""
    file = directory / "rl.json"
    if not file.exists():
        return f"{directory}: no runs yet"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    text = markdown(runs)
    (directory / "rl.md").write_text(text + "\n", encoding="utf-8")
    try:
        _plot(directory, runs)
    except ImportError:
        text += "\n\nrl.png: not drawn, matplotlib is not installed: pip install 'djax[plot]'"
    return text


def markdown(runs: dict[str, Any]) -> str:
    """The table of all runs."""
    some = next(iter(runs.values()))
    settings, machine = some["settings"], some["hardware"]
    others = {name: _differing(run["settings"], settings) for name, run in runs.items()}
    column = any(others.values())
    lines = [
        f"GRPO on the task \"{settings['task']}\" with the bundled model, noise of {settings['noise']:g} standard "
        f"deviations on its output matrix; {settings['prompts']} prompts x {settings['samples']} samples an update, "
        f"answers of {settings['length']} positions in {settings['steps']} denoising steps; reward 1 for the whole "
        f"worked answer. Held-out reward is that of {settings['held_out']} prompts that are never trained on, one "
        "sample each; load is how many processes wanted to run at the end (`python -m benchmarks.rl`; "
        f"{machine['cpu']}, {machine['cores']} cores; jax {some['versions']['jax']}).",
        "",
        "| trainer | method | placement | devices | updates | held-out reward, % | greedy, % | minutes | load | "
        "syncs equal | compiled after update 2 |" + " other settings |" * column,
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|" + "---|" * column]
    for name, run in runs.items():
        arrow = {key: " → ".join(f"{100 * value:.1f}" for value in run[key]) for key in ("held_out", "greedy")}
        lines.append(
            f"| {run['trainer']} | {run['method']} | {run['placement']} | {run['devices']} | {run['updates']} | "
            f"{arrow['held_out']} | {arrow['greedy']} | {run['seconds'] / 60:.1f} | {run['load_average']:.0f} | "
            f"{run['syncs_checked']} | {run['compiled_after_two_updates']} |" + f" {others[name]} |" * column)
    return "\n".join(lines)


def _differing(settings: dict[str, Any], stated: dict[str, Any]) -> str:
    """The settings of a run that neither the text above the table nor another column of its row tells."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()
                     if name not in ("method", "updates") and value != stated.get(name))


def _plot(directory: Path, runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = itertools.cycle(zip(("-", "--", "-.", ":"), ("o", "x", "s", "+"), strict=True))  # they lie on each other
    for (name, run), (line, marker) in zip(runs.items(), styles, strict=False):
        lines = (directory / run["metrics"]).read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
        points = [(record["update"], 100 * record["held_out"]) for record in records if "held_out" in record]
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle=line, alpha=0.8, label=name.replace("-", ", "))
    axes.set(xlabel="update", ylabel="held-out reward, %", ylim=(0, 100), title="GRPO with djax rollouts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "rl.png", dpi=150)
    pyplot.close(figure)
