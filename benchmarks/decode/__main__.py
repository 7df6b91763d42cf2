"""djax against its PyTorch twin: the same checkpoint, decoder, cache and prompts, in turn.

    python -m benchmarks.decode            # mid-size random checkpoint, minutes
    python -m benchmarks.decode --tiny     # seconds; says nothing about speed

A pair is one generation by each engine, alternating who goes first. Both engines wait in worker processes
and only one computes at a time. Every pair gives the ratio twin / djax of their times: above 1 djax is faster.
Compile time (djax) and the choice of experts implementation and threads (twin) come before the first pair and are
reported apart. Both decode the same tokens unless a float32 difference flips a decision; the record says
whether they did, and the ratio per forward does not depend on it.

A ratio is also the matrix libraries', and which of them is faster depends on the processor: after every pair both
engines multiply what a layer multiplies (`benchmarks.decode.products`), and the record has both rates beside the ratio.
The file holds one record per machine; a run replaces its own machine's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.decode import products
from benchmarks.decode.engines import Case, Run, Worker
from benchmarks.harness import checkpoint, report
from djax.engine.results import tokens_per_forward, tokens_per_second

RESULTS = Path(__file__).parents[1] / "results" / "decode.json"
RECIPES: dict[str, dict[str, Any]] = {
    "none": {"threshold": 0.9, "cache": "none"},
    "dual": {"threshold": 0.9, "cache": "dual"},
    "vicinity": {"threshold": 0.8, "cache": "vicinity", "before": 16, "after": 16, "warmup": 4},
}
"""Fast-dLLM without and with its dual cache; dInfer's vicinity refresh with warm-up, hard tokens."""
COLUMNS = ("recipe, batch", "NFE", "TPF", "TPS\ndjax", "TPS\ntwin", "ms/fwd\ndjax", "ms/fwd\ntwin",
           "twin / djax\ntime", "twin / djax\nper forward", "same\ntokens", "compile\ns")
KINDS = tuple((name, span) for name in ("attention", "experts") for span in ("window", "refresh"))
"""The products whose rates are shown."""


def cases(options: argparse.Namespace) -> list[Case]:
    """The rows asked for."""
    lengths: dict[str, Any] = {"prompt_length": 8, "max_new_tokens": 16, "block_length": 8} if options.tiny else {
        "prompt_length": 64, "max_new_tokens": 128, "block_length": 32}
    widths: dict[str, Any] = {"before": 2, "after": 2, "warmup": 1} if options.tiny else {}
    return [Case(recipe=name, batch=batch, **(RECIPES[name] | (widths if name == "vicinity" else {})), **lengths)
            for name in options.recipes for batch in options.batches]


def forwards(commit_step: Int[np.ndarray, "B T"], case: Case) -> int:
    """Forwards of the whole batch: each block takes as many as its slowest row."""
    blocks = commit_step[:, case.prompt_length:].reshape(len(commit_step), -1, case.block_length).max(-1) + 1
    return int(np.diff(blocks, axis=1, prepend=0).max(0).sum())


def generated(tokens: Int[np.ndarray, "B T"], case: Case, eos_id: int) -> Int[np.ndarray, " B"]:
    """Generated tokens of each row up to and including the first EOS."""
    ends = tokens[:, case.prompt_length:] == eos_id
    return np.where(ends.any(1), ends.argmax(1) + 1, case.max_new_tokens)


def engine_record(runs: Sequence[Run], case: Case, eos_id: int) -> dict[str, Any]:
    """One engine's figures in one case."""
    seconds = report.Spread.of([run.seconds for run in runs])
    last = runs[-1]
    nfe, count, length = last.commit_step.max(1) + 1, forwards(last.commit_step, case), generated(
        last.tokens, case, eos_id)
    return {
        "seconds": dataclasses.asdict(seconds),
        "cpu_seconds": dataclasses.asdict(report.Spread.of([run.cpu_seconds for run in runs])),
        "nfe": nfe.tolist(), "forwards": count, "tokens": length.tolist(),
        "tokens_per_forward": float(tokens_per_forward(length.sum(), nfe.sum())),
        "tokens_per_second": tokens_per_second(length, seconds.median),
        "milliseconds_per_forward": 1e3 * seconds.median / count,
    }


