"""LocalLeap: what lies near a sure token may be a little less sure (arXiv 2510.07081, section 4)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo
from djax.errors import check_integer, check_number
from djax.parts.strategies.selection import Commits, best, masked_confidence


@struct.dataclass
class LocalLeap(Commits):
    """Commits anchors, positions of at least `anchor`, and what is within `radius` of one and of at least `near`.

    Anchors are masked positions of this step. Where a row has none its best position goes. With `near` equal to
    `anchor` it is `Threshold`.
    """

    anchor: float | Float[Array, ""] = 0.9
    near: float | Float[Array, ""] = 0.75
    radius: int | Int[Array, ""] = 4

    def __post_init__(self) -> None:
        check_number("anchor", self.anchor, 0.0, 1.0)
        check_number("near", self.near, 0.0, 1.0)
        if isinstance(self.near, float | int) and isinstance(self.anchor, float | int):
            check_number("near", self.near, 0.0, self.anchor, advice="lower it or raise anchor")
        check_integer("radius", self.radius)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The anchors, their neighbours, and the best."""
        confidence = masked_confidence(candidates, is_masked)
        anchors = jnp.isfinite(confidence) & (confidence >= self.anchor)
        close = _distance(anchors) <= self.radius
        commit = anchors | best(confidence) | (jnp.isfinite(confidence) & close & (confidence >= self.near))
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state


def _distance(marks: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """To the nearest mark of the row; more than any radius where there is none."""
    length = marks.shape[-1]
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    far = jnp.int32(2**30)
    before = lax.cummax(jnp.where(marks, columns, -far), axis=1)
    after = lax.cummin(jnp.where(marks, columns, far), axis=1, reverse=True)
    return jnp.minimum(columns - before, after - columns)
