"""Attention of a short window over a long cache on Hopper: the keys split over blocks (Pallas Mosaic GPU).

Reading the cache is the cost: 9.8 MB for 1200 keys of 16 heads of 128, 2.3 us at 4.3 TB/s, if enough blocks read at
once. A block is one warpgroup: 64 rows (the M of wgmma) of one key/value head and one stretch of its keys. Tiles of
64 keys and values come by TMA straight from the cache's [B, T, G, K] order through a ring of two stages; what lies
outside the canvas comes as zeros and is masked, so nothing is transposed, and padded, which is a copy, only where a
length above 8 is no multiple of 8. The softmax is the online one (arXiv 2205.14135), in units of log2.

The query heads of a key/value head share a block's rows, up to eight of them, so that grouped heads read their keys
once. Where rows and heads alone do not fill the GPU, a block's stretch is a split of the keys (arXiv 2311.01282), with
partial results in float32, 0.8 MB a split at 96 queries of 16 heads, and one fusion that combines them.

At a head of 128 a block has 92 KB of shared memory and at most 190 registers a thread, without spills: an SM holds
two, and one computes while the other waits. With all keys in one split a refresh of the whole canvas works too, but
each 64 rows read the keys again from L2, where cuDNN's blocks take 128: there this is the second choice.

A mask says which keys exist. Tiles before the first and after the last key of a row are not read; nor are those
beyond the limit of a block's last query.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.xla import attention_xla
from kernels_pallas.configs import load_config
from kernels_pallas.gradient import with_gradient_of
from kernels_pallas.hardware import device_kind
from kernels_pallas.interpret import gpu_interpreter

ROWS = 64
"""Rows of a block: the M of one warpgroup's wgmma."""
MAX_FOLD = 8
"""Query heads that share a block's rows: each has a multiple of 8 rows, the height of a swizzled tile."""
TILE_ROWS = 8
"""Height of a swizzled tile: an array that a copy cuts is no higher, or a multiple of it."""
NO_KEY = float(jnp.finfo(jnp.float32).min)
"""Score of a key that is not seen, and log-sum of no keys."""
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The layout of a call over blocks."""

    fold: int
    """Query heads in a block's rows."""
    queries: int
    """Window positions in a block's rows, for each of these heads."""
    query_tiles: int
    key_tile: int
    """Keys of a step."""
    key_tiles: int
    splits: int
    stages: int
    """Steps of keys and values in flight."""


