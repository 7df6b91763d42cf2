"""Inputs of masked positions in the next forward: the mask token, or a mixture of guesses."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from djax.contracts import struct
from djax.contracts.types import StepInfo
from djax.parts.schedules import Linear, Schedule, as_schedule, check_unit

__all__ = ["HardTokens", "SoftTokens"]


@struct.dataclass
class HardTokens:
    """The tokens' own embeddings, the mask token's at masked positions."""

    soft: ClassVar[bool] = False

    def step(
        self, embedded: Float[Array, "B W D"], expected: Float[Array, "B W D"], is_masked: Bool[Array, "B W"],
        info: StepInfo,
    ) -> Float[Array, "B W D"]:
        """The tokens' embeddings."""
        return embedded


@struct.dataclass
class SoftTokens:
    """Iteration smoothing (arXiv 2510.08666, section 4.2).

    A masked position feeds e_mask + w_t * softmax(logits) @ W_embed with the last forward's logits, where
    t counts the row's steps over the whole sequence. `weight` is a number in [0, 1] or a schedule over them.
    """

    weight: float | Float[Array, ""] | Schedule = Linear(start=0.15, slope=0.02, maximum=0.3)

    soft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_unit("weight", self.weight)

    def step(
        self, embedded: Float[Array, "B W D"], expected: Float[Array, "B W D"], is_masked: Bool[Array, "B W"],
        info: StepInfo,
    ) -> Float[Array, "B W D"]:
        """The tokens' embeddings, with the weighted expectation added on masked positions."""
        weight = jnp.where(is_masked, as_schedule(self.weight)(info.row_step)[:, None], 0.0)[..., None]
        return (embedded + weight * expected.astype(jnp.float32)).astype(embedded.dtype)
