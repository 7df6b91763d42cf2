"""Forecasts of a machine: compiled programs for hardware that need not be here, memory, rooflines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax.plan.planner import plan

__all__ = ["plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'djax.plan' has no attribute {name!r}")
    from djax.plan import planner

    return getattr(planner, name)
