"""Parts by name: `LocalLeap` is local_leap on the axis strategy.

Names are read from the axes' `__all__` at each call, so that a new part is one line there and none here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from djax.contracts.types import CachePolicy, Filter, Propose, Smoothing, StopRule, Strategy, Transform

AXES: dict[str, tuple[Any, str]] = {
    "strategy": (Strategy, "strategies"), "cache_policy": (CachePolicy, "cache_policies"),
    "transform": (Transform, "transforms"), "propose": (Propose, "proposals"), "smoothing": (Smoothing, "smoothing"),
    "stop_rule": (StopRule, "stopping"), "filter": (Filter, "transforms")}
"""Each axis' protocol and its module in `djax.parts`: the loop's axes, and the filters of a draw."""


def parts(axis: str) -> dict[str, type]:
    """Classes of an axis by name; what else its `__all__` lists has no method of its protocols and is left out."""
    protocol, home = AXES[axis]
    methods = {name for each in (protocol, *protocol.__subclasses__())
               for name, _ in inspect.getmembers(each, inspect.isfunction) if not name.startswith("_")}
    module = importlib.import_module(f"djax.parts.{home}")
    listed = {snake_case(name): getattr(module, name) for name in module.__all__}
    return {name: part for name, part in listed.items()
            if inspect.isclass(part) and any(hasattr(part, method) for method in methods)}


def axis_of(hint: Any) -> str | None:
    """The axis whose protocol a type hint is."""
    return next((axis for axis, (protocol, _) in AXES.items() if hint is protocol), None)


def name_of(part: Any) -> str:
    """A part's name: its class' in snake_case."""
    return snake_case(type(part).__name__)


def snake_case(name: str) -> str:
    """`LocalLeap` -> `local_leap`, `TopK` -> `top_k`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
