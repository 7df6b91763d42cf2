"""dInfer's table on the bundled model: accuracy, forwards and speed of every recipe, with and without a cache.

    python -m benchmarks.quality                       # every recipe, 500 held-out prompts a task
    python -m benchmarks.quality --prompts 50 --recipes reference dinfer

Prompts are the first held-out ones of each task (`djax.tasks.held_out_set`), never trained on. All recipes take
a batch of prompts in turn, so that their times are compared side by side; what is done is kept in a file beside the
results, and a run that was stopped goes on there. Writes quality.json, quality.md, quality.png and quality.svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import djax
from benchmarks.harness import report
from benchmarks.quality import report as quality_report
from djax import assets, recipes, tasks
from djax.engine.results import tokens_per_forward, tokens_per_second
from djax.parts.cache_policies import Dual
from djax.recipes import Recipe

RESULTS = Path(__file__).parents[1] / "results"
MAX_NEW_TOKENS, BLOCK_LENGTH = 128, 64
REFERENCE = "reference"


def _recipes() -> dict[str, tuple[Recipe, Recipe]]:
    """Each recipe without and with a cache, at its published settings; the cache is the one its paper decodes with."""
    vicinity = recipes.dinfer().cache_policy
    credit = recipes.dinfer_credit()
    return {
        REFERENCE: (recipes.llada(), recipes.llada().replace(cache_policy=Dual())),
        "fast_dllm": (recipes.fast_dllm(cache="none"), recipes.fast_dllm(cache="dual")),
        "dinfer": (recipes.dinfer(cache=False), recipes.dinfer()),
        "dinfer_credit": (credit, credit.replace(cache_policy=vicinity)),
        "dinfer_hierarchical": (recipes.dinfer_hierarchical(cache=False), recipes.dinfer_hierarchical()),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    checkpoint: str
    recipe: str
    cache: bool

    @property
    def name(self) -> str:
        """How it is called in files and tables."""
        return f"{self.checkpoint}/{self.recipe}/{'cache' if self.cache else 'no cache'}"

    def build(self) -> Recipe:
        """Its parts."""
        return _recipes()[self.recipe][self.cache]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A batch of prompts of one task, decoded."""

    seconds: float
    tokens: list[int]
    """Tokens of each row, up to and including the first EOS."""
    nfe: list[int]
    exact: list[bool]
    """Whether the whole worked answer is right."""
    final: list[bool]
    """Whether what follows the last marker is."""


def decode(lm: djax.DiffusionLM, case: Case, examples: Sequence[tasks.Example]) -> Outcome:
    """One batch; compiled beforehand, so the time is the decoding's."""
    prompts: list[Any] = [example.messages for example in examples]
    start = time.perf_counter()
    got = lm.generate(prompts, recipe=case.build(), max_new_tokens=MAX_NEW_TOKENS, block_length=BLOCK_LENGTH)
    seconds = time.perf_counter() - start
    pairs = list(zip(examples, got.text or (), strict=True))
    return Outcome(
        seconds=seconds, tokens=got.lengths.tolist(), nfe=got.nfe.tolist(),
        exact=[tasks.TASKS[example.task].verify(example.prompt, text) for example, text in pairs],
        final=[tasks.TASKS[example.task].verify_final(example.prompt, text) for example, text in pairs])


class Log:
    """Outcomes by (case, task, batch), kept in a JSON Lines file as they come."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open `path`. Raises ValueError if its outcomes are of other settings."""
        self.path, self.outcomes = path, dict[tuple[str, str, int], Outcome]()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            del lines[-1]  # of a run that was killed while it wrote
        if lines and json.loads(lines[0]) != settings:
            raise ValueError(f"{path}: holds outcomes of other settings ({lines[0].strip()}); remove it, or use "
                             "--output")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines or [json.dumps(settings) + "\n"]), encoding="utf-8")
        for line in lines[1:]:
            record = json.loads(line)
            key = record.pop("case"), record.pop("task"), record.pop("batch")
            self.outcomes[key] = Outcome(**record)

    def add(self, case: str, task: str, batch: int, outcome: Outcome) -> None:
        """Keep one more."""
        self.outcomes[case, task, batch] = outcome
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "task": task, "batch": batch, **vars(outcome)}) + "\n")


def summarize(cases: Sequence[Case], log: Log) -> list[dict[str, Any]]:
    """The table's rows, from the batches that every case has decoded."""
    shared = set.intersection(*({key[1:] for key in log.outcomes if key[0] == case.name} for case in cases))
    baseline = f"base/{REFERENCE}/no cache"
    rows = []
    for case in cases:
        mine = {key: log.outcomes[case.name, *key] for key in sorted(shared)}
        reference = {key: log.outcomes.get((baseline, *key)) for key in mine}
        ratios = [other.seconds / outcome.seconds for key, outcome in mine.items() if (other := reference[key])]
        rows.append({
            **dataclasses.asdict(case), **_accuracy(mine, "exact"),
            "difference": _difference(mine, reference), "final": _accuracy(mine, "final")["accuracy"],
            "nfe": _total(mine, "nfe") / sum(len(outcome.nfe) for outcome in mine.values()),
            "tokens_per_forward": float(tokens_per_forward(_total(mine, "tokens"), _total(mine, "nfe"))),
            "tokens_per_second": tokens_per_second(
                _total(mine, "tokens"), sum(outcome.seconds for outcome in mine.values())),
            "speedup": dataclasses.asdict(report.Spread.of(ratios)) if ratios else None,
            "prompts": sum(len(outcome.exact) for outcome in mine.values()),
            "tasks": {task: _task(mine, task) for task in sorted({key[0] for key in mine})}})
    return rows


