"""dInfer's vicinity refresh (arXiv 2510.08666, section 4.4)."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from djax.contracts import struct
from djax.contracts.types import StepInfo, Window
from djax.errors import check_integer


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
