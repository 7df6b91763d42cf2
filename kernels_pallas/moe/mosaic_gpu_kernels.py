"""Pallas Mosaic GPU kernels of the experts, for NVIDIA's Hopper GPUs.

Decoding reads every chosen expert's weights for a dozen rows each, so the products are laid out around the weights:
they are wgmma's M operand, in the checkpoint's own order, and the rows of a block its N operand, of which there may
be as few as 8. A block's rows are all of one expert. The columns of a block are neighbours in the grid, and so are the
blocks of an expert: what a second block reads, the second-level cache holds.

`grouped_product` has two forms. With one warpgroup a program is small enough for two or three of them on a
multiprocessor, which cover each other's beginnings and ends. With more, one warpgroup only copies and the others
multiply, each its share of the outputs: what tensor cores want when an expert has a hundred rows and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int

from kernels_pallas.interpret import gpu_interpreter

plgpu: Any = mosaic_gpu  # what it has and how it is called changes with JAX's version

ROW_CHUNK = 512
"""Columns of a row that one program moves. Rows are a grid's last axis: the others end at 65535."""
WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


class Tile(NamedTuple):
    """The tile that one program computes at a time."""

    rows: int
    """Rows of a block: a multiple of 8, at most 256."""
    outputs: int
    """Outputs of a matrix for each computing warpgroup: a multiple of 64."""
    depth: int
    """Inputs of a step: 64, or 128 in 8 bits, is a line of the cache."""
    stages: int
    """Steps whose operands are in shared memory at once."""
    warpgroups: int
    """Warpgroups that compute."""


def fitting_tile(config: Mapping[str, int], product: str, *, outputs: int, inputs: int) -> Tile:
    """The tile that a regime's numbers give `product` ("gate_up" or "down"), cut where a matrix is smaller."""
    span, warpgroups = config[f"{product}_outputs"], config[f"{product}_warpgroups"]
    while warpgroups > 1 and outputs % (span * warpgroups):
        warpgroups //= 2
    return Tile(
        rows=config["rows"], outputs=math.gcd(span, outputs), depth=math.gcd(config[f"{product}_depth"], inputs),
        stages=config[f"{product}_stages"], warpgroups=warpgroups)