_Outcomes = Mapping[tuple[str, int], Outcome]


def _total(outcomes: _Outcomes, field: str) -> int:
    return sum(sum(getattr(outcome, field)) for outcome in outcomes.values())


def _flags(outcomes: Mapping[tuple[str, int], Any], task: str, field: str) -> list[bool]:
    return [flag for key, outcome in outcomes.items() if key[0] == task for flag in getattr(outcome, field)]


def _accuracy(outcomes: _Outcomes, field: str) -> dict[str, float]:
    """Mean over tasks, in percent, with its standard error."""
    shares = [_flags(outcomes, task, field) for task in sorted({key[0] for key in outcomes})]
    means = [sum(flags) / len(flags) for flags in shares]
    variance = sum(mean * (1 - mean) / len(flags) for mean, flags in zip(means, shares, strict=True))
    return {"accuracy": 100 * sum(means) / len(means), "standard_error": 100 * variance**0.5 / len(means)}


def _difference(outcomes: _Outcomes, reference: Mapping[tuple[str, int], Outcome | None]) -> dict[str, float] | None:
    """Accuracy less the reference's, with the standard error of the paired difference."""
    if any(outcome is None for outcome in reference.values()):
        return None
    means, variance = [], 0.0
    for task in sorted({key[0] for key in outcomes}):
        pairs = zip(_flags(outcomes, task, "exact"), _flags(reference, task, "exact"), strict=True)
        steps = [int(ours) - int(theirs) for ours, theirs in pairs]
        mean = sum(steps) / len(steps)
        means.append(mean)
        variance += sum((step - mean) ** 2 for step in steps) / len(steps) ** 2
    return {"points": 100 * sum(means) / len(means), "standard_error": 100 * variance**0.5 / len(means)}


def _task(outcomes: _Outcomes, task: str) -> dict[str, float]:
    mine = {key: outcome for key, outcome in outcomes.items() if key[0] == task}
    return {"accuracy": _accuracy(mine, "exact")["accuracy"], "prompts": len(_flags(mine, task, "exact")),
            "tokens_per_forward": float(tokens_per_forward(_total(mine, "tokens"), _total(mine, "nfe")))}


def batches(prompts: int, size: int) -> Iterator[tuple[str, int, list[tasks.Example]]]:
    """(task, number, examples), the tasks in turn so that a run that was stopped has some of each."""
    sets = {name: tasks.held_out_set(name, prompts) for name in tasks.TASKS}
    for number, name in itertools.product(range(-(-prompts // size)), sets):
        yield name, number, sets[name][number * size : (number + 1) * size]


def run(cases: Sequence[Case], log: Log, *, prompts: int, size: int, checkpoints: Mapping[str, str]) -> None:
    """Decode what is missing."""
    todo = [(case, task, number, examples) for task, number, examples in batches(prompts, size) for case in cases
            if (case.name, task, number) not in log.outcomes]
    if not todo:
        return
    models = {name: djax.load(checkpoints[name], dtype="float32") for name in {case.checkpoint for case, *_ in todo}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("quality", total=len(todo))
        for case, task, number, examples in todo:
            progress.update(bar, description=f"{task}, {case.name}")
            lm = models[case.checkpoint]
            before = lm.compile_count
            outcome = decode(lm, case, examples)
            if lm.compile_count > before:  # once more: its time counts
                outcome = decode(lm, case, examples)
            log.add(case.name, task, number, outcome)
            progress.advance(bar)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts of each task")
    parser.add_argument("--batch", type=int, default=50, help="prompts decoded together")
    parser.add_argument("--recipes", nargs="+", choices=list(_recipes()), default=list(_recipes()))
    parser.add_argument("--checkpoints", nargs="+", choices=list(assets.NAMES), default=list(assets.NAMES))
    parser.add_argument("--skip", nargs="+", default=[], metavar="ROW", help="rows left out, by how their names begin: "
                        "compressed/reference/no, say")
    parser.add_argument("--build", type=Path, help="directory of `python -m djax.train.bundled`, not the bundled ones")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("prompts", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}; allowed at least 1")
    cases = [Case(checkpoint, recipe, cache) for checkpoint in options.checkpoints for recipe in options.recipes
             for cache in (False, True)]
    cases = [case for case in cases if not case.name.startswith(tuple(options.skip))]
    if not cases:
        parser.error(f"--skip: got {' '.join(options.skip)}; allowed what leaves a row")
    checkpoints = {name: assets.PREFIX + name if options.build is None else str(options.build / name)
                   for name in assets.NAMES}
    settings = {"prompts": options.prompts, "batch": options.batch, "max_new_tokens": MAX_NEW_TOKENS,
                "block_length": BLOCK_LENGTH, "dtype": "float32",
                "weights": {name: quality_report.digest(checkpoints[name]) for name in assets.NAMES}}
    try:
        log = Log(options.output / "quality.log.jsonl", settings)
    except ValueError as error:
        parser.error(str(error))
    run(cases, log, prompts=options.prompts, size=options.batch, checkpoints=checkpoints)
    record = {**report.provenance("benchmarks.quality"), "settings": settings, "rows": summarize(cases, log)}
    quality_report.write(options.output, record)
    print(quality_report.markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
