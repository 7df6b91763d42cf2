"""Evaluation of a small expression, one operation at a time.

    Evaluate 2*(3+4)-5+1.

    3+4=7: 2*7-5+1
    2*7=14: 14-5+1
    14-5=9: 9+1
    9+1=10: 10
    answer: 10

A step is the next operation, its value, and the expression with the value in the operation's place. Parentheses go
first, then products, then sums and differences, each from the left. Values stay within 0 and 50, one operand at least
is a digit and both of a product are, so that each operation is one that a small model can know by heart.
"""

from __future__ import annotations

import operator
import re

import numpy as np

from djax.tasks.base import Phrasings, Task, worked

OPERANDS = (5, 6)
"""Least and most digits of an expression, each 1 to 9."""

MAX_VALUE = 50

_FACTOR = r"(?:[1-9]|\([1-9][-+][1-9]\))"
_PHRASINGS = Phrasings(
    ("Evaluate {expression}.", "What is {expression}?", "Work out {expression} step by step."),
    {"expression": rf"{_FACTOR}(?:[-+*]{_FACTOR})+"})
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_ORDER = tuple(re.compile(pattern) for pattern in (
    r"\(([0-9])([-+])([0-9])\)", r"([0-9]+)(\*)([0-9]+)", r"([0-9]+)([-+])([0-9]+)"))


def _draw(rng: np.random.Generator) -> str:
    # One in several keeps its values within bounds.
    while _steps(expression := _draw_expression(rng)) is None:
        pass
    return _PHRASINGS.fill(rng, {"expression": expression})


def _draw_expression(rng: np.random.Generator) -> str:
    """Digits and operators, with none, one or two pairs in parentheses; its values may be out of bounds."""
    operands, groups = int(rng.integers(*OPERANDS, endpoint=True)), int(rng.integers(3))
    digits, signs = iter(rng.integers(1, 10, size=operands).tolist()), iter(rng.integers(6, size=operands).tolist())
    grouped = set(rng.permutation(operands - groups)[:groups].tolist())
    text = ""
    for place in range(operands - groups):
        between = "++--**"[next(signs)] if place else ""
        factor = f"({next(digits)}{'+-'[next(signs) % 2]}{next(digits)})" if place in grouped else str(next(digits))
        text += between + factor
    return text


def _operate(left: int, sign: str, right: int) -> int | None:
    """The value of an operation, None if it is out of bounds."""
    value = _OPERATIONS[sign](left, right)
    digits = (left <= 9) + (right <= 9)
    return value if 0 <= value <= MAX_VALUE and digits >= (2 if sign == "*" else 1) else None


def _steps(expression: str) -> list[str] | None:
    """The steps down to one number, or None if a value leaves its bounds on the way."""
    steps = []
    while not expression.isdigit():
        found = next(found for pattern in _ORDER if (found := pattern.search(expression)))
        left, sign, right = int(found[1]), found[2], int(found[3])
        value = _operate(left, sign, right)
        if value is None:
            return None
        expression = f"{expression[:found.start()]}{value}{expression[found.end():]}"
        steps.append(f"{left}{sign}{right}={value}: {expression}")
    return steps


def _solve(prompt: str) -> str | None:
    slots = _PHRASINGS.parse(prompt)
    if slots is None or not OPERANDS[0] <= sum(map(str.isdigit, slots["expression"])) <= OPERANDS[1]:
        return None
    steps = _steps(slots["expression"])
    return None if steps is None else worked(steps, steps[-1].rpartition(" ")[2])


EXPRESSION = Task("expression", _draw, _solve)
