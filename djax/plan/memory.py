"""What a generation needs in bytes, from the shapes alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from djax.models.config import ModelConfig
from djax.models.families import family_of
from djax.plan.roofline import Split
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
    experts = max(rows * count * (config.hidden_size * (width + 4) + size * width) for count, size in _passes(config))
    hidden = 4 * rows * config.hidden_size * width
    return MemoryEstimate(
        parameters=parameter_bytes, cache=keys,
        inputs=rows * config.hidden_size * width * 2 if recipe.smoothing.soft else 0,
        logits=logits, activations=int(np.maximum(scores, experts)) + hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of a generation on one device of a mesh."""

    parameters: int
    cache: int
    """Keys and values of the device's rows and heads."""
    other: int
    """Canvas, keys and the numbers of the parts, results, and a TPU's program."""
    temporaries: int
    """The most that lives at once besides, the input embeddings that smoothing carries included."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.cache + self.other + self.temporaries


def estimate_device_memory(
    config: ModelConfig, *, batch: int, canvas_length: int, recipe: Recipe, split: Split, parameter_bytes: int,
    cached: bool, vector_memory_bytes: int | None,
) -> DeviceMemory:
    """Estimate for one device of a mesh, by the largest moment of a full forward: its experts.

    Parameters and cache are exact; temporaries are what djax's kernels and XLA's operations on such hardware hold,
    within a third where they were compared with the compilers' figures (tests/test_plan.py).

    Args:
        config: shapes.
        batch: rows on all devices.
        canvas_length: positions, prompt included.
        recipe: decides what the head is asked for.
        split: into how many parts each axis is split.
        parameter_bytes: of one device's part, which depends on what is replicated.
        cached: whether keys and values are kept.
        vector_memory_bytes: of a TPU, whose routed rows are float32 and whose program counts too; None for a GPU.
    """
    width = 4 if config.dtype == "float32" else 2
    own = batch // split.batch
    rows = own * -(-canvas_length // split.sequence)
    model, passes = config.hidden_size, _passes(config)
    kv = 2 * config.num_layers * own * canvas_length * split.kv_heads(config) * config.head_dim * width
    soft = 2 * own * canvas_length * model * width if recipe.smoothing.soft else 0
    if vector_memory_bytes is None:
        experts = max(rows * count * (model * width + size // split.ffn * 5) for count, size in passes)
        # queries' partial results over three parts of the keys, in float32
        other, rest = 0, 3 * rows * (model * width + 4 * config.num_heads // split.heads * config.head_dim)
    else:
        # the experts' results before and after they are weighted; one is in vector memory if there is room
        wide = max(rows * count * model * 4 for count, _ in passes)
        inside = wide if wide <= 0.8 * vector_memory_bytes else 0
        experts = max(2 * wide - inside, *(
            rows * count * (model * width + size // split.ffn * 10) for count, size in passes))
        other, rest = config.num_layers * _PROGRAM_BYTES, 5 * rows * model * width
    return DeviceMemory(
        parameters=parameter_bytes, cache=kv if cached else 0, other=other + own * canvas_length * 32,
        temporaries=experts + rest + soft)


def _passes(config: ModelConfig) -> set[tuple[int, int]]:
    """Through how many experts a position goes, and of what width, in each kind of layer; a dense block is one."""
    return {(layer.experts_per_token, layer.expert_size) if layer.num_experts else (1, layer.dense_size)
            for layer in family_of(config).feed_forwards(config)}


_PROGRAM_BYTES = 8 * 10**6
"""Code of a TPU's layer, in both kinds of step."""
