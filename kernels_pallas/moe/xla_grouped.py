"""Rows grouped by expert: one batched product for what every expert can expect, a loop for what is more.

The first C rows of each expert go through three batched products over all experts, which read every weight in
place. Routing is uneven, so C is near the mean; an expert's further rows go through a loop over blocks of one
expert each, every block of the size that it needs. There taking an expert by a dynamic index copies its weights,
and each small product pays for waking the threads: worth it only where the rows are many for one expert.

The loop's trip count is data, so the gradient is written out: the same product and loop, recomputed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK_SIZES = (8, 32, 128)
"""Rows per block of the loop. Below 8 nothing is saved; each size is a program of its own to compile."""
ALIGNMENT = 8
"""C is a multiple of it."""
WEIGHTS_LEFT = False
"""Whether products are W . x^T and not x . W^T. The faster one depends on the processor: see `benchmarks.moe_sides`."""


class Grouping(NamedTuple):
    """Places of the S = M * k routed rows: C an expert in the product, or the blocks."""

    place: Int[Array, "M k"]
    """Place in the product, expert * C + rank; E * C for a row that overflows or goes nowhere."""
    source: Int[Array, " E*C"]
    """Occupant of each place, row * k + slot; M * k where there is none."""
    overflow: Int[Array, " S+largest"]
    """Overflowing rows, expert by expert without gaps: row * k + slot; 0 where nothing is left."""
    start: Int[Array, " blocks"]
    """First entry of `overflow` in each block; they rise."""
    expert: Int[Array, " blocks"]
    rows: Int[Array, " blocks"]
    """Number of the block's entries that are the expert's; the following ones belong to the next block."""
    num_blocks: Int[Array, ""]
    """Blocks in use: they come first."""


def capacity(num_rows: int, num_experts: int) -> int:
    """C for `num_rows` = M * k routed rows: an even share and about one standard deviation more.

    So few rows that padding costs nothing all fit, and then there is no loop.
    """
    share = num_rows / num_experts
    wanted = num_rows if num_rows <= 4 * ALIGNMENT else min(share + share**0.5, num_rows)
    return math.ceil(wanted / ALIGNMENT) * ALIGNMENT


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """The loop's sizes worth compiling: none where all rows fit, else up to twice an expert's share."""
    if capacity(num_rows, num_experts) >= num_rows:
        return ()
    wanted = 2 * num_rows // num_experts
    return tuple(size for below, size in zip((0, *BLOCK_SIZES), BLOCK_SIZES, strict=False) if below < max(wanted, 1))


def group_rows(expert_ids: Int[Array, "M k"], num_experts: int, places: int, largest: int) -> Grouping:
    """Places for all routed rows, `places` = C an expert, and blocks of up to `largest` for the rest.

    Rows of one expert keep their order.
    """
    num_tokens, slots = expert_ids.shape
    routed = num_tokens * slots
    flat = expert_ids.reshape(routed)
    chosen = flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)[None]  # an id out of range matches no expert
    running = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    rank = jnp.sum(jnp.where(chosen, running, 0), axis=1, dtype=jnp.int32) - 1
    expert = jnp.clip(flat, 0, num_experts - 1)
    fits = (rank >= 0) & (rank < places)
    place = jnp.where(fits, expert * places + rank, num_experts * places)
    index = jnp.arange(routed, dtype=jnp.int32)
    source = jnp.full(num_experts * places, routed, jnp.int32).at[place].set(index, mode="drop")
    more = jnp.maximum(running[-1] - places, 0)
    first = jnp.cumsum(more, dtype=jnp.int32) - more
    entry = jnp.where(rank >= places, first[expert] + rank - places, routed + largest)
    overflow = jnp.zeros(routed + largest, jnp.int32).at[entry].set(index, mode="drop")
    blocks = -(-more // largest)
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    block = jnp.arange(min(routed, routed // largest + num_experts), dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(block[:, None] >= last[None], axis=1, dtype=jnp.int32), num_experts - 1)
    done = (block - (last - blocks)[owner]) * largest
    return Grouping(
        place=place.reshape(num_tokens, slots), source=source, overflow=overflow,
        start=first[owner] + done, expert=owner, rows=jnp.clip(more[owner] - done, 0, largest), num_blocks=last[-1])


def _swiglu(rows: Array, gate: Array, up: Array, down: Array, *, weights_left: bool) -> Array:
    """Rows [..., R, D] through experts [..., F, D], float32; leading axes are batches."""
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    batch, last = tuple(range(rows.ndim - 2)), rows.ndim - 1

    def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
        return lax.dot_general(
            a, b, (((axis_a,), (axis_b,)), (batch, batch)), precision=precision, preferred_element_type=jnp.float32)

    if not weights_left:
        hidden = (jax.nn.silu(dot(rows, gate, last, last)) * dot(rows, up, last, last)).astype(rows.dtype)
        return dot(hidden, down, last, last)
    # Without the barriers XLA folds both transposes into the products, which are then x . W^T again.
    columns = lax.optimization_barrier(rows.swapaxes(-1, -2))
    hidden = (jax.nn.silu(dot(gate, columns, last, last - 1)) * dot(up, columns, last, last - 1)).astype(rows.dtype)
    return lax.optimization_barrier(dot(down, hidden, last, last - 1)).swapaxes(-1, -2)


def _rows_in_place(x: Array, grouping: Grouping, *, num_experts: int) -> Float[Array, "E C D"]:
    """The rows of the product; any row where nothing has the place."""
    slots = grouping.place.shape[1]
    return x[jnp.minimum(grouping.source // slots, len(x) - 1)].reshape(num_experts, -1, x.shape[1])


def _from_places(values: Float[Array, "E*C D"], grouping: Grouping, *, slot: int) -> Float[Array, "M D"]:
    """Value at the place of each row's slot; zeros for a row without one."""
    place = grouping.place[:, slot, None]
    return jnp.where(place < len(values), values[jnp.minimum(place[:, 0], len(values) - 1)], 0.0)


