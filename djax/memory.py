"""What a generation needs in bytes, from the shapes alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from djax.config import ModelConfig
from djax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes over all devices; temporaries are the largest that live at once, the rest lives throughout.

    Temporaries are those of XLA's own operations, an upper bound: kernels hold neither logits nor attention scores.
    """

    parameters: int
    cache: int
    """Keys and values of the whole canvas; 0 without a cache."""
    inputs: int
    """Input embeddings that smoothing carries between steps; 0 for hard tokens."""
    logits: int
    """float32 logits of the block, twice: as the head gives them and as the transforms leave them."""
    activations: int
    """The widest layer of a full forward: hidden states, attention scores, experts' hidden units."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.cache + self.inputs + self.logits + self.activations


def estimate_memory(
    config: ModelConfig, *, batch: int, canvas_length: int, block_length: int, recipe: Recipe, parameter_bytes: int
) -> MemoryEstimate:
    """Estimate for `batch` canvases of `canvas_length` positions, prompt included.

    Raises:
        ValueError: a size below 1, or a block longer than the canvas.
    """
    for name, size in (("batch", batch), ("canvas_length", canvas_length), ("block_length", block_length)):
        if size < 1:
            raise ValueError(f"{name}: got {size}; it must be at least 1")
    if block_length > canvas_length:
        raise ValueError(f"block_length: got {block_length}; at most canvas_length={canvas_length}")
    width = 4 if config.dtype == "float32" else 2
    rows = batch * canvas_length
    window = recipe.cache_policy.window_length(canvas_length, 0, block_length)
    keys = 0 if window is None else 2 * config.num_layers * rows * config.num_kv_heads * config.head_dim * width
    logits = 2 * 4 * batch * block_length * config.vocab_size
    scores = 2 * 4 * batch * config.num_heads * canvas_length**2
    routed = rows * config.experts_per_token
    experts = routed * (config.hidden_size * (width + 4) + config.expert_size * width)
    hidden = 4 * rows * config.hidden_size * width
    return MemoryEstimate(
        parameters=parameter_bytes, cache=keys,
        inputs=rows * config.hidden_size * width * 2 if recipe.smoothing.soft else 0,
        logits=logits, activations=int(np.maximum(scores, experts)) + hidden)
