"""Short text tasks with worked steps: endless seeded examples, verifiers without a model.

    for example in tasks.examples("sort", split="train", seed=0, start=step * batch): ...
    tasks.TASKS["sort"].verify(prompt, completion)

A prompt is for training or held out by its own text (`split_of`), so no seed mixes the two.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from djax.errors import ArgumentError, check_choice, check_integer
from djax.tasks.addition import ADDITION
from djax.tasks.base import MARKER, SPLITS, Example, Split, Task, split_of
from djax.tasks.expressions import EXPRESSION
from djax.tasks.lists import SORT, UNIQUE_SUM
from djax.tasks.records import RECORD

__all__ = ["MARKER", "SPLITS", "TASKS", "Example", "Split", "Task", "examples", "held_out_set", "split_of"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (ADDITION, SORT, UNIQUE_SUM, EXPRESSION, RECORD)})

# One draw in twenty is held out: 2000 draws without one have a chance of 1e-45, unless the prompts are few.
_MAX_DRAWS = 2000


def examples(task: str | None, *, split: Split, seed: int, start: int = 0) -> Iterator[Example]:
    """An endless stream of examples; item `i` depends on (task, split, seed, i) alone.

    Args:
        task: a name in `TASKS`; None takes the tasks in turn. Item `i` of the mix is item `i` of its task's stream.
        split: "train" or "held_out".
        seed: at least 0.
        start: the index of the first item, at least 0: a resumed run goes on where it stopped.

    Raises:
        ValueError: an unknown task or split, or a negative number.
    """
    names = _names(task)
    check_choice("split", split, SPLITS)
    check_integer("seed", seed, 0, 2**63 - 1)
    check_integer("start", start, 0, 2**63 - 1)
    return (_example(TASKS[names[index % len(names)]], split=split, seed=seed, index=index)
            for index in itertools.count(start))


def held_out_set(task: str | None, count: int, *, seed: int = 0) -> list[Example]:
    """The first `count` distinct held-out examples of the stream; a larger set starts with the smaller one.

    Args:
        task: a name in `TASKS`; None takes the tasks in turn.
        count: how many, at least 0.
        seed: at least 0.

    Raises:
        ValueError: an unknown task, a negative number, or a task with too few held-out prompts.
    """
    check_integer("count", count, 0, 2**63 - 1)
    found: dict[str, Example] = {}
    for example in itertools.islice(examples(task, split="held_out", seed=seed), 10 * count + 100):
        if len(found) == count:
            break
        found.setdefault(example.prompt, example)
    if len(found) < count:
        raise ArgumentError("count", count, allowed=f"{len(found)}, as many distinct held-out prompts as task {task!r} "
                            f"gave in {10 * count + 100} examples", advice="ask for fewer")
    return list(found.values())


def _example(task: Task, *, split: Split, seed: int, index: int) -> Example:
    key = int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:4], "big")
    for attempt in range(_MAX_DRAWS):
        prompt = task.draw(np.random.default_rng([seed, key, index, attempt]))
        if split_of(prompt) == split:
            return task.example(prompt)
    raise ArgumentError("split", f"{split!r}, of which task {task.name!r} drew none in {_MAX_DRAWS} prompts",
                        allowed="one that the task draws", advice="choose a task with more prompts")


def _names(task: str | None) -> tuple[str, ...]:
    return tuple(TASKS) if task is None else (
        check_choice("task", task, TASKS, advice="choose one, or None for all in turn"),)