def _product(
    x: Array, weights: Array, gate: Array, up: Array, down: Array, *, grouping: Grouping, weights_left: bool
) -> Float[Array, "M D"]:
    """Contribution of the rows with a place, float32."""
    rows = _rows_in_place(x, grouping, num_experts=len(gate))
    outputs = _swiglu(rows, gate, up, down, weights_left=weights_left).reshape(-1, x.shape[1])
    total = jnp.zeros(x.shape, jnp.float32)
    for slot in range(weights.shape[1]):  # slot by slot: no [M, k, D] array
        total += weights[:, slot, None].astype(jnp.float32) * _from_places(outputs, grouping, slot=slot)
    return total


def _product_gradient(
    x: Array, weights: Array, gate: Array, up: Array, down: Array, cotangent: Array, *, grouping: Grouping,
    weights_left: bool,
) -> tuple[Array, ...]:
    """Gradients of `_product` in x, weights and the matrices. A row has one place a slot, and a place one row:
    what autodiff would scatter is gathered."""
    slots = weights.shape[1]
    outputs, pull_back = jax.vjp(
        partial(_swiglu, weights_left=weights_left), _rows_in_place(x, grouping, num_experts=len(gate)), gate, up, down)
    filled, entry = grouping.source < weights.size, jnp.minimum(grouping.source, weights.size - 1)
    scale = jnp.where(filled, weights.reshape(-1)[entry].astype(jnp.float32), 0.0)
    rows, *matrices = pull_back((scale[:, None] * cotangent[entry // slots]).reshape(outputs.shape))
    outputs, rows = outputs.reshape(-1, x.shape[1]), rows.reshape(-1, x.shape[1]).astype(jnp.float32)
    at_slots = range(slots)
    grad_x = sum(_from_places(rows, grouping, slot=slot) for slot in at_slots)
    grad_weights = [jnp.sum(cotangent * _from_places(outputs, grouping, slot=slot), axis=1) for slot in at_slots]
    return jnp.asarray(grad_x, x.dtype), jnp.stack(grad_weights, axis=1).astype(weights.dtype), *matrices


class _Block(NamedTuple):
    """One block of the loop: what it reads, and where its results go."""

    rows: Int[Array, " largest"]
    """Rows of x; M, which a scatter drops, where an entry is the next block's."""
    entries: Int[Array, " largest"]
    """row * k + slot; M * k where an entry is the next block's."""
    expert: Int[Array, ""]
    size_index: Int[Array, ""]


def _block(grouping: Grouping, index: Array, *, sizes: tuple[int, ...], slots: int) -> _Block:
    entries = lax.dynamic_slice(grouping.overflow, (grouping.start[index],), sizes[-1:])
    mine = jnp.arange(sizes[-1], dtype=jnp.int32) < grouping.rows[index]
    entries = jnp.where(mine, entries, len(grouping.overflow) - sizes[-1])
    return _Block(
        rows=entries // slots, entries=entries, expert=grouping.expert[index],
        size_index=jnp.sum(grouping.rows[index] > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32))


def _through_expert(
    rows: Array, weights: Array, gate: Array, up: Array, down: Array, *, size_index: Array, sizes: tuple[int, ...],
    weights_left: bool,
) -> Array:
    """A block's rows through one expert, weighted, float32; zeros behind the block's size."""

    def through(size: int, rows: Array, *matrices: Array) -> Array:
        outputs = _swiglu(rows[:size], *matrices, weights_left=weights_left)
        return jnp.pad(outputs, ((0, sizes[-1] - size), (0, 0)))

    result = lax.switch(size_index, [partial(through, size) for size in sizes], rows, gate, up, down)
    return weights[:, None].astype(jnp.float32) * result


def _grouping(expert_ids: Array, gate: Array) -> tuple[Grouping, tuple[int, ...]]:
    """The grouping of a call, and the sizes of its loop's blocks: none where everything has a place."""
    shape = expert_ids.size, gate.shape[0]
    sizes = block_sizes(*shape)
    return group_rows(expert_ids, shape[1], capacity(*shape), sizes[-1] if sizes else 1), sizes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    weights_left: bool, x: Array, expert_ids: Array, weights: Array, gate: Array, up: Array, down: Array
) -> Array:
    grouping, sizes = _grouping(expert_ids, gate)
    total = _product(x, weights, gate, up, down, grouping=grouping, weights_left=weights_left)

    def add_block(index: Array, total: Array) -> Array:
        block = _block(grouping, index, sizes=sizes, slots=weights.shape[1])
        # Only the block's own result goes through the switch: `total` would be copied by every branch.
        result = _through_expert(
            x[block.rows], weights.reshape(-1)[block.entries], gate[block.expert], up[block.expert],
            down[block.expert], size_index=block.size_index, sizes=sizes, weights_left=weights_left)
        return total.at[block.rows].add(result, mode="drop")

    return (lax.fori_loop(0, grouping.num_blocks, add_block, total) if sizes else total).astype(x.dtype)


def _vjp_forward(weights_left: bool, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return _grouped(weights_left, *operands), operands


def _vjp_backward(
    weights_left: bool, operands: tuple[Array, ...], cotangent: Array
) -> tuple[Array | None, ...]:
    """Recompute the two parts: activations are not kept between the passes."""
    x, expert_ids, weights, gate, up, down = operands
    grouping, sizes = _grouping(expert_ids, gate)
    cotangent = cotangent.astype(jnp.float32)
    grads = _product_gradient(x, weights, gate, up, down, cotangent, grouping=grouping, weights_left=weights_left)

    def add_block(index: Array, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        grad_x, grad_weights, *grad_matrices = grads
        block = _block(grouping, index, sizes=sizes, slots=weights.shape[1])
        mine = (block.rows < len(x))[:, None]
        _, pull_back = jax.vjp(
            partial(_through_expert, size_index=block.size_index, sizes=sizes, weights_left=weights_left),
            jnp.where(mine, x[block.rows], 0), weights.reshape(-1)[block.entries],
            *(matrix[block.expert] for matrix in (gate, up, down)))
        rows, row_weights, *matrices = pull_back(jnp.where(mine, cotangent[block.rows], 0.0))
        return (
            grad_x.at[block.rows].add(rows, mode="drop"),
            grad_weights.at[block.entries].add(row_weights, mode="drop"),
            *(grad.at[block.expert].add(part) for grad, part in zip(grad_matrices, matrices, strict=True)))

    if sizes:
        grads = (grads[0], grads[1].reshape(-1), *grads[2:])
        grads = lax.fori_loop(0, grouping.num_blocks, add_block, grads)
    return (grads[0], None, grads[1].reshape(weights.shape), *grads[2:])


_grouped.defvjp(_vjp_forward, _vjp_backward)


def moe_xla_grouped(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
    *,
    weights_left: bool = WEIGHTS_LEFT,
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe`. Reverse mode only, and only once; `weights_left` see `WEIGHTS_LEFT`."""
    return _grouped(weights_left, x, expert_ids, weights, gate, up, down)
