"""Strategies that hold another one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from djax.contracts import struct
from djax.contracts.types import Candidates, Decision, PartState, StepInfo, Strategy
from djax.errors import check_number
from djax.parts.strategies.selection import rank


@struct.dataclass
class RandomOrder:
    """Lets the inner strategy choose by uniform random numbers instead of confidences.

    `RandomOrder(Quota(steps))` is LLaDA's random remasking (arXiv 2502.09992, algorithm 4). Positions
    without a proposal stay without one.
    """

    strategy: Strategy

    @property
    def reopens(self) -> bool:
        """The inner strategy's."""
        return self.strategy.reopens

    def max_steps(self, block_length: int) -> int:
        """The inner strategy's."""
        return self.strategy.max_steps(block_length)

    def init(self, batch: int, block_length: int) -> PartState:
        """The inner strategy's state."""
        return self.strategy.init(batch, block_length)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The inner decision on random scores."""
        length = is_masked.shape[-1]
        score = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)
        score = jnp.where(jnp.isneginf(candidates.confidence), -jnp.inf, score)
        return self.strategy.step(keys, dataclasses.replace(candidates, confidence=score), is_masked, info, state)


@struct.dataclass
class Remasking:
    """Reopens committed positions of the block that the model has come to doubt.

    A position committed earlier is reopened when the probability of its token falls below `threshold`,
    the least probable first, and at most one fewer than the inner strategy commits in the same step: the
    block gains a token in every step, so the inner bound on the steps holds.
    `Remasking(Hierarchical(high, low), threshold)` is hierarchical decoding with remasking.
    """

    strategy: Strategy
    threshold: float | Float[Array, ""]

    reopens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0.0, 1.0)

    def max_steps(self, block_length: int) -> int:
        """The inner strategy's: every step has a net gain."""
        return self.strategy.max_steps(block_length)

    def init(self, batch: int, block_length: int) -> PartState:
        """The inner strategy's state."""
        return self.strategy.init(batch, block_length)

    def step(
        self, keys: Key[Array, " B"], candidates: Candidates, is_masked: Bool[Array, "B L"], info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The inner decision, and the doubtful positions to reopen."""
        decision, state = self.strategy.step(keys, candidates, is_masked, info, state)
        doubtful = info.is_open & ~is_masked & ~decision.commit & (candidates.current < self.threshold)
        allowed = (decision.commit & is_masked).sum(-1, dtype=jnp.int32) - decision.reopen.sum(-1, dtype=jnp.int32) - 1
        worst_first = rank(jnp.where(doubtful, -candidates.current, -jnp.inf))
        reopen = doubtful & (worst_first < allowed[:, None])
        return dataclasses.replace(decision, reopen=decision.reopen | reopen), state
