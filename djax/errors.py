"""Errors about arguments: one type whose parts can be read, and the checks that raise it.

A check stands where the value lives: a part checks its numbers when it is made, a configuration its fields, a call
its options. The command line shows the same error with the flag in place of the name.
"""

from __future__ import annotations

import functools
import math
import sys
import unicodedata
from typing import Any

import numpy as np

_LONGEST_VALUE = 80


class ArgumentError(ValueError):
    """A wrong argument, in the four parts of every message: its name, what came, what is allowed, what to do.

    `got` is a text that is shown as it is: `shown(value)` makes one of a value.
    """

    def __init__(self, name: str, got: object, *, allowed: str, advice: str = "") -> None:
        self.name, self.got, self.allowed, self.advice = name, str(got), allowed, advice
        super().__init__(f"{name}: got {got}; allowed {allowed}" + (f"; {advice}" if advice else ""))

    def renamed(self, name: str) -> ArgumentError:
        """Name another argument in the same error, such as a flag."""
        return type(self)(name, self.got, allowed=self.allowed, advice=self.advice)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), allowed=self.allowed, advice=self.advice), (self.name, self.got)


def one_line(text: str, longest: int | None = None) -> str:
    """`text` on one line, without control characters, cut to `longest` characters."""
    # what is cut off need not be looked at: texts can be of any size
    head = text if longest is None else text[: 8 * longest]
    line = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in head).split())
    if longest is None or (len(line) <= longest and len(head) == len(text)):
        return line
    return line[: longest - 3] + "..."


def shown(value: object) -> str:
    """`repr(value)` on one line, shortened: the "got" of a message."""
    return one_line(repr(value), _LONGEST_VALUE)


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of a library's error; its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False,
    optional: bool = False, advice: str = "",
) -> Any:
    """`value`, if it is a finite number (or array of numbers) in [low, high] that float32 can hold.

    Arrays of any library are taken, with one value or one per row; traced ones are not looked at.

    Args:
        name: the argument's name.
        value: what came.
        low: smallest value allowed.
        high: largest value allowed; infinity still asks for a finite number.
        above: `low` itself is not allowed.
        optional: None is allowed too.
        advice: what to do, where there is more to say than the range.

    Raises:
        ArgumentError: another type, a number that is not finite in float32, or one outside the range.
    """
    array = None if optional and value is None else _concrete(value)
    if array is None:
        return value
    if array.dtype.kind in "fiu" or array.dtype.name in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            numbers = np.asarray(array, np.float64)
            finite = np.isfinite(numbers.astype(np.float32))
        if (finite & ((numbers > low) if above else (numbers >= low)) & (numbers <= high)).all():
            return value
    span = [f"{'above' if above else 'of at least'} {low:g}"] if low > -math.inf else []
    span += [f"at most {high:g}"] if high < math.inf else []
    raise ArgumentError(name, shown(value), allowed=f"a finite number {' and '.join(span)}".rstrip(), advice=advice)


def check_integer(
    name: str, value: Any, low: int = 0, high: int = 2**31 - 1, *, optional: bool = False, advice: str = "",
) -> Any:
    """`value`, if it is an integer (or array of integers) in [low, high]; `True` and 2.0 are none.

    Arrays of any library are taken, with one value or one per row; traced ones are not looked at. With `optional` None
    is allowed too.

    Raises:
        ArgumentError: another type, or an integer outside the range.
    """
    array = None if optional and value is None else _concrete(value)
    if array is None or (array.dtype.kind in "iu" and ((array >= low) & (array <= high)).all()):
        return value
    too_large = array.dtype.kind in "iu" and (array > high).any()
    span = f"of at least {low}" if high == 2**31 - 1 and not too_large else f"from {low} to {high}"
    raise ArgumentError(name, shown(value), allowed=f"an integer {span}", advice=advice)


def check_choice(
    name: str, value: Any, allowed: Any, *, optional: bool = False, advice: str = "pick one of them"
) -> Any:
    """`value`, if it is among `allowed` (a collection of texts), or None with `optional`.

    Raises:
        ArgumentError: it is not.
    """
    if (isinstance(value, str) and value in allowed) or (optional and value is None):
        return value
    raise ArgumentError(name, shown(value), allowed=", ".join(allowed), advice=advice)


def check_flag(name: str, value: Any, *, optional: bool = False) -> Any:
    """`value`, if it is True or False, or None where that is `optional`; "no" and 1 are none.

    Raises:
        ArgumentError: anything else.
    """
    if isinstance(value, bool | np.bool_) or (optional and value is None):
        return value
    raise ArgumentError(name, shown(value), allowed="True, False or None" if optional else "True or False")


def check_methods(name: str, value: Any, *methods: str, advice: str) -> Any:
    """`value`, if it is None or can be called by all of these methods' names.

    Raises:
        ArgumentError: it cannot.
    """
    if value is None or all(callable(getattr(value, method, None)) for method in methods):
        return value
    what = "a callable" if methods == ("__call__",) else f"an object with {' and '.join(methods)}"
    raise ArgumentError(name, shown(value), allowed=f"{what}, or None", advice=advice)


def _concrete(value: Any) -> np.ndarray | None:
    """The numbers of a value as an array of some dtype ("O" where it holds none); None of one that is traced."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if jax is not None and isinstance(value, jax.Array):
        # explicit, so that a caller's transfer guard does not forbid it; another process' part cannot be fetched
        return jax.device_get(value) if value.is_fully_addressable else None
    if isinstance(value, bool | str | bytes) or value is None:
        return np.empty((), object)
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        return np.empty((), object)
