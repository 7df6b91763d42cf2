"""Products of tables of which a part runs by default: every value of each axis, not every pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(cases: Sequence[Any], others: Sequence[Any]) -> Any:
    """Parametrize (case, implementation): each case with one of the others, in turn; all other pairs are slow."""
    return pytest.mark.parametrize(("case", "implementation"), [
        pytest.param(case, other, id=f"{other}-{case.name}",
                     marks=() if row % len(others) == column else pytest.mark.slow)
        for row, case in enumerate(cases) for column, other in enumerate(others)])


def every_second(cases: Sequence[Any]) -> Any:
    """Parametrize `case`; every second one is slow."""
    return pytest.mark.parametrize("case", [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if row % 2 else ()) for row, case in enumerate(cases)])
