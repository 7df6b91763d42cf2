"""Fast-dLLM's caches (arXiv 2505.22618, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from djax.contracts import struct
from djax.contracts.types import StepInfo, Window


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
        """The block: L."""
        return block_length

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block; all on entering it."""
        return Window(refresh=info.step_in_block == 0, start=info.block_start, end=info.block_start + block_length)
