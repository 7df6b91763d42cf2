"""No cache."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from djax.contracts import struct
from djax.contracts.types import StepInfo, Window


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
