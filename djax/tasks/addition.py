"""Addition of two numbers of 4 to 6 digits, digit by digit from the right.

    Add 4827 and 10963.

    7+3+0=10
    2+6+1=09
    8+9+0=17
    4+0+1=05
    0+1+0=01
    answer: 15790

A step is digit + digit + carry = new carry and digit of the sum; the shorter number counts as led by zeros.
"""

from __future__ import annotations

import numpy as np

from djax.tasks.base import Phrasings, Task, worked

MIN_DIGITS, MAX_DIGITS = 4, 6

_NUMBER = rf"[1-9][0-9]{{{MIN_DIGITS - 1},{MAX_DIGITS - 1}}}"
_PHRASINGS = Phrasings(
    ("Add {first} and {second}.", "What is {first} + {second}?", "Find the sum of {first} and {second}."),
    {"first": _NUMBER, "second": _NUMBER})


def _draw(rng: np.random.Generator) -> str:
    # The lengths come first: drawn as numbers, nine in ten would have all six digits.
    first, second = (int(rng.integers(10 ** (digits - 1), 10**digits))
                     for digits in rng.integers(MIN_DIGITS, MAX_DIGITS, size=2, endpoint=True).tolist())
    return _PHRASINGS.fill(rng, {"first": first, "second": second})


def _solve(prompt: str) -> str | None:
    slots = _PHRASINGS.parse(prompt)
    if slots is None:
        return None
    width = max(len(slots["first"]), len(slots["second"]))
    first, second = (slots[name].zfill(width) for name in ("first", "second"))
    steps, carry = [], 0
    for a, b in zip(reversed(first), reversed(second), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    digits = "".join(step[-1] for step in reversed(steps))
    return worked(steps, f"{carry}{digits}" if carry else digits)


ADDITION = Task("addition", _draw, _solve)
