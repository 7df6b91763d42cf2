"""How a readout is compared with the oracle's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kernels_pallas import Readout
from kernels_pallas.unembed.api import complete
from kernels_pallas.unembed.types import Call

FLOATS = (
    "best_logit", "log_total", "log_sum_tempered", "at", "second_logit", "entropy", "expected", "log_total_all")


def call_of(hidden: Any, head: Any, **options: Any) -> Call:
    """Make what an implementation takes from the op's arguments."""
    blank = Call(hidden, head, None, None, None, None, None, None, False, False, 0)  # type: ignore[arg-type]
    return complete(blank._replace(**options))


def jitted(implementation: Callable[[Call], Readout]) -> Callable[..., Readout]:
    """An implementation with the op's own arguments, compiled once for each set of shapes."""

    @functools.partial(jax.jit, static_argnames=("second", "entropy"))
    def run(hidden: Any, head: Any, *, second: bool = False, entropy: bool = False, **options: Any) -> Readout:
        return implementation(call_of(hidden, head, second=second, entropy=entropy, **options))

    return run


def check(readout: Readout, rows: list[dict[str, Any]], dtype: str) -> None:
    """Every field of every row; an id may be another one only where float32 cannot tell the two apart."""
    got = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), readout)
    _expect(readout.best.dtype == readout.drawn.dtype == np.int32, "ids are int32")
    for row, expected in enumerate(rows):
        logits = expected["logits"]
        size = max(1.0, np.abs(logits[np.isfinite(logits)]).max(initial=0.0))
        slack = 2e-6 * size
        for name in FLOATS:
            values = getattr(got, name)
            if values is None:
                continue
            tolerance = 2e-2 if name == "expected" and dtype == "bfloat16" else 20 * slack
            np.testing.assert_allclose(
                values[row], expected[name], atol=tolerance, rtol=2e-6, err_msg=f"{name} of row {row}")
        _check_id(int(got.best[row]), expected, expected["logits"], slack, f"best of row {row}")
        drawn = int(got.drawn[row])
        _check_id(drawn, expected, expected["scores"], 10 * slack, f"drawn of row {row}")
        if drawn < 0:
            _expect(got.drawn_logit[row] == got.drawn_score[row] == -np.inf, f"drawn of row {row}")
            continue
        place = drawn - expected["first"]
        for name, values in (("drawn_logit", expected["logits"]), ("drawn_score", expected["scores"])):
            value = values[place] if not np.isnan(values[place]) else -np.inf
            np.testing.assert_allclose(
                getattr(got, name)[row], value, atol=20 * slack, rtol=2e-6, err_msg=f"{name} of row {row}")


def _expect(true: bool | np.bool_, what: str) -> None:
    """Assert also where Python leaves assertions out."""
    if not true:
        raise AssertionError(what)


def _check_id(got: int, expected: dict[str, Any], values: np.ndarray, slack: float, what: str) -> None:
    """`got` is the lowest allowed id of the largest value, or one that is as large but for rounding."""
    values = np.where(expected["allowed"] & ~np.isnan(values), values, -np.inf)
    candidates = np.flatnonzero(expected["allowed"] & (values == values.max()))
    if not len(candidates):
        _expect(got == -1, what)
        return
    exact, place = int(candidates[0]), got - expected["first"]
    if place == exact:
        return
    _expect(0 <= place < len(values), what)
    _expect(expected["allowed"][place], f"{what}: {got} is forbidden")
    _expect(0 < values[exact] - values[place] < slack, f"{what}: got {got}, not {exact + expected['first']}")
