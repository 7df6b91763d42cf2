"""Two tasks on short lists: sorting by insertion, and the sum of the distinct numbers of a sorted one.

    Sort these numbers: 42 7 19 30

    42: 42
    7: 7 42
    19: 7 19 42
    30: 7 19 30 42
    answer: 7 19 30 42

A step is the next number of the list and the sorted list that has it.

    Add each different number once: 2 4 4 4 7 7 9

    2 new 02
    4 new 06
    4 seen 06
    4 seen 06
    7 new 13
    7 seen 13
    9 new 22
    answer: 22

A step is the next number of the list, whether the one before it is the same, and the total of the new ones so far.
"""

from __future__ import annotations

import bisect

import numpy as np

from djax.tasks.base import Phrasings, Task, worked

SORT_LENGTHS = (4, 6)
"""Least and most numbers to sort, each 1 to 99."""

SUM_LENGTHS = (7, 9)
"""Least and most numbers to sum, each 1 to 9, none less than the one before it."""

SUM_DISTINCT = (4, 6)
"""Least and most different numbers among them. Four make at least 10, so that every sum has two digits."""

_SORT_PHRASINGS = Phrasings(
    ("Sort these numbers: {numbers}", "Put {numbers} in order.", "Write {numbers} from least to greatest."),
    {"numbers": rf"[1-9][0-9]?(?: [1-9][0-9]?){{{SORT_LENGTHS[0] - 1},{SORT_LENGTHS[1] - 1}}}"})
_SUM_PHRASINGS = Phrasings(
    ("Add each different number once: {numbers}", "Drop the repeats from {numbers} and add the rest.",
     "Without repeats, what is the sum of {numbers}?"),
    {"numbers": rf"[1-9](?: [1-9]){{{SUM_LENGTHS[0] - 1},{SUM_LENGTHS[1] - 1}}}"})


def _draw_sort(rng: np.random.Generator) -> str:
    length = rng.integers(*SORT_LENGTHS, endpoint=True)
    return _SORT_PHRASINGS.fill(rng, {"numbers": _join(rng.integers(1, 100, size=length).tolist())})


def _solve_sort(prompt: str) -> str | None:
    slots = _SORT_PHRASINGS.parse(prompt)
    if slots is None:
        return None
    steps: list[str] = []
    ordered: list[int] = []
    for number in map(int, slots["numbers"].split()):
        bisect.insort(ordered, number)
        steps.append(f"{number}: {_join(ordered)}")
    return worked(steps, _join(ordered))


def _draw_unique_sum(rng: np.random.Generator) -> str:
    length, distinct = (int(rng.integers(*bounds, endpoint=True)) for bounds in (SUM_LENGTHS, SUM_DISTINCT))
    values = rng.permutation(9)[:distinct] + 1
    repeats = rng.choice(values, size=length - distinct)
    numbers = np.sort(np.concatenate([values, repeats])).tolist()
    return _SUM_PHRASINGS.fill(rng, {"numbers": _join(numbers)})


def _solve_unique_sum(prompt: str) -> str | None:
    slots = _SUM_PHRASINGS.parse(prompt)
    if slots is None:
        return None
    steps: list[str] = []
    seen: set[int] = set()
    numbers = [int(number) for number in slots["numbers"].split()]
    for number in numbers:
        word = "seen" if number in seen else "new"
        seen.add(number)
        steps.append(f"{number} {word} {sum(seen):02d}")
    if numbers != sorted(numbers) or not SUM_DISTINCT[0] <= len(seen) <= SUM_DISTINCT[1]:
        return None
    return worked(steps, str(sum(seen)))


def _join(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


SORT = Task("sort", _draw_sort, _solve_sort)
UNIQUE_SUM = Task("unique_sum", _draw_unique_sum, _solve_unique_sum)