def make_tiling(query: Any, key: Any, *, key_tile: int, stages: int, blocks: int, max_splits: int) -> Tiling:
    """Layout for operands with these shapes: keys are split into as many parts as `blocks` blocks allow."""
    batch, window, heads, _ = query.shape
    length, groups = key.shape[1:3]
    fold = math.gcd(heads // groups, MAX_FOLD)
    queries = ROWS // fold
    query_tiles, key_tiles = pl.cdiv(window, queries), pl.cdiv(length, key_tile)
    without_split = batch * heads // fold * query_tiles
    splits = min(max(blocks // without_split, 1), key_tiles, max_splits)
    return Tiling(
        fold=fold, queries=queries, query_tiles=query_tiles, key_tile=key_tile, key_tiles=key_tiles,
        # as many as are needed for the share that one has to take
        splits=pl.cdiv(key_tiles, pl.cdiv(key_tiles, splits)), stages=min(stages, pl.cdiv(key_tiles, splits)))


def _tile_spans(
    key_mask: Bool[Array, "B T"], limit_rows: Int[Array, "tiles rows"] | None, tiling: Tiling
) -> Int[Array, "B tiles 2"]:
    """First key tile that a block of queries needs, and one past its last; equal where it sees no key."""
    length = key_mask.shape[1]
    first = jnp.argmax(key_mask, axis=1).astype(jnp.int32)
    end = jnp.where(key_mask.any(axis=1), length - jnp.argmax(key_mask[:, ::-1], axis=1).astype(jnp.int32), 0)
    ends = jnp.broadcast_to(end[:, None], (len(end), tiling.query_tiles))
    if limit_rows is not None:
        ends = jnp.minimum(ends, limit_rows.max(axis=1))
    start = first[:, None] // tiling.key_tile
    return jnp.stack(jnp.broadcast_arrays(start, jnp.maximum(pl.cdiv(ends, tiling.key_tile), start)), axis=-1)


def _limit_rows(key_limit: Int[Array, " W"], tiling: Tiling) -> Int[Array, "tiles rows"]:
    """Limits in the order of a block's rows: all its queries for one head, then for the next."""
    padded = jnp.pad(key_limit.astype(jnp.int32), (0, tiling.query_tiles * tiling.queries - len(key_limit)))
    return jnp.tile(padded.reshape(tiling.query_tiles, tiling.queries), (1, tiling.fold))


def _combine(
    parts: Float[Array, "S B C tiles rows K"], log_sums: Float[Array, "S B C tiles rows"], tiling: Tiling, window: int
) -> Float[Array, "B W H K"]:
    """Average of the splits, weighted by their sums of weights. Written split by split, so that it is one fusion."""
    _, batch, chunks, tiles, _, width = parts.shape
    top = functools.reduce(jnp.maximum, log_sums)
    weights = [jnp.exp2(log_sum - top)[..., None] for log_sum in log_sums]
    mixed = functools.reduce(jnp.add, (weight * part for weight, part in zip(weights, parts, strict=True)))
    mixed = mixed / functools.reduce(jnp.add, weights)
    mixed = mixed.reshape(batch, chunks, tiles, tiling.fold, tiling.queries, width).transpose(0, 2, 4, 1, 3, 5)
    return mixed.reshape(batch, tiles * tiling.queries, chunks * tiling.fold, width)[:, :window]


def _kernel(
    span_ref: Any, mask_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any, tiling: Tiling,
    limited: bool,
) -> None:
    """One block: `tiling.queries` window positions of `tiling.fold` heads, over one split's key tiles."""
    limit_ref, refs = (refs[0], refs[1:]) if limited else (None, refs)
    out_refs, (query_tile, limits, query_ready, limit_ready) = refs[:-4], refs[-4:]
    batch, chunk, split, tile = (lax.axis_index(name) for name in ("batch", "chunk", "split", "tile"))
    group = chunk * tiling.fold // (query_ref.shape[2] // key_ref.shape[2])
    width = query_ref.shape[3]
    window = pl.ds(tile * tiling.queries, tiling.queries)
    for index in range(tiling.fold):
        plgpu.copy_gmem_to_smem(
            query_ref.at[batch, window, chunk * tiling.fold + index],
            query_tile.at[pl.ds(index * tiling.queries, tiling.queries)], query_ready)
    if limit_ref is not None:
        plgpu.copy_gmem_to_smem(limit_ref.at[tile], limits, limit_ready)
    start, end = span_ref[batch, tile, 0], span_ref[batch, tile, 1]
    share = pl.cdiv(end - start, tiling.splits)
    start = start + split * share
    steps = jnp.minimum(share, end - start)

    def attend(
        keys: Any, values: Any, masks: Any, weight_tile: Any, keys_ready: Any, values_ready: Any
    ) -> tuple[Array, ...]:
        def fetch(step: Array, slot: Any) -> None:
            tile_keys = pl.ds((start + step) * tiling.key_tile, tiling.key_tile)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, tile_keys, group], keys.at[slot], keys_ready.at[slot])
            plgpu.copy_gmem_to_smem(mask_ref.at[batch, tile_keys], masks.at[slot], keys_ready.at[slot])
            plgpu.copy_gmem_to_smem(value_ref.at[batch, tile_keys, group], values.at[slot], values_ready.at[slot])

        for stage in range(tiling.stages):
            pl.when(stage < steps)(functools.partial(fetch, jnp.int32(stage), stage))
        plgpu.barrier_wait(query_ready)
        if limit_ref is not None:
            plgpu.barrier_wait(limit_ready)

        def step_over(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            mixed, top, total = carry
            slot = lax.rem(step, jnp.int32(tiling.stages))
            plgpu.barrier_wait(keys_ready.at[slot])

            def scores_of(scores: Any) -> Array:
                plgpu.wgmma(scores, query_tile, keys.at[slot].transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, tiling.key_tile), jnp.float32))
            shape = scores.shape
            seen = lax.broadcast_in_dim(masks[slot], shape, (1,)) > 0
            if limit_ref is not None:
                position = lax.broadcasted_iota(jnp.int32, shape, 1)
                first = (start + step) * tiling.key_tile
                seen = seen & (position < lax.broadcast_in_dim(limits[...] - first, shape, (0,)))
            scores = jnp.where(seen, scores * (width**-0.5 * LOG2_E), NO_KEY)
            new_top = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, shape, (0,)))
            weights = jnp.where(seen, weights, 0.0)
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + weights.sum(axis=1)
            weight_tile[...] = weights.astype(weight_tile.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(values_ready.at[slot])

            def mixture_of(mixture: Any) -> Array:
                plgpu.wgmma(mixture, weight_tile, values.at[slot])
                return mixture[...]

            mixed = mixed * lax.broadcast_in_dim(shrink, mixed.shape, (0,))
            mixed = mixed + pl.run_scoped(mixture_of, plgpu.ACC((ROWS, width), jnp.float32))
            pl.when(step + tiling.stages < steps)(functools.partial(fetch, step + tiling.stages, slot))
            return mixed, new_top, total

        return lax.fori_loop(0, steps, step_over, (
            jnp.zeros((ROWS, width), jnp.float32), jnp.full((ROWS,), NO_KEY, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32)))

    ring = functools.partial(plgpu.Barrier, num_barriers=tiling.stages)
    mixed, top, total = pl.run_scoped(
        attend,
        plgpu.SMEM((tiling.stages, tiling.key_tile, width), key_ref.dtype),
        plgpu.SMEM((tiling.stages, tiling.key_tile, width), value_ref.dtype),
        plgpu.SMEM((tiling.stages, tiling.key_tile), mask_ref.dtype),
        plgpu.SMEM((ROWS, tiling.key_tile), value_ref.dtype),
        ring(num_arrivals=2), ring(num_arrivals=1))
    total = jnp.where(total > 0, total, 1.0)
    mixed = mixed / lax.broadcast_in_dim(total, mixed.shape, (0,))

    def store(staged: Any, log_sums: Any) -> None:
        staged[...] = mixed.astype(staged.dtype)
        if log_sums is not None:
            log_sums[...] = top + jnp.log(total) * LOG2_E
        plgpu.commit_smem()
        if log_sums is not None:
            plgpu.copy_smem_to_gmem(staged, out_refs[0].at[split, batch, chunk, tile])
            plgpu.copy_smem_to_gmem(log_sums, out_refs[1].at[split, batch, chunk, tile])
        else:
            for index in range(tiling.fold):
                plgpu.copy_smem_to_gmem(
                    staged.at[pl.ds(index * tiling.queries, tiling.queries)],
                    out_refs[0].at[batch, window, chunk * tiling.fold + index])
        plgpu.wait_smem_to_gmem(0)

    # after the ring is given back: the staging tile takes its memory
    pl.run_scoped(
        store, plgpu.SMEM((ROWS, width), out_refs[0].dtype),
        plgpu.SMEM((ROWS,), jnp.float32) if tiling.splits > 1 else None)


def _whole_tiles(array: Float[Array, "B N H K"]) -> Float[Array, "B P H K"]:
    """With zeros behind, as the compiler wants the axis that copies cut."""
    length = array.shape[1]
    padding = -length % TILE_ROWS if length > TILE_ROWS else 0
    return jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else array


def _forward(
    query: Array, key: Array, value: Array, key_mask: Array, key_limit: Array | None, *, tiling: Tiling,
    interpret: bool,
) -> Array:
    batch, window, heads, width = query.shape
    limits = None if key_limit is None else _limit_rows(key_limit, tiling)
    padding = tiling.key_tiles * tiling.key_tile - key.shape[1]
    exists = jnp.pad(key_mask.astype(jnp.float32), ((0, 0), (0, padding)))
    query, key, value = (_whole_tiles(array) for array in (query, key, value))
    chunks = heads // tiling.fold
    rows = (tiling.splits, batch, chunks, tiling.query_tiles, ROWS)
    partials = [jax.ShapeDtypeStruct((*rows, width), jnp.float32), jax.ShapeDtypeStruct(rows, jnp.float32)]
    outputs = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, limited=limits is not None),
        out_type=partials if tiling.splits > 1 else [jax.ShapeDtypeStruct(query.shape, value.dtype)],
        grid=(batch, chunks, tiling.splits, tiling.query_tiles), grid_names=("batch", "chunk", "split", "tile"),
        scratch_types=(
            plgpu.SMEM((ROWS, width), query.dtype), plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.Barrier(num_arrivals=tiling.fold), plgpu.Barrier()),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        kernel_name="attention",
        interpret=gpu_interpreter(interpret),
    )(_tile_spans(key_mask, limits, tiling), exists, query, key, value, *([] if limits is None else [limits]))
    if tiling.splits == 1:
        return outputs[0][:, :window]
    return _combine(outputs[0], outputs[1], tiling, window).astype(value.dtype)


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))  # so that a model's layers share one tracing
def attention_mosaic_gpu(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    key_mask: Bool[Array, "B T"],
    key_limit: Int[Array, " W"] | None,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B W H K"]:
    """See `kernels_pallas.attention`; query w sees only keys before `key_limit[w]`.

    Reverse mode only: the gradient is that of the XLA implementation. `tiling` None is the one for the device in use.
    """
    if tiling is None:
        tiling = make_tiling(query, key, **load_config("attention", device_kind=device_kind(), regime="mosaic_gpu"))
    forward = functools.partial(_forward, tiling=tiling, interpret=interpret)
    return with_gradient_of(attention_xla, forward)(query, key, value, key_mask, key_limit)
