"""Threshold decoding (Fast-dLLM, arXiv 2505.22618, algorithm 1; dInfer's rule)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo
from djax.parts.schedules import Schedule, as_schedule, check_unit
from djax.parts.strategies.selection import Commits, masked_confidence


@struct.dataclass
class Threshold(Commits):
    """Commits masked positions whose confidence is at least min(threshold, best - 1e-5).

    So the best one always goes. `threshold` is a number in [0, 1] or a schedule over the row's steps.
    """

    threshold: float | Float[Array, ""] | Schedule = 0.9

    def __post_init__(self) -> None:
        check_unit("threshold", self.threshold)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The confident positions."""
        confidence = masked_confidence(candidates, is_masked)
        limit = jnp.minimum(as_schedule(self.threshold)(info.row_step), confidence.max(-1) - 1e-5)
        commit = (confidence >= limit[:, None]) & jnp.isfinite(confidence)
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state
