"""Schedules: denoising step -> value. Every number is a leaf, so a sweep compiles nothing."""

from __future__ import annotations

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from djax.contracts import struct
from djax.errors import check_number


@struct.dataclass
class Constant:
    """A value that stays the same at every step."""

    value: float | Float[Array, ""]

    bounds: ClassVar[tuple[str, ...]] = ("value",)
    """Fields that bound the values, or infinity."""

    def __post_init__(self) -> None:
        check_number("value", self.value)

    def __call__(self, step: Int[Array, " B"]) -> Float[Array, " B"]:
        """Value at `step` (a row's denoising steps so far, from 0), float32."""
        return jnp.broadcast_to(jnp.asarray(self.value, jnp.float32), step.shape)


@struct.dataclass
class Linear:
    """`start + slope * step`, kept within [minimum, maximum].

    dInfer's smoothing weight is `Linear(0.15, 0.02, maximum=0.3)`; its threshold under smoothing is
    `Linear(1.0, -0.02, minimum=threshold)` (arXiv 2510.08666, section 4.2 and its code).
    """

    start: float | Float[Array, ""]
    slope: float | Float[Array, ""]
    minimum: float | Float[Array, ""] = -jnp.inf
    maximum: float | Float[Array, ""] = jnp.inf

    bounds: ClassVar[tuple[str, ...]] = ("minimum", "maximum")

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("slope", self.slope)
        for name in ("minimum", "maximum"):
            bound = getattr(self, name)
            if not _is_infinite(bound):
                check_number(name, bound)

    def __call__(self, step: Int[Array, " B"]) -> Float[Array, " B"]:
        """Value at `step`, float32."""
        value = jnp.asarray(self.start, jnp.float32) + jnp.asarray(self.slope, jnp.float32) * step.astype(jnp.float32)
        return jnp.clip(value, jnp.asarray(self.minimum, jnp.float32), jnp.asarray(self.maximum, jnp.float32))


@struct.dataclass
class Cosine:
    """From `start` to `end` along half a cosine over `steps` steps, then `end`."""

    start: float | Float[Array, ""]
    end: float | Float[Array, ""]
    steps: float | Float[Array, ""]

    bounds: ClassVar[tuple[str, ...]] = ("start", "end")

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        check_number("steps", self.steps, 0.0, above=True)

    def __call__(self, step: Int[Array, " B"]) -> Float[Array, " B"]:
        """Value at `step`, float32."""
        progress = jnp.clip(step.astype(jnp.float32) / jnp.asarray(self.steps, jnp.float32), 0.0, 1.0)
        start, end = jnp.asarray(self.start, jnp.float32), jnp.asarray(self.end, jnp.float32)
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


Schedule = Constant | Linear | Cosine


def as_schedule(value: float | Float[Array, ""] | Schedule) -> Schedule:
    """A number becomes a `Constant`; a schedule stays itself."""
    return value if isinstance(value, Constant | Linear | Cosine) else Constant(value)


def check_unit(name: str, value: float | Float[Array, ""] | Schedule) -> None:
    """Check that a number lies in [0, 1], or that what bounds a schedule does.

    Raises:
        ArgumentError: it does not.
    """
    if not isinstance(value, Schedule):
        check_number(name, value, 0.0, 1.0)
        return
    for field in value.bounds:
        bound = getattr(value, field)
        if not _is_infinite(bound):
            check_number(name, bound, 0.0, 1.0, advice=f"it is the {field} of the schedule")


def _is_infinite(bound: float | Float[Array, ""]) -> bool:
    return isinstance(bound, float | np.floating) and math.isinf(bound)
