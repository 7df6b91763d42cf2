"""The cache of models that are causal over blocks."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from djax.contracts import struct
from djax.contracts.types import StepInfo, Window
from djax.errors import ArgumentError


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
                "blocks", allowed="another cache policy there", advice="use one, such as Vicinity")
        if block_length % model_block_length:
            raise ArgumentError(
                "block_length", f"{block_length} with the cache policy BlockCausal",
                allowed=f"a multiple of {model_block_length}, the model's own block length", advice="give one")
        if gaps:
            raise ArgumentError(
                "recipe", "the cache policy BlockCausal, which needs open positions in every block from the first to "
                "the last", allowed="another cache policy there", advice="use recipe.replace(cache_policy=Dual())")

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """Two blocks: 2 L, at most the canvas."""
        return min(2 * block_length, canvas_length)

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """The block and the one before it; all at the very first step."""
        return Window(refresh=(info.block == 0) & (info.step_in_block == 0),
                      start=jnp.maximum(info.block_start - block_length, 0), end=info.block_start + block_length)
