"""Hierarchical decoding (dInfer, arXiv 2510.08666, section 4.3)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo
from djax.errors import check_number
from djax.parts.schedules import Schedule, as_schedule, check_unit
from djax.parts.strategies.selection import Commits, best, masked_confidence


@struct.dataclass
class Hierarchical(Commits):
    """Divides the block: a token committed inside a run of masks splits it into shorter ones.

    In each maximal run of masked positions the most confident one is committed if its confidence exceeds
    `low`; so is every position above `high`; so is the row's best. Both are numbers in [0, 1], `high` may
    be a schedule over the row's steps.
    """

    high: float | Float[Array, ""] | Schedule = 0.92
    low: float | Float[Array, ""] = 0.62

    def __post_init__(self) -> None:
        check_number("low", self.low, 0.0, 1.0)
        check_unit("high", self.high)
        if isinstance(self.low, float | int) and isinstance(self.high, float | int):
            check_number("low", self.low, 0.0, self.high, advice="lower it or raise high")

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The best of each run, and everything that is certain."""
        confidence = masked_confidence(candidates, is_masked)
        commit = _best_of_runs(confidence, is_masked) & (confidence > self.low)
        commit |= confidence > as_schedule(self.high)(info.row_step)[:, None]
        commit |= best(confidence)
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state


def _best_of_runs(confidence: Float[Array, "B L"], is_masked: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    """The first most confident position of each maximal run of masked positions."""
    length = is_masked.shape[-1]
    starts = is_masked & ~jnp.pad(is_masked, ((0, 0), (1, 0)))[:, :length]
    run = jnp.where(is_masked, jnp.cumsum(starts, axis=-1, dtype=jnp.int32), 0)
    # L is a block, so the [L, L] comparison is cheaper than a segmented scan.
    same = (run[:, :, None] == run[:, None, :]) & is_masked[:, :, None] & is_masked[:, None, :]
    columns = jnp.arange(length, dtype=jnp.int32)
    ahead = (confidence[:, None, :] > confidence[:, :, None]) | (
        (confidence[:, None, :] == confidence[:, :, None]) & (columns[None, None, :] < columns[None, :, None]))
    return is_masked & ~(same & ahead).any(-1)
