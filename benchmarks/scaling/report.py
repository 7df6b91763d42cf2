"""How the scaling benchmark's record is shown: Markdown tables, and milliseconds against devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import report

Record = Mapping[str, Any]
_COLOURS = {"h200": "#76a030", "v5p": "#3060a0", "v6e": "#c05020", "v5e": "#806090"}


def markdown(record: Record) -> str:
    """Every part that is on record."""
    writers = {"devices": devices_section, "plan": plan_section, "strong": strong_section}
    return "\n\n".join(write(record[name]) for name, write in writers.items() if name in record) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> str:
    """The first `texts` columns aligned left."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * texts + "--:|" * (len(head) - texts)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _source(source: Record) -> str:
    changed = " and changes" if source["modified"] else ""
    commit = (source["commit"] or "unknown")[:10]
    return f"`{source['command']}`; jax {source['versions']['jax']}; commit {commit}{changed}"


def _counts(found: Record) -> str:
    return ", ".join(f"{entry['count']} {kind}" for kind, entry in found.items()) or "none"


def devices_section(part: Record) -> str:
    """Fake devices: equality with one device, and collectives."""
    rows = []
    for row in part["rows"]:
        window, refresh = row["steps"]["window"], row["steps"]["refresh"]
        equal = [name for name, same in row["equal"].items() if same]
        rows.append([
            str(row["devices"]), row["preset"],
            "yes" if len(equal) == len(row["equal"]) else f"only {', '.join(equal) or 'nothing'}",
            _counts(refresh["layer"]), _counts(window["layer"]), _counts(window["all"])])
    return "\n".join([
        f"A small model on fake CPU devices in float32, dInfer's recipe ({_source(part['source'])}). Tokens, commit "
        "steps and forwards are compared with one device's; collectives are counted in the compiled program.", "",
        _table(("devices", "preset", "equal to one", "a layer of a full forward", "a layer of a window",
                "a whole window step"), rows, texts=6)])


def plan_section(entries: Sequence[Record]) -> str:
    """Bytes on each device of compiled programs."""
    head = ("model", "topology", "mesh", "parameters", "cache", "temporaries", "other", "total", "estimate", "allowed",
            "sums a layer", "Pallas kernels", "compile s")
    rows = []
    for entry in entries:
        asked = list(entry["asked"].values())
        if "plan" not in entry:
            rows.append([*asked, *[""] * 9, entry.get("refused", entry.get("skipped", ""))])
            continue
        found = entry["plan"]
        memory, steps = found["compiled"], found["steps"]
        kernels = {name for step in steps.values() for name in step["kernels"]}
        sums = "/".join(str(step["layer_collectives"].get("all-reduce", {}).get("count", 0)) for step in steps.values())
        rows.append([
            *asked, *(f"{memory[name] / 1e9:.3f}" for name in ("parameters", "cache", "temporaries", "other", "total")),
            f"{100 * (found['estimate']['total'] / memory['total'] - 1):+.1f} %", f"{found['device_memory'] / 1e9:.1f}",
            sums, ", ".join(sorted(kernels)) or "none", f"{found['compile_seconds']:.0f}"])
    return "\n".join([
        "GB on each device, as the compilers have it, for one row of 176 + 1024 tokens, full depth, bfloat16 "
        f"({_source(entries[0]['source'])}). The estimate is `djax plan --no-compile`'s total against the compiler's; "
        "sums are all-reduces of a layer in a full forward and in a window.", "", _table(head, rows, texts=3), "",
        predicted(entries)])


def predicted(entries: Sequence[Record]) -> str:
    """The roofline of the compiled programs."""
    rows = []
    for entry in (entry for entry in entries if "plan" in entry):
        found = entry["plan"]
        window, refresh = found["steps"]["window"], found["steps"]["refresh"]
        rows.append([
            *list(entry["asked"].values())[:2], f"{1e3 * window['seconds']:.3f}",
            f"{1e3 * window['exchange_seconds']:.3f}", f"{1e3 * refresh['seconds']:.3f}",
            str(found["forwards"]), str(found["refreshes"]), f"{found['tokens_per_second']:.0f}"])
    rate = next((entry["plan"]["tokens_per_forward"] for entry in entries if "plan" in entry), 0)
    return "\n".join([
        f"Their roofline at {rate:g} tokens a forward (peaks of data sheets; a real machine is slower):", "",
        _table(("model", "topology", "window ms", "of it collectives", "full forward ms", "forwards", "of them full",
                "tokens/s"), rows, texts=2)])


def strong_section(part: Record) -> str:
    """Milliseconds of a window over numbers of devices."""
    rows = part["rows"]
    counts = sorted({row["devices"] for row in rows})
    lines = []
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        mine = {row["devices"]: row for row in rows if (row["model"], row["kind"]) == (model, kind)}
        lines.append([model, kind, *(_point(mine[count]) for count in counts)])
    return "\n".join([
        "Predicted milliseconds of one windowed forward of one row, collectives in brackets, on the fastest mesh of "
        f"tensor and expert axes ({_source(part['source'])}). A star: more memory than such devices have.", "",
        _table(("model", "hardware", *map(str, counts)), lines, texts=2)])


def _point(row: Record) -> str:
    if row["mesh"] is None:
        return "-"
    return (f"{1e3 * row['window_seconds']:.2f} ({1e3 * row['window_exchange_seconds']:.2f})"
            + ("" if row["fits"] else " *"))


def shard_text(shard: Record) -> str:
    """Time of one shard, in a line."""
    return (
        f"one of {shard['devices']} on {shard['device']}: a window {1e3 * shard['window_compute_seconds']:.3f} ms and "
        f"{1e3 * shard['modelled_exchange_seconds']['window']:.3f} ms of collectives, modelled for {shard['kind']}; "
        f"a full forward {1e3 * shard['refresh_compute_seconds']:.3f} and "
        f"{1e3 * shard['modelled_exchange_seconds']['refresh']:.3f} ms; tokens/s "
        + ", ".join(f"{rate:.0f} at {tokens} a forward" for tokens, rate in shard["tokens_per_second"].items()))


def plot(part: Record, *paths: Path) -> None:
    """Milliseconds against devices, a panel for each model, to each of `paths` in the format of its name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "djax"  # the same record gives the same file
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in part["rows"]))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4 * len(models), 4), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        for kind in dict.fromkeys(row["kind"] for row in part["rows"]):
            rows = [row for row in part["rows"] if (row["model"], row["kind"]) == (model, kind) and row["mesh"]]
            axes.plot([row["devices"] for row in rows], [1e3 * row["window_seconds"] for row in rows],
                      color=_COLOURS[kind], label=kind)
            for fits in (True, False):
                points = [row for row in rows if row["fits"] == fits]
                axes.plot([row["devices"] for row in points], [1e3 * row["window_seconds"] for row in points], "o",
                          color=_COLOURS[kind], markerfacecolor=_COLOURS[kind] if fits else "white")
        axes.set(title=model, xlabel="devices (open: does not fit)", xscale="log", yscale="log")
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [str(count) for count in (1, 2, 4, 8, 16, 32, 64)])
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("ms of a windowed forward, predicted")
    panels[0][0].legend()
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def write(directory: Path, record: Record) -> None:
    """scaling.json, scaling.md, and where there is something to draw scaling.png and scaling.svg."""
    report.save(directory / "scaling.json", dict(record))
    (directory / "scaling.md").write_text(markdown(record), encoding="utf-8")
    if "strong" in record:
        plot(record["strong"], directory / "scaling.png", directory / "scaling.svg")
