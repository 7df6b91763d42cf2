"""Cache policies: when to recompute the whole canvas, and which window otherwise.

A refresh depends on the block index and the step in the block only, never on a row, so that a row of a
batch sees what it sees alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from djax.contracts import answers, struct
from djax.contracts.types import CachePolicy, StepInfo, Window
from djax.errors import ArgumentError, check_integer

__all__ = ["BlockCausal", "Dual", "NoCache", "Periodic", "Prefix", "Vicinity", "WithWarmup"]


@struct.dataclass
class NoCache:
    """A full forward at every step."""

    exact: ClassVar[bool] = True

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """None: no cache is kept."""
        return None

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """Recompute everything, always."""
        return Window(refresh=jnp.bool_(True), start=jnp.int32(0), end=jnp.int32(canvas_length))


@struct.dataclass
class Prefix:
    """Recomputes the block and everything after it (Fast-dLLM's prefix cache, arXiv 2505.22618)."""

    exact: ClassVar[bool] = False  # the prefix is as old as the block's first step

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """Everything from block 0 on: a static width has to hold the longest rest."""
        return canvas_length - first_block

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block and what follows; all on entering a block."""
        return Window(refresh=info.step_in_block == 0, start=info.block_start, end=jnp.int32(canvas_length))


@struct.dataclass
class Dual:
    """Recomputes the block only (Fast-dLLM's dual cache, arXiv 2505.22618)."""

    exact: ClassVar[bool] = False  # all but the block is as old as the block's first step

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """L."""
        return block_length

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block; all on entering it."""
        return Window(refresh=info.step_in_block == 0, start=info.block_start, end=info.block_start + block_length)


@struct.dataclass
class Vicinity:
    """Recomputes the block and its neighbours, `before` and `after` positions (arXiv 2510.08666, 4.4).

    Both are static. The window is cut at the ends of the sequence.
    """

    before: int = struct.field(pytree_node=False, default=16)
    after: int = struct.field(pytree_node=False, default=16)

    exact: ClassVar[bool] = False  # all but the window is as old as the block's first step

    def __post_init__(self) -> None:
        check_integer("before", self.before)
        check_integer("after", self.after)

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """before + L + after, at most the canvas."""
        return min(self.before + block_length + self.after, canvas_length)

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block with its neighbours; all on entering it."""
        return Window(refresh=info.step_in_block == 0, start=jnp.maximum(info.block_start - self.before, 0),
                    end=jnp.minimum(info.block_start + block_length + self.after, canvas_length))


@struct.dataclass
class BlockCausal:
    """For models in which no block sees a later one (block diffusion, BD3-LM, arXiv 2503.09573; LLaDA2).

    One full forward at the start fills the cache with the prompt. From then on each step recomputes the block and the
    one before it, whose keys are by then those of its final tokens; all before are final already. Nothing is stale,
    but blocks have to be decoded without gaps, and their boundaries have to be boundaries of the model's blocks:
    `Canvas.from_prompts(align=True)`, with a block length that is a multiple of the model's.
    """

    exact: ClassVar[bool] = True  # for the models and canvases it is for, and hard tokens

    def check_model(
        self, *, architecture: str, model_block_length: int | None, block_length: int, gaps: bool
    ) -> None:
        """Refuse models without blocks, lengths that cut the model's blocks, and gaps between open blocks."""
        if model_block_length is None:
            raise ArgumentError(
                "recipe", f"the cache policy BlockCausal with {architecture}, whose attention is not causal over "
                "blocks", allowed="another cache policy there", advice="use a recipe with one, such as dinfer()")
        if block_length % model_block_length:
            raise ArgumentError(
                "block_length", f"{block_length} with the cache policy BlockCausal",
                allowed=f"a multiple of {model_block_length}, the model's own block length", advice="give one")
        if gaps:
            raise ArgumentError(
                "recipe", "the cache policy BlockCausal, which needs open positions in every block from the first to "
                "the last", allowed="another cache policy there", advice="use recipe.replace(cache_policy=Dual())")

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """2 L, at most the canvas."""
        return min(2 * block_length, canvas_length)

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block and the one before it; all at the very first step."""
        return Window(refresh=(info.block == 0) & (info.step_in_block == 0),
                    start=jnp.maximum(info.block_start - block_length, 0), end=info.block_start + block_length)


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
        """The inner plan, refreshed periodically."""
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
        """The inner plan, refreshed while block 0 warms up."""
        window = self.policy.window(info, canvas_length, block_length)
        warming = (info.block == 0) & (info.step_in_block <= self.steps)
        return dataclasses.replace(window, refresh=window.refresh | warming)
