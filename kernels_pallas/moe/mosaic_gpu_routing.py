"""Pallas Mosaic GPU kernels around the experts: the router's choice, and the plan of the blocks.

Each is one kernel of a few microseconds where XLA makes a chain of tiny ones: a softmax, a sort and its slices; a
comparison, three sums and the arithmetic between them. At 3 ms a forward those chains would cost a quarter of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.interpret import gpu_interpreter
from kernels_pallas.moe.mosaic_gpu_kernels import WARPGROUP, plgpu
from kernels_pallas.moe.routing import num_blocks

LANES = 64
"""Rows and columns of a tile: a warpgroup's."""

_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def top_k_kernel(
    logits: Float[Array, "M E"], *, k: int, interpret: bool
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Columns of the k largest of each row's softmax, the lowest among equals, and these. E is a multiple of 8."""
    asked = len(logits)
    if asked > 8:  # copies cut more rows than that into groups of 8
        logits = jnp.pad(logits, ((0, -asked % 8), (0, 0)))
    num_rows, columns = logits.shape
    slots = pl.cdiv(k, 8) * 8

    def body(logits_g: Any, ids_g: Any, weights_g: Any, logits_s: Any, ids_s: Any, weights_s: Any, ready: Any) -> None:
        rows = pl.ds(lax.axis_index("tile") * LANES, LANES)
        plgpu.copy_gmem_to_smem(logits_g.at[rows], logits_s, ready)
        plgpu.barrier_wait(ready)
        tile = plgpu.load(logits_s, layout=plgpu.Layout.WGMMA)
        powers = jnp.exp(tile - _down(jnp.max(tile, axis=1), columns))
        shares = powers / _down(jnp.sum(powers, axis=1), columns)
        column, slot = _iota(columns, axis=1), _iota(slots, axis=1)
        ids, weights = jnp.zeros_like(slot), jnp.zeros(slot.shape, jnp.float32)
        for index in range(k):
            best = jnp.max(shares, axis=1)
            at = jnp.min(jnp.where(shares == _down(best, columns), column, columns - 1), axis=1)
            shares = jnp.where(column == _down(at, columns), -1.0, shares)
            ids = jnp.where(slot == index, _down(at, slots), ids)
            weights = jnp.where(slot == index, _down(best, slots), weights)
        ids_s[...], weights_s[...] = ids, weights
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ids_s, ids_g.at[rows])
        plgpu.copy_smem_to_gmem(weights_s, weights_g.at[rows])
        plgpu.wait_smem_to_gmem(0)

    ids, weights = plgpu.kernel(
        body, out_type=[jax.ShapeDtypeStruct((num_rows, slots), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(pl.cdiv(num_rows, LANES),), grid_names=("tile",), kernel_name="moe_top_k",
        scratch_types=[plgpu.SMEM((LANES, columns), jnp.float32), plgpu.SMEM((LANES, slots), jnp.int32),
                       plgpu.SMEM((LANES, slots), jnp.float32), plgpu.Barrier()],
        interpret=gpu_interpreter(interpret), compiler_params=WARPGROUP)(logits)
    return ids[:asked, :k], weights[:asked, :k]


def plan_kernel(
    expert_ids: Int[Array, "M k"], num_experts: int, *, rows: int, interpret: bool
) -> tuple[Int[Array, " places"], Int[Array, " entries"]]:
    """`place_in_blocks(group_rows(expert_ids, num_experts), rows=rows)`, flat and padded to multiples of 64.

    Every routed row is compared with every other: 10^8 comparisons, some 10 us, for 10,000 of them. A program has 64
    rows' places, or 64 blocks' experts.
    """
    routed = expert_ids.size
    flat = jnp.pad(expert_ids.reshape(-1), (0, -routed % LANES), constant_values=-1).astype(jnp.int32)
    chunks = len(flat) // LANES
    total = num_blocks(routed, num_experts, rows=rows)
    tables = pl.cdiv(total, LANES)
    expert_tiles = pl.cdiv(num_experts, LANES)

    def key(ids: Array) -> Array:
        return jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)

    def body(ids_g: Any, place_g: Any, expert_g: Any, ids_s: Any, first_s: Any, used_s: Any, ready: Any) -> None:
        program = lax.axis_index("program")
        plgpu.copy_gmem_to_smem(ids_g, ids_s, ready)
        plgpu.barrier_wait(ready)

        def count(mine: Array, index: Array) -> tuple[Array, Array]:
            """Number of rows with a smaller key than each of `mine`, and of rows with the same key before `index`."""

            def step(chunk: Array, counts: tuple[Array, Array]) -> tuple[Array, Array]:
                other = _across(key(plgpu.load(ids_s.at[chunk], layout=_BY_COLUMN)))
                before = (other == mine) & (_iota(LANES, axis=1) + chunk * LANES < index)
                return counts[0] + (other < mine).astype(jnp.int32), counts[1] + before.astype(jnp.int32)

            less, same = lax.fori_loop(0, chunks, step, (_zeros(), _zeros()))
            return jnp.sum(less, axis=1), jnp.sum(same, axis=1)

        @pl.when(program < chunks)
        def _() -> None:
            mine = key(plgpu.load(ids_s.at[program], layout=_BY_ROW))
            less, same = count(_down(mine, LANES), _iota(LANES, axis=0) + program * LANES)
            place = (_divide(less, rows) + mine) * rows + same
            place_g[pl.ds(program * LANES, LANES)] = jnp.where(mine < num_experts, place, total * rows)

        @pl.when(program >= chunks)
        def _() -> None:
            for tile in range(expert_tiles):
                lanes = pl.ds(tile * LANES, LANES)
                expert = plgpu.layout_cast(lax.iota(jnp.int32, LANES), _BY_ROW) + tile * LANES
                less, same = count(_down(expert, LANES), jnp.full((LANES, LANES), routed))
                first_s[lanes] = _divide(less, rows) + expert
                used_s[lanes] = jnp.where(expert < num_experts, _divide(same + (rows - 1), rows), 0)
            plgpu.commit_smem()
            table = program - chunks
            block, found = _iota(LANES, axis=0) + table * LANES, _zeros()
            for tile in range(expert_tiles):
                lanes = pl.ds(tile * LANES, LANES)
                first, used = (_across(plgpu.load(ref.at[lanes], layout=_BY_COLUMN)) for ref in (first_s, used_s))
                mine = (block >= first) & (block < first + used)
                found += jnp.where(mine, _iota(LANES, axis=1) + (tile * LANES - num_experts), 0)
            expert_g[pl.ds(table * LANES, LANES)] = jnp.sum(found, axis=1) + num_experts

    place, expert = plgpu.kernel(
        body, out_type=[jax.ShapeDtypeStruct((tiles * LANES,), jnp.int32) for tiles in (chunks, tables)],
        grid=(chunks + tables,), grid_names=("program",), kernel_name="moe_plan",
        scratch_types=[plgpu.SMEM((chunks, LANES), jnp.int32),
                       *[plgpu.SMEM((expert_tiles * LANES,), jnp.int32)] * 2, plgpu.Barrier()],
        interpret=gpu_interpreter(interpret), compiler_params=WARPGROUP)(flat.reshape(chunks, LANES))
    return place, expert


def _iota(columns: int, *, axis: int) -> Int[Array, "64 N"]:
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (LANES, columns), axis), plgpu.Layout.WGMMA)


def _zeros() -> Int[Array, "64 64"]:
    return plgpu.layout_cast(jnp.zeros((LANES, LANES), jnp.int32), plgpu.Layout.WGMMA)


def _down(values: Array, columns: int) -> Array:
    """A value for each row, in every column."""
    return lax.broadcast_in_dim(values, (LANES, columns), (0,))


def _across(values: Array) -> Array:
    """A value for each column, in every row."""
    return lax.broadcast_in_dim(values, (LANES, LANES), (1,))


def _divide(values: Array, divisor: int) -> Array:
    """Divide numbers that are not negative: // would lower to a correction for signs."""
    return lax.div(values, jnp.full_like(values, divisor))
