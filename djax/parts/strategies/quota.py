"""Fixed steps per block (LLaDA's low-confidence remasking, arXiv 2502.09992, algorithm 5)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo
from djax.errors import check_integer
from djax.parts.strategies.selection import Commits, masked_confidence, rank


@struct.dataclass
class Quota(Commits):
    """Commits the most confident n // steps positions at each step, one more in the first n % steps.

    n is the number of the block's positions that were open on entering it; never fewer than one position
    is committed. `steps` (a leaf) at or above the block length means one token per step.
    """

    steps: int | Int[Array, ""] = 2**31 - 1
    """More than a block has positions: one token a step."""

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The step's quota of most confident positions."""
        confidence = masked_confidence(candidates, is_masked)
        steps = jnp.maximum(jnp.asarray(self.steps, jnp.int32), 1)
        quota = info.num_open // steps + (info.step_in_block < info.num_open % steps).astype(jnp.int32)
        commit = (rank(confidence) < jnp.maximum(quota, 1)[:, None]) & jnp.isfinite(confidence)
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state
