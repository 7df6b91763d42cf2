"""Rows sorted into blocks of one expert each, and a loop over the blocks that are in use.

The arithmetic is what the routing asks for plus the padding of each expert's last block. The loop's trip
count is data, so the gradient is that of `xla_dense`, recomputed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.moe.xla_dense import moe_xla_dense

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


class BlockPlan(NamedTuple):
    """Where each (row, slot) goes. S = blocks * block_rows places, most of them used."""

    place: Int[Array, "M k"]
    """Place of each (row, slot); S for one whose expert id is out of range."""
    source_row: Int[Array, "S"]
    """Row that fills each place; 0 where nothing does."""
    block_expert: Int[Array, "blocks"]
    """Expert of each block."""
    num_blocks: Int[Array, ""]
    """Blocks in use: they come first."""


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows per block for `num_rows` = M * k routed rows: a power of two near the rows that an expert gets.

    Too few, and an expert's weights are read again for every block; too many, and padding is multiplied.
    """
    rows = SMALLEST_BLOCK
    while rows < LARGEST_BLOCK and rows * num_experts < num_rows:
        rows *= 2
    return rows


def plan_blocks(expert_ids: Int[Array, "M k"], num_experts: int, rows: int) -> BlockPlan:
    """Places for all routed rows, expert by expert, each expert starting a new block of `rows` rows.

    Counting with a cumulative sum instead of sorting: rows of one expert keep their order.
    """
    num_tokens, slots = expert_ids.shape
    routed = num_tokens * slots
    max_blocks = min(routed, -(-routed // rows) + num_experts)
    flat = expert_ids.reshape(routed)
    is_expert = flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)
    running = jnp.cumsum(is_expert.astype(jnp.int32), axis=0)
    rank = jnp.sum(jnp.where(is_expert, running, 0), axis=1) - 1
    blocks = -(-running[-1] // rows)
    last_block = jnp.cumsum(blocks)
    first_place = (last_block - blocks) * rows
    place = jnp.sum(jnp.where(is_expert, first_place, 0), axis=1) + rank
    place = jnp.where(is_expert.any(axis=1), place, max_blocks * rows)
    token = jnp.arange(routed, dtype=jnp.int32) // slots
    source_row = jnp.zeros(max_blocks * rows, jnp.int32).at[place].set(token, mode="drop", unique_indices=True)
    block_expert = jnp.sum(jnp.arange(max_blocks)[:, None] >= last_block, axis=1)
    return BlockPlan(
        place=place.reshape(num_tokens, slots),
        source_row=source_row,
        block_expert=jnp.minimum(block_expert, num_experts - 1),
        num_blocks=last_block[-1],
    )


def _forward(x: Array, expert_ids: Array, weights: Array, gate: Array, up: Array, down: Array) -> Array:
    rows = block_rows(expert_ids.size, gate.shape[0])
    plan = plan_blocks(expert_ids, gate.shape[0], rows)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sorted_rows = x[plan.source_row]

    def dot(a: Array, b: Array) -> Array:
        return lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def one_block(index: Array, outputs: Array) -> Array:
        expert = plan.block_expert[index]
        start = (index * rows, 0)
        block = lax.dynamic_slice(sorted_rows, start, (rows, x.shape[1]))
        hidden = (jax.nn.silu(dot(block, gate[expert])) * dot(block, up[expert])).astype(x.dtype)
        return lax.dynamic_update_slice(outputs, dot(hidden, down[expert]), start)

    outputs = lax.fori_loop(0, plan.num_blocks, one_block, jnp.zeros(sorted_rows.shape, jnp.float32))
    per_slot = outputs.at[plan.place].get(mode="fill", fill_value=0.0)
    weight = jnp.where(plan.place < outputs.shape[0], weights.astype(jnp.float32), 0.0)
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