def case_record(case: Case, pairs: Sequence[tuple[Run, Run]], prepared: dict[str, Any], eos_id: int) -> dict[str, Any]:
    """The record of one case; `pairs` are (djax, twin)."""
    ours, theirs = ([pair[side] for pair in pairs] for side in range(2))
    djax, twin = engine_record(ours, case, eos_id), engine_record(theirs, case, eos_id)
    first, second = pairs[-1]
    new = slice(case.prompt_length, None)
    ratios = [right.seconds / left.seconds for left, right in pairs]
    same_work = djax["forwards"] / twin["forwards"]
    return {
        "case": dataclasses.asdict(case),
        "djax": djax | prepared["djax"] | {
            "compile_seconds": prepared["djax"]["first_call_seconds"] - djax["seconds"]["median"]},
        "twin": twin | prepared["twin"],
        "pairs": [{"djax_seconds": left.seconds, "twin_seconds": right.seconds, "ratio": ratio,
                   "djax_cpu_seconds": left.cpu_seconds, "twin_cpu_seconds": right.cpu_seconds}
                  for (left, right), ratio in zip(pairs, ratios, strict=True)],
        "ratio": dataclasses.asdict(report.Spread.of(ratios)),
        "ratio_per_forward": dataclasses.asdict(report.Spread.of([ratio * same_work for ratio in ratios])),
        "agreement": {
            "tokens": bool((first.tokens == second.tokens).all()),
            "commit_steps": bool((first.commit_step == second.commit_step).all()),
            "nfe": djax["nfe"] == twin["nfe"],
            "share_of_equal_tokens": float((first.tokens == second.tokens)[:, new].mean()),
        },
    }


