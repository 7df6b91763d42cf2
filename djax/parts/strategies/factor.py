"""Fast-dLLM's dynamic rule (arXiv 2505.22618, section 3.3, factor-based parallel decoding)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo
from djax.errors import check_number
from djax.parts.strategies.selection import Commits, masked_confidence, rank


@struct.dataclass
class Factor(Commits):
    """Commits the n most confident positions for the largest n with (n + 1) * (1 - c_n) < factor.

    c_1 >= c_2 >= ... are the confidences of the row's masked positions; the condition has to hold for
    every smaller n too, and one position always goes.
    """

    factor: float | Float[Array, ""]

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 0.0)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The largest admissible prefix of the confidences in descending order."""
        confidence = masked_confidence(candidates, is_masked)
        descending = -jnp.sort(-confidence, axis=-1)
        n = jnp.arange(1, confidence.shape[-1] + 1, dtype=jnp.float32)[None]
        admissible = ((n + 1) * (1.0 - descending) < self.factor).at[:, 0].set(True)
        count = jnp.cumprod(admissible.astype(jnp.int32), axis=-1).sum(-1, dtype=jnp.int32)
        commit = (rank(confidence) < count[:, None]) & jnp.isfinite(confidence)
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state
