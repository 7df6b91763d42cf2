"""Rows sorted by expert, and a loop over blocks of one expert each, every block of the size that it needs.

The arithmetic is what the routing asks for plus the padding of each expert's last block. The loop's trip
count is data, so the gradient is that of `xla_dense`, recomputed.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.moe.xla_dense import moe_xla_dense

BLOCK_SIZES = (8, 16, 32, 48, 64)
"""Rows per block. On CPU 64 rows already cost as much per row as more do, and below 8 nothing is saved."""


class BlockPlan(NamedTuple):
    """Where each (row, slot) goes: S = M * k places, expert by expert without gaps, and room for one block."""

    place: Int[Array, "M k"]
    """Place of each (row, slot); S and beyond for one whose expert id is out of range."""
    source_row: Int[Array, "S+largest"]
    """Row that fills each place; 0 where nothing does."""
    start: Int[Array, "blocks"]
    """First place of each block; they rise."""
    expert: Int[Array, "blocks"]
    size_index: Int[Array, "blocks"]
    """Index of the smallest size that holds what is left of the expert's rows."""
    num_blocks: Int[Array, ""]
    """Blocks in use: they come first."""


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """The sizes worth compiling for `num_rows` = M * k routed rows: up to four times an expert's share.

    An expert with more rows gets several blocks, and its weights are read again for each.
    """
    wanted = min(4 * -(-num_rows // num_experts), num_rows)
    return tuple(size for below, size in zip((0, *BLOCK_SIZES), BLOCK_SIZES, strict=False) if below < wanted)


def plan_blocks(expert_ids: Int[Array, "M k"], num_experts: int, sizes: tuple[int, ...]) -> BlockPlan:
    """Places for all routed rows, and the blocks that cover them. Rows of one expert keep their order."""
    num_tokens, slots = expert_ids.shape
    routed, largest = num_tokens * slots, sizes[-1]
    flat = expert_ids.reshape(routed)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros(routed, jnp.int32).at[order].set(jnp.arange(routed, dtype=jnp.int32), unique_indices=True)
    count = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    blocks = -(-count // largest)
    last_block, last_place = jnp.cumsum(blocks), jnp.cumsum(count)
    index = jnp.arange(min(routed, routed // largest + num_experts))
    expert = jnp.minimum(jnp.sum(index[:, None] >= last_block, axis=1), num_experts - 1)
    done = (index - (last_block - blocks)[expert]) * largest
    left = count[expert] - done
    return BlockPlan(
        place=jnp.where(flat < num_experts, place, routed).reshape(num_tokens, slots),
        source_row=jnp.concatenate([order // slots, jnp.zeros(largest, jnp.int32)]),
        start=(last_place - count)[expert] + done,
        expert=expert,
        size_index=jnp.sum(left[:, None] > jnp.asarray(sizes[:-1], jnp.int32), axis=1),
        num_blocks=last_block[-1],
    )


def _swiglu(size: int, rows: Array, gate: Array, up: Array, down: Array) -> Array:
    """The first `size` rows through one expert, float32, and zeros for the others."""
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None

    def dot(a: Array, b: Array) -> Array:
        return lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    used = rows[:size]
    hidden = (jax.nn.silu(dot(used, gate)) * dot(used, up)).astype(rows.dtype)
    return jnp.pad(dot(hidden, down), ((0, len(rows) - size), (0, 0)))


def _forward(x: Array, expert_ids: Array, weights: Array, gate: Array, up: Array, down: Array) -> Array:
    sizes = block_sizes(expert_ids.size, gate.shape[0])
    plan = plan_blocks(expert_ids, gate.shape[0], sizes)
    sorted_rows = x[plan.source_row]

    def one_block(index: Array, outputs: Array) -> Array:
        expert, start = plan.expert[index], (plan.start[index], 0)
        rows = lax.dynamic_slice(sorted_rows, start, (sizes[-1], x.shape[1]))
        # Only the block's own result goes through the switch: `outputs` would be copied by every branch.
        result = lax.switch(
            plan.size_index[index], [partial(_swiglu, size) for size in sizes],
            rows, gate[expert], up[expert], down[expert])
        # What lies behind the expert's rows belongs to later blocks, which overwrite it.
        return lax.dynamic_update_slice(outputs, result, start)

    outputs = lax.fori_loop(0, plan.num_blocks, one_block, jnp.zeros(sorted_rows.shape, jnp.float32))
    routed = plan.place < expert_ids.size
    per_slot = jnp.where(routed[:, :, None], outputs[plan.place], 0.0)
    weight = jnp.where(routed, weights.astype(jnp.float32), 0.0)
    return jnp.sum(per_slot * weight[:, :, None], axis=1).astype(x.dtype)


@jax.custom_vjp
def moe_xla_blocks(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe`. Reverse mode only: the backward pass is `xla_dense`'s."""
    return _forward(x, expert_ids, weights, gate, up, down)


def _vjp_forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return _forward(*operands), operands


def _vjp_backward(operands: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    x, expert_ids, weights, gate, up, down = operands
    _, pull_back = jax.vjp(
        lambda x, weights, gate, up, down: moe_xla_dense(x, expert_ids, weights, gate, up, down),
        x, weights, gate, up, down)
    grad_x, *grads = pull_back(cotangent)
    return (grad_x, None, *grads)


moe_xla_blocks.defvjp(_vjp_forward, _vjp_backward)
