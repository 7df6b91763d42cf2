"""Write the README's benchmark section from the committed results.

    python -m benchmarks.readme          # rewrites the section
    python -m benchmarks.readme --check  # exit status 1 if it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import quality_report, rl_report, scaling_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: python -m benchmarks.readme -->", "<!-- end of benchmarks -->"


def decode_section(record: dict[str, Any]) -> str:
    """djax against its PyTorch twin."""
    head = ("recipe, batch", "NFE", "TPF", "TPS djax", "TPS PyTorch", "PyTorch / djax time", "same tokens", "compile s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in record["rows"]:
        djax, ratio = row["djax"], row["ratio"]
        cells = (
            f"{row['case']['recipe']}, {row['case']['batch']}", f"{sum(djax['nfe']) / len(djax['nfe']):.1f}",
            f"{djax['tokens_per_forward']:.2f}", f"{djax['tokens_per_second']:.1f}",
            f"{row['twin']['tokens_per_second']:.1f}",
            f"{ratio['median']:.2f} ({ratio['minimum']:.2f} to {ratio['maximum']:.2f})",
            "yes" if row["agreement"]["tokens"] else f"{100 * row['agreement']['share_of_equal_tokens']:.1f} %",
            f"{djax['compile_seconds']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    model, settings = record["settings"]["model"], record["settings"]
    return "\n".join([
        f"A random checkpoint (hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{model['num_experts']} experts top {model['num_experts_per_tok']}, vocabulary {model['vocab_size']}) on CPU, "
        "float32, against transformers' model in an eager loop with the same strategy and cache, in turn; the "
        f"ratio is the median over {settings['pairs']} pairs with its range, above 1 djax is faster "
        f"(`{record['command']}`; {record['hardware']['cpu']}, {settings['cores']} cores; "
        f"jax {record['versions']['jax']}, torch {record['versions']['torch']}; commit {record['commit'][:10]}). "
        f"Part of it is the matrix library's: a large float32 product runs at "
        f"{record['matmul_gflops']['djax']:.0f} GFLOP/s in XLA and {record['matmul_gflops']['twin']:.0f} in PyTorch "
        "on this processor.",
        "", *lines])


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
    plot = "![Exact match against tokens per forward](benchmarks/results/quality.png)"
    return f"{quality_report.summary(record)}\n\n{plot}"


def scaling_section(record: dict[str, Any]) -> str:
    """What several devices give and hold, measured on fake ones and planned for real ones."""
    plot = "![Predicted scaling of one forward](benchmarks/results/scaling.png)"
    return f"{scaling_report.markdown(record).rstrip()}\n\n{plot}"


def rl_section(record: dict[str, Any]) -> str:
    """What policy gradients make of a spoiled model."""
    plot = "![Held-out reward against updates](benchmarks/results/rl/rl.png)"
    return f"{rl_report.markdown(record['runs']).rstrip()}\n\n{plot}"


def section() -> str:
    """The whole section, from every result that is there."""
    writers = {"quality.json": quality_section, "decode.json": decode_section, "load.json": load_section,
               "scaling.json": scaling_section, "rl/rl.json": rl_section}
    texts = [write(json.loads((RESULTS / name).read_text())) for name, write in writers.items()
             if (RESULTS / name).exists()]
    return "\n\n".join([BEGIN, *texts, END])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is out of date")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    new = head + section() + rest.split(END)[1]
    if check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