def grouped_product(
    expert: Int[Array, " entries"],
    rows: Array,
    matrices: Sequence[Array],
    scales: Sequence[Float[Array, "E N"]],
    *,
    blocks: int,
    tile: Tile,
    interpret: bool,
) -> Array:
    """Each block's rows through its expert's matrices: one projection, or a pair of them and SwiGLU.

    A block whose expert is E is skipped: its output is whatever the memory held.

    Args:
        expert: the expert of each block, and possibly more entries than blocks.
        rows: [blocks * R, K] for a pair of matrices, [blocks, K, R] for a single one.
        matrices: one or two of [E, N, K], in the rows' dtype or in 8 bits.
        scales: factors of the matrices' outputs where they have 8 bits; else none.

    Returns:
        [blocks, N, R] for a pair, which is what a following single product reads; [blocks * R, N] for a single one.
    """
    num_experts, width, depth = matrices[0].shape
    pair, dtype = len(matrices) == 2, rows.dtype
    late = 0 if scales or depth == tile.depth else 1
    several = tile.warpgroups > 1
    span = tile.outputs * tile.warpgroups
    out_tile = (tile.outputs, tile.rows) if pair else (tile.rows, tile.outputs)

    def multiply(worker: Any, accumulators: Sequence[Any], rows_s: Any, *matrices_s: Any) -> None:
        rows_s = rows_s.transpose((1, 0)) if pair else rows_s
        mine = pl.ds(worker * tile.outputs, tile.outputs) if several else slice(None)
        for matrix_s, accumulator in zip(matrices_s, accumulators, strict=True):
            if scales:
                _multiply_cast(accumulator, matrix_s.at[mine], rows_s, interpret=interpret)
            else:
                plgpu.wgmma(accumulator, matrix_s.at[mine], rows_s)
        # Nothing else waits before the copies of a later step overwrite the operands. Those of this step are
        # safe for one more step, unless registers hold some of them.
        plgpu.wgmma_wait(late * len(matrices))

    def finish(products: Sequence[Array], scales_g: Sequence[Any], staged: Any, target: Any) -> None:
        for scale_g in scales_g:
            scale = plgpu.load(scale_g, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            products = [*products[1:], products[0] * lax.broadcast_in_dim(scale, products[0].shape, (0,))]
        if pair:
            gate, up = products
            staged[...] = (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype)
        else:
            # A register holds neighbours along the rows; after this along the outputs, which is how they are stored.
            staged.transpose((1, 0))[...] = plgpu.layout_cast(
                products[0].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0)

    def body(expert_g: Any, rows_g: Any, *refs: Any) -> None:
        matrices_g, scales_g, output_g = refs[: len(matrices)], refs[len(matrices) : -1], refs[-1]
        block, column = lax.axis_index("block"), lax.axis_index("column")
        worker = lax.axis_index("worker") if several else 0
        chosen = expert_g[block]
        outputs = pl.ds(column * span + worker * tile.outputs, tile.outputs)
        block_rows = pl.ds(block * tile.rows, tile.rows)

        @pl.when(chosen < num_experts)
        def _() -> None:
            run = _run_with_workers if several else _run_alone
            run(partial(multiply, worker),
                partial(finish, scales_g=[scale_g.at[chosen, outputs] for scale_g in scales_g],
                        target=output_g.at[block, outputs] if pair else output_g.at[block_rows, outputs]),
                [rows_g.at[block_rows] if pair else rows_g.at[block], *(m.at[chosen] for m in matrices_g)],
                steps=depth // tile.depth, tile=tile, worker=worker,
                specs=[
                    plgpu.BlockSpec((tile.rows, tile.depth), lambda step: (0, step), delay_release=late) if pair
                    else plgpu.BlockSpec((tile.depth, tile.rows), lambda step: (step, 0), delay_release=late),
                    *[plgpu.BlockSpec((span, tile.depth), lambda step: (column, step), delay_release=late)
                      for _ in matrices]],
                staging=(out_tile, dtype))

    shape = (blocks, width, tile.rows) if pair else (blocks * tile.rows, width)
    threads = {"num_threads": tile.warpgroups + 1, "thread_name": "worker"} if several else {}
    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(shape, dtype), grid=(blocks, width // span),
        grid_names=("block", "column"), kernel_name="moe_gate_up" if pair else "moe_down",
        interpret=gpu_interpreter(interpret), **threads, compiler_params=WARPGROUP)(expert, rows, *matrices, *scales)


def _multiply_cast(accumulator: Any, matrix_s: Any, rows_s: Any, *, interpret: bool) -> None:
    """The product of an 8-bit matrix, cast in registers, which wgmma takes for its first operand."""
    matrix = matrix_s[...]
    if matrix.dtype == jnp.float8_e4m3fn:  # the hardware casts 8-bit floats to float16 and float32 alone
        matrix = matrix.astype(jnp.float32)
    matrix = matrix.astype(rows_s.dtype)
    if not interpret:
        plgpu.wgmma(accumulator, matrix, rows_s)
        return

    def through_memory(cast_s: Any) -> None:
        cast_s[...] = matrix
        plgpu.wgmma(accumulator, cast_s, rows_s)

    # the interpreter's wgmma has no operand in registers
    pl.run_scoped(through_memory, plgpu.SMEM(matrix.shape, matrix.dtype))


def _run_alone(
    multiply: Any, finish: Any, operands: Sequence[Any], *, steps: int, tile: Tile, worker: Any,
    specs: Sequence[Any], staging: tuple[tuple[int, int], Any],
) -> None:
    """One warpgroup copies and multiplies; its output then takes the place of the operands in shared memory."""
    del worker

    def products(*accumulators: Any) -> list[Array]:
        plgpu.emit_pipeline(
            lambda _, *step: multiply(accumulators, *step), grid=(steps,), in_specs=specs,
            max_concurrent_steps=min(tile.stages, steps))(*operands)
        return [accumulator[...] for accumulator in accumulators]

    results = pl.run_scoped(products, *_accumulators(tile, operands))
    pl.run_scoped(lambda staged: finish(results, staged=staged), plgpu.SMEM(*staging))


def _run_with_workers(
    multiply: Any, finish: Any, operands: Sequence[Any], *, steps: int, tile: Tile, worker: Any,
    specs: Sequence[Any], staging: tuple[tuple[int, int], Any],
) -> None:
    """The last warpgroup copies for all others."""
    shape, dtype = staging

    def scope(staged: Any) -> None:
        def step(_: Any, *operands_s: Any) -> Any:
            *matrices_s, accumulators = operands_s
            multiply(accumulators, *matrices_s)
            return accumulators

        def compute(pipeline: Any) -> None:
            def products(*accumulators: Any) -> list[Array]:
                pipeline(accumulators)
                return [accumulator[...] for accumulator in accumulators]

            results = pl.run_scoped(products, *_accumulators(tile, operands))
            finish(results, staged=staged.at[worker])

        plgpu.emit_pipeline_warp_specialized(
            step, grid=(steps,), in_specs=specs, max_concurrent_steps=min(tile.stages, steps), memory_registers=40,
            wg_axis="worker", num_compute_wgs=tile.warpgroups, compute_context=compute)(*operands)

    pl.run_scoped(scope, plgpu.SMEM((tile.warpgroups, *shape), dtype), collective_axes="worker")


def _accumulators(tile: Tile, operands: Sequence[Any]) -> list[Any]:
    return [plgpu.ACC((tile.outputs, tile.rows), jnp.float32)] * (len(operands) - 1)


def spread_rows(
    x: Float[Array, "M D"], place: Int[Array, " M*k"], *, slots: int, num_places: int, interpret: bool
) -> Float[Array, "places D"]:
    """Each row copied to its k = `slots` places; a place out of range copies nothing.

    Places that no row has hold whatever the memory held. A row is read once. `place` may be longer than M * k.
    """
    rows, model = x.shape
    chunk = math.gcd(model, ROW_CHUNK)

    def body(x_g: Any, place_g: Any, output_g: Any) -> None:
        index, columns = lax.axis_index("row"), pl.ds(lax.axis_index("chunk") * chunk, chunk)
        row = x_g[index, columns]
        for slot in range(slots):
            target = place_g[index * slots + slot]

            @pl.when(target < num_places)
            def _(target: Any = target) -> None:
                output_g[target, columns] = row

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((num_places, model), x.dtype), grid=(model // chunk, rows),
        grid_names=("chunk", "row"), kernel_name="moe_spread", interpret=gpu_interpreter(interpret),
        compiler_params=WARPGROUP)(x, place)


def mix_rows(
    outputs: Float[Array, "places D"], place: Int[Array, " M*k"], weights: Float[Array, "M k"], *, interpret: bool
) -> Float[Array, "M D"]:
    """Each row's weighted sum over its places, taken in float32; a place out of range adds nothing."""
    num_places, model = outputs.shape
    rows, slots = weights.shape
    chunk = math.gcd(model, ROW_CHUNK)

    def body(outputs_g: Any, place_g: Any, weights_g: Any, mixed_g: Any) -> None:
        index, columns = lax.axis_index("row"), pl.ds(lax.axis_index("chunk") * chunk, chunk)
        total = jnp.zeros(chunk, jnp.float32)
        for slot in range(slots):
            source, weight = place_g[index * slots + slot], weights_g[index, slot]

            def add(total: Array, source: Any = source, weight: Any = weight) -> Array:
                return total + weight * outputs_g[source, columns].astype(jnp.float32)

            total = lax.cond(source < num_places, add, lambda total: total, total)
        mixed_g[index, columns] = total.astype(outputs.dtype)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((rows, model), outputs.dtype), grid=(model // chunk, rows),
        grid_names=("chunk", "row"), kernel_name="moe_mix", interpret=gpu_interpreter(interpret),
        compiler_params=WARPGROUP)(outputs, place, weights)
