"""Cache policies that hold another one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from djax.contracts import answers, struct
from djax.contracts.types import CachePolicy, StepInfo, Window
from djax.errors import check_integer


@struct.dataclass
class Periodic:
    """Also refreshes at every `every`-th step of a block. With 1 nothing is ever stale."""

    policy: CachePolicy
    every: int | Int[Array, ""]

    exact: ClassVar[bool] = False  # `every` is a leaf, not known when a program is built

    def __post_init__(self) -> None:
        check_integer("every", self.every, 1)

    def check_model(self, **facts: Any) -> None:
        """The inner policy's."""
        answers.check_model(self.policy, **facts)

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """The inner policy's."""
        return self.policy.window_length(canvas_length, first_block, block_length)

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The inner window, refreshed periodically."""
        window = self.policy.window(info, canvas_length, block_length)
        due = info.step_in_block % jnp.maximum(jnp.asarray(self.every, jnp.int32), 1) == 0
        return dataclasses.replace(window, refresh=window.refresh | due)


@struct.dataclass
class WithWarmup:
    """The first `steps` steps of block 0 are full forwards, and the next one fills the cache.

    dInfer's warm-up (arXiv 2510.08666, section 5.1): the first guesses change most of the canvas.
    """

    policy: CachePolicy
    steps: int | Int[Array, ""]

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)

    def check_model(self, **facts: Any) -> None:
        """The inner policy's."""
        answers.check_model(self.policy, **facts)

    @property
    def exact(self) -> bool:
        """The inner policy's."""
        return self.policy.exact

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """The inner policy's."""
        return self.policy.window_length(canvas_length, first_block, block_length)

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The inner window, refreshed while block 0 warms up."""
        window = self.policy.window(info, canvas_length, block_length)
        warming = (info.block == 0) & (info.step_in_block <= self.steps)
        return dataclasses.replace(window, refresh=window.refresh | warming)