def rates_record(
    of: Sequence[products.Product], measured: Sequence[dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """Every product with the spread of both libraries' GFLOP/s; `measured` has one entry a pair."""
    return [
        dataclasses.asdict(product) | {
            engine: dataclasses.asdict(report.Spread.of([rates[engine][index] for rates in measured]))
            for engine in ("djax", "twin")}
        for index, product in enumerate(of)]


def measure(
    engines: dict[str, Worker], case: Case, *, pairs: int, prompts: Int[np.ndarray, "B P"], shapes: dict[str, Any],
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Prepare both engines, then run the pairs, each followed by the products."""
    prepared, multiplied = {}, products.of_case(case, shapes)
    for name, engine in engines.items():
        advance(f"{case.recipe}, batch {case.batch}: {name} gets ready")
        prepared[name] = engine.prepare(case, prompts)
        engine.rates(multiplied)  # compiles
    done, rates = [], []
    for number in range(pairs):
        advance(f"{case.recipe}, batch {case.batch}: pair {number + 1}")
        order = ("djax", "twin") if number % 2 == 0 else ("twin", "djax")
        runs = {name: engines[name].run(case, prompts) for name in order}
        done.append((runs["djax"], runs["twin"]))
        rates.append({name: engines[name].rates(multiplied) for name in order})
    return case_record(case, done, prepared, shapes["eos_token_id"]) | {"rates": rates_record(multiplied, rates)}


def records(path: Path) -> list[dict[str, Any]]:
    """Records of the file, one per machine; nothing where there is no file.

    Raises:
        ValueError: the file is something else.
    """
    if not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("benchmark") != "decode" or "machines" not in held:
        raise ValueError(f"{path} holds no records of this benchmark, one per machine")
    return held["machines"]


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write a machine's record, in place of the one it has or behind the others'."""
    held = records(path)
    names = [other["machine"] for other in held]
    place = names.index(record["machine"]) if record["machine"] in names else len(held)
    report.save(path, {"benchmark": "decode", "machines": [*held[:place], record, *held[place + 1:]]})


def show_rates(record: dict[str, Any], console: Console) -> None:
    """The rates beside the ratios."""
    columns = ["recipe, batch", "twin / djax\ntime", *(
        f"{name}\n{span}\n{library}" for name, span in KINDS for library in ("XLA", "PyTorch"))]
    rows = []
    for row in record["rows"]:
        found = {(product["name"], product["span"]): product for product in row["rates"]}
        rows.append((f"{row['case']['recipe']}, {row['case']['batch']}", f"{row['ratio']['median']:.2f}", *(
            report.Spread(**found[kind][engine]).show(0).replace(" (", "\n(") if kind in found else ""
            for kind in KINDS for engine in ("djax", "twin"))))
    console.print(report.table("GFLOP/s of float32 products of a layer's sizes, measured after every pair",
                               columns, rows))


def show(record: dict[str, Any], console: Console) -> None:
    """The table, and what it does not show."""
    rows = []
    for row in record["rows"]:
        djax, twin, case = row["djax"], row["twin"], row["case"]
        mean = lambda values: f"{float(np.mean(values)):.1f}"  # noqa: E731
        share = row["agreement"]["share_of_equal_tokens"]
        rows.append((
            f"{case['recipe']}, {case['batch']}",
            mean(djax["nfe"]) if row["agreement"]["nfe"] else f"{mean(djax['nfe'])} / {mean(twin['nfe'])}",
            f"{djax['tokens_per_forward']:.2f}", f"{djax['tokens_per_second']:.1f}",
            f"{twin['tokens_per_second']:.1f}", f"{djax['milliseconds_per_forward']:.1f}",
            f"{twin['milliseconds_per_forward']:.1f}", report.Spread(**row["ratio"]).show(),
            report.Spread(**row["ratio_per_forward"]).show(),
            "yes" if row["agreement"]["tokens"] else f"{100 * share:.1f} %", f"{djax['compile_seconds']:.1f}"))
    hardware, settings = record["hardware"], record["settings"]
    title = f"djax against transformers + eager PyTorch, float32, {hardware['cpu']}, {settings['cores']} cores"
    console.print(report.table(title, COLUMNS, rows))
    console.print("twin / djax: pair by pair, median (lowest to highest); above 1 djax is faster.", highlight=False)
    speed = record["matmul_gflops"]
    show_rates(record, console)
    console.print(f"A large float32 product: {speed['djax']:.0f} GFLOP/s in XLA, {speed['twin']:.0f} in PyTorch.",
                  highlight=False)
    load = record["load_average"]
    if load is not None and load > 1.5 * settings["cores"]:
        console.print(f"The machine was shared: load average {load:.1f} on {settings['cores']} cores.")


def make_console() -> Console:
    """A console wide enough for the table where there is no terminal to fit it to."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="pairs per row (default 7)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME",
                        help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--cores", type=int, help="use this many of the cores (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the prompts")
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint: seconds, no figures worth quoting")
    parser.add_argument("--out", type=Path, help="JSON file, one record per machine "
                        "(default benchmarks/results/decode.json; with --tiny none)")
    options = parser.parse_args(arguments)
    if options.out is None and not options.tiny:
        options.out = RESULTS
    try:
        records(options.out or RESULTS)
    except ValueError as error:
        parser.error(f"--out: {error}")
    for name, values in (("--pairs", [options.pairs]), ("--batches", options.batches)):
        if min(values) < 1:
            parser.error(f"{name}: got {min(values)}; it must be at least 1")
    if options.cores is not None and not 1 <= options.cores <= report.cores():
        parser.error(f"--cores: got {options.cores}; allowed 1 to {report.cores()}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options, console = parse(arguments), make_console()
    if options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # the workers inherit it
    shapes = checkpoint.TINY if options.tiny else checkpoint.MID_SIZE
    rows: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    wanted = cases(options)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   console=console, transient=True)
    with tempfile.TemporaryDirectory(prefix="djax-decode-") as name, bar:
        task = bar.add_task("writing the checkpoint", total=3 + len(wanted) * (options.pairs + 2))

        def advance(description: str) -> None:
            bar.update(task, description=description, advance=1)

        parameters = checkpoint.write(Path(name), shapes, seed=options.seed)
        try:
            for engine in ("djax", "twin"):
                advance(f"loading {engine}")
                workers[engine] = Worker(engine, Path(name))
            for case in wanted:
                prompts = checkpoint.prompts(
                    shapes, batch=case.batch, length=case.prompt_length, seed=options.seed + 1)
                rows.append(measure(workers, case, pairs=options.pairs, prompts=prompts,
                                    shapes=shapes, advance=advance))
        finally:
            for worker in workers.values():
                worker.close()
        advance("done")
    record = {
        "machine": report.machine(), **report.provenance("benchmarks.decode"),
        "settings": {"cores": report.cores(), "pairs": options.pairs, "seed": options.seed, "dtype": "float32",
                     "parameters": parameters, "tiny": options.tiny, "model": shapes},
        **{figure: {engine: worker.loaded[figure] for engine, worker in workers.items()}
           for figure in ("load_seconds", "matmul_gflops")},
        "djax_faster_in_every_row": all(row["ratio"]["median"] > 1 for row in rows), "rows": rows,
    }
    show(record, console)
    if options.out is not None:
        keep(options.out, record)
        console.print(f"[dim]{options.out}[/dim]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
