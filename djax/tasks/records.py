"""A JSON record filled from a sentence.

    Write the record: Ada, 34, from Oslo buys 3 pens at 4 euros each.

    3*4=12
    answer: {"name": "Ada", "age": 34, "city": "Oslo", "item": "pens", "count": 3, "price": 4, "total": 12}

All is copied but the total, which is the one step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from djax.tasks.base import Phrasings, Task, worked

NAMES = ("Ada", "Ana", "Ben", "Dan", "Emma", "Eric", "Eva", "Ian", "Ida", "Jane", "John", "Lena", "Leo", "Maria",
         "Mark", "Nina", "Omar", "Rosa", "Sam", "Tina")
CITIES = ("Berlin", "Delhi", "Lima", "London", "Madrid", "Oslo", "Paris", "Rome", "Seoul", "Tokyo")
ITEMS = ("apples", "bags", "books", "cards", "cups", "lamps", "maps", "pears", "pens", "plates", "roses", "tents")
AGES = (18, 79)
COUNTS = (2, 9)
"""Least and most of an item, and of its price in euros."""


def _one_of(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(words)})"


_COUNT = f"[{COUNTS[0]}-{COUNTS[1]}]"
_PHRASINGS = Phrasings(
    ("Write the record: {name}, {age}, from {city} buys {count} {item} at {price} euros each.",
     "Fill in the record: in {city}, {name} (age {age}) paid {price} euros each for {count} {item}.",
     "Make a record: {count} {item} at {price} euros each go to {name} of {city}, who is {age}."),
    {"name": _one_of(NAMES), "age": _one_of([str(age) for age in range(AGES[0], AGES[1] + 1)]),
     "city": _one_of(CITIES), "item": _one_of(ITEMS), "count": _COUNT, "price": _COUNT})


def _draw(rng: np.random.Generator) -> str:
    words = {slot: table[int(rng.integers(len(table)))]
             for slot, table in (("name", NAMES), ("city", CITIES), ("item", ITEMS))}
    numbers = {slot: int(rng.integers(*bounds, endpoint=True))
               for slot, bounds in (("age", AGES), ("count", COUNTS), ("price", COUNTS))}
    return _PHRASINGS.fill(rng, {**words, **numbers})


def _solve(prompt: str) -> str | None:
    slots = _PHRASINGS.parse(prompt)
    if slots is None:
        return None
    count, price = int(slots["count"]), int(slots["price"])
    record = {"name": slots["name"], "age": int(slots["age"]), "city": slots["city"], "item": slots["item"],
              "count": count, "price": price, "total": count * price}
    return worked([f"{count}*{price}={count * price}"], json.dumps(record))


RECORD = Task("record", _draw, _solve)
