"""Write the figures of the READMEs from the committed results.

    python -m benchmarks.readme          # rewrites the marked blocks
    python -m benchmarks.readme --check  # exit status 1 if one is out of date

A block stands between `<!-- figures NAME: ... -->` and `<!-- end of figures -->`; NAME is one of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import __main__ as decode
from benchmarks.quality import report as quality_report
from benchmarks.rl import report as rl_report
from benchmarks.scaling import report as scaling_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(
    r"(<!-- figures (\w+): python -m benchmarks\.readme -->\n\n).*?(\n\n<!-- end of figures -->)", re.DOTALL)


def decode_section(machines: Sequence[dict[str, Any]]) -> str:
    """djax against its PyTorch twin: a row for every machine, then every machine's rows."""
    head = ("machine", "PyTorch / djax time", *(f"{name}, {span}" for name, span in decode.KINDS), "a large product")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for record in machines:
        cells = (record["machine"], _ratios(record), *(_rates(record, *kind) for kind in decode.KINDS), _large(record))
        lines.append(f"| {' | '.join(cells)} |")
    model = machines[0]["settings"]["model"]
    return "\n".join([
        f"A random checkpoint (hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{model['num_experts']} experts top {model['num_experts_per_tok']}, vocabulary {model['vocab_size']}) on CPU, "
        "float32, against transformers' model in an eager loop with the same strategy and cache, in turn; a ratio "
        "above 1 means that djax is faster. It is also the matrix libraries': beside it stand GFLOP/s of XLA / PyTorch "
        "in a layer's products, for the positions of a window and of a refresh, from the lowest to the highest median "
        "of the rows below, and in a large product.",
        "", *lines, *(line for record in machines for line in ("", _machine_rows(record)))])


def _machine_rows(record: dict[str, Any]) -> str:
    """One machine's table. Its rates are those of most forwards: of windows where a row has them."""
    kinds = list(dict(decode.KINDS)) if any(row["rates"] for row in record["rows"]) else []
    head = ("recipe, batch", "NFE", "TPF", "TPS djax", "TPS PyTorch", "PyTorch / djax time", "same tokens",
            "compile s", *(f"{name}, GFLOP/s" for name in kinds))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in record["rows"]:
        djax, ratio = row["djax"], row["ratio"]
        rates = {name: " / ".join(f"{product[engine]['median']:.0f}" for engine in ("djax", "twin"))
                 for product in reversed(row["rates"] or ()) for name in [product["name"]]}
        cells = (
            f"{row['case']['recipe']}, {row['case']['batch']}", f"{sum(djax['nfe']) / len(djax['nfe']):.1f}",
            f"{djax['tokens_per_forward']:.2f}", f"{djax['tokens_per_second']:.1f}",
            f"{row['twin']['tokens_per_second']:.1f}",
            f"{ratio['median']:.2f} ({ratio['minimum']:.2f} to {ratio['maximum']:.2f})",
            "yes" if row["agreement"]["tokens"] else f"{100 * row['agreement']['share_of_equal_tokens']:.1f} %",
            f"{djax['compile_seconds']:.1f}", *(rates[name] for name in kinds))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([
        f"{record['machine']}; the ratio is the median over {record['settings']['pairs']} pairs with its range "
        f"(`{record['command']}`; jax {record['versions']['jax']}, torch {record['versions']['torch']}; "
        f"commit {record['commit'][:10]}):",
        "", *lines])


def _ratios(record: dict[str, Any]) -> str:
    ratios = [row["ratio"]["median"] for row in record["rows"]]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _rates(record: dict[str, Any], name: str, span: str) -> str:
    """GFLOP/s of one kind of product, XLA / PyTorch."""
    measured = [product for row in record["rows"] for product in row["rates"] or ()
                if (product["name"], product["span"]) == (name, span)]
    if not measured:
        return "not measured"
    medians = [[product[engine]["median"] for product in measured] for engine in ("djax", "twin")]
    return " / ".join(f"{min(of):.0f} to {max(of):.0f}" for of in medians)


def _large(record: dict[str, Any]) -> str:
    return " / ".join(f"{record['matmul_gflops'][engine]:.0f}" for engine in ("djax", "twin"))


def _speed(record: dict[str, Any]) -> tuple[str, str]:
    """A row of the summary: the machine and the rates that are measured on it, and the ratios."""
    rates = [f"{name} {_rates(record, name, 'refresh')}" for name in dict(decode.KINDS)
             if any(row["rates"] for row in record["rows"])] or [f"a large product {_large(record)}"]
    return (f"against transformers' model in an eager PyTorch loop, same decoder, on {record['machine']} "
            f"(GFLOP/s of XLA / PyTorch there: {', '.join(rates)})", f"{_ratios(record)} times as fast")


