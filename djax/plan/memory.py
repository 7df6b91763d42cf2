"""Bytes that a generation needs on one device, from the shapes alone."""

from __future__ import annotations

import dataclasses

from djax.errors import check_integer
from djax.models.config import ModelConfig
from djax.models.families import family_of
from djax.plan.roofline import UNSPLIT, Split
from djax.recipes import Recipe


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
    config: ModelConfig, *, batch: int, canvas_length: int, block_length: int, recipe: Recipe, parameter_bytes: int,
    split: Split = UNSPLIT, vector_memory_bytes: int | None = None,
) -> DeviceMemory:
    """Estimate for one device of a mesh, by the largest moment of a full forward: its experts.

    Parameters and cache are exact; temporaries are what djax's kernels and XLA's operations on such hardware hold,
    within a third where they were compared with the compilers' figures (tests/plan/test_plan.py).

    Args:
        config: shapes.
        batch: rows on all devices.
        canvas_length: positions, prompt included.
        block_length: positions decoded together.
        recipe: decides what is cached, and what the head is asked for.
        parameter_bytes: of one device's part, which depends on what is replicated.
        split: into how many parts each axis is split.
        vector_memory_bytes: of a TPU, whose routed rows are float32 and whose program counts too; None for a GPU.

    Raises:
        ArgumentError: a size below 1, or a block longer than the canvas.
    """
    check_integer("batch", batch, 1)
    check_integer("canvas_length", canvas_length, 1)
    check_integer("block_length", block_length, 1, canvas_length)
    cached = recipe.cache_policy.window_length(canvas_length, 0, block_length) is not None
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
