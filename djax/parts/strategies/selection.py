"""Helpers of strategies: what those that only commit have in common, and the best masked positions of a block."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from djax.contracts.types import Candidates, PartState


class Commits:
    """The answers of a strategy without a state that never reopens and commits at every step."""

    reopens: ClassVar[bool] = False

    def max_steps(self, block_length: int) -> int:
        """One position per step at the least."""
        return block_length

    def init(self, batch: int, block_length: int) -> PartState:
        """Start without a state."""
        return ()


def masked_confidence(candidates: Candidates, is_masked: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Confidence on masked positions that have a proposal, -inf elsewhere."""
    return jnp.where(is_masked & ~jnp.isnan(candidates.confidence), candidates.confidence, -jnp.inf)


def rank(confidence: Float[Array, "B L"]) -> Int[Array, "B L"]:
    """Place of each position when confidences are sorted descending: 0 is the best, ties by position."""
    order = jnp.argsort(-confidence, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def best(confidence: Float[Array, "B L"]) -> Bool[Array, "B L"]:
    """The first position with the highest confidence of its row; none where all are -inf."""
    columns = jnp.arange(confidence.shape[-1], dtype=jnp.int32)[None]
    return (columns == lax.argmax(confidence, 1, jnp.int32)[:, None]) & jnp.isfinite(confidence)