def load_section(record: dict[str, Any]) -> str:
    """Loading a full-size checkpoint, in a sentence and a table."""
    rows = [
        ("parameters", f"{record['parameters'] / 1e9:.3f} B, {record['parameter_bytes'] / 1e9:.2f} GB"),
        ("load", f"{record['load_seconds']:.1f} s"),
        ("peak host memory", f"{record['host_peak_bytes'] / 1e9:.2f} GB, {record['host_peak_ratio']:.3f} x parameters"),
        ("one windowed forward", f"{record['forward']['window']} of {record['forward']['canvas']} positions, "
                                 f"{record['forward']['second_seconds']:.1f} s"),
    ]
    return "\n".join([
        f"Loading a synthetic full-size LLaDA-MoE checkpoint in {record['shards']} shards as bfloat16 "
        f"(`{record['command']}`; {record['machine']}; jax {record['jax']}; commit {record['commit'][:10]}):", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def quality_section(record: dict[str, Any]) -> str:
    """Accuracy and forwards of every recipe on the bundled model."""
    plot = "![Exact match against tokens per forward](results/quality.png)"
    return f"{quality_report.summary(record)}\n\n{plot}"


def scaling_section(record: dict[str, Any]) -> str:
    """Speed and memory of several devices, measured on fake ones and planned for real ones."""
    plot = "![Predicted scaling of one forward](results/scaling.png)"
    return f"{scaling_report.markdown(record).rstrip()}\n\n{plot}"


def rl_section(record: dict[str, Any]) -> str:
    """Policy gradients on a spoiled model."""
    plot = "![Held-out reward against updates](results/rl/rl.png)"
    return f"{rl_report.markdown(record['runs']).rstrip()}\n\n{plot}"


def summary() -> str:
    """One table: the figures that a newcomer asks for, each from its own record."""
    quality, load, rl = (_record(name) for name in ("quality.json", "load.json", "rl/rl.json"))
    rows = {(row["checkpoint"], row["recipe"], row["cache"]): row for row in quality["rows"]}
    reference, dinfer = rows["base", "reference", False], rows["base", "dinfer", True]
    fast = rows["base", "fast_dllm", True]
    run = rl["runs"]["optax-trace-colocated"]
    table = [
        ("bundled model, one token a step, no cache", f"{reference['accuracy']:.1f} % right answers, "
         f"{reference['tokens_per_second']:.0f} tokens/s"),
        ("the same with `dinfer()`",
         f"{dinfer['accuracy']:.1f} %, {dinfer['tokens_per_forward']:.1f} tokens a forward, "
         f"{dinfer['speedup']['median']:.1f} times as fast"),
        ("the same with `fast_dllm()`", f"{fast['accuracy']:.1f} %, {fast['tokens_per_forward']:.1f} tokens a forward, "
         f"{fast['speedup']['median']:.1f} times as fast"),
        *map(_speed, decode.records(RESULTS / "decode.json")),
        (f"loading LLaDA-MoE, {load['parameter_bytes'] / 1e9:.1f} GB in bfloat16",
         f"{load['load_seconds']:.0f} s, peak host memory {load['host_peak_ratio']:.2f} times the parameters"),
        (f"GRPO on a spoiled model, {run['updates']} updates in {run['seconds'] / 60:.1f} minutes",
         f"held-out reward {100 * run['held_out'][0]:.0f} % → {100 * run['held_out'][1]:.0f} %"),
    ]
    hardware = quality["hardware"]
    return "\n".join([f"| float32 on {hardware['cores']} cores of an {hardware['cpu']} | |", "|---|---|",
                      *(f"| {name} | {value} |" for name, value in table)])


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "quality": lambda: quality_section(_record("quality.json")),
    "decode": lambda: decode_section(decode.records(RESULTS / "decode.json")),
    "load": lambda: load_section(_record("load.json")),
    "scaling": lambda: scaling_section(_record("scaling.json")),
    "rl": lambda: rl_section(_record("rl/rl.json")),
}


def with_figures(text: str) -> str:
    """The text with all its blocks written anew; each has to be one of `BLOCKS`."""
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}{block[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the blocks of every README; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a README is out of date")
    check = parser.parse_args(arguments).check
    found: list[str] = []
    stale = False
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        found += [block[2] for block in BLOCK.finditer(text)]
        new = with_figures(text)
        stale |= new != text
        if not check:
            readme.write_text(new, encoding="utf-8")
    missing = sorted(BLOCKS.keys() - set(found))
    if missing:
        print(f"no README has the blocks {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing) or (check and stale))


if __name__ == "__main__":
    sys.exit(main())
