"""The readout in one Hopper kernel: logits do not leave the SM (Pallas Mosaic GPU).

Reading the head is the cost: 644 MB of bfloat16 for LLaDA-MoE, 150 us at 4.3 TB/s. One block an SM goes through its
share of the vocabulary, 256 ids at a time, and keeps running values; only these leave it ([blocks, 2, N] each), and
one XLA fusion joins them. A warpgroup fetches: 64 columns of 256 rows of the head and of all the block's rows of
`hidden` a stage, three stages, without a pause between tiles: 80 KB an SM on their way beside the stage in use, three
times what latency times bandwidth asks for. Two warpgroups compute, 128 ids each: rows of `hidden` are wgmma's M, ids
its N, so that sums over ids stay within four lanes. A finished tile goes through shared memory, 16 ids at a time, in
loops: written out in registers it spilled, and took a minute to compile. Meanwhile the next tile's first stages
arrive.

`hidden` is read again for each tile, from L2: a quarter (64 rows) or half (128 rows) of the head's bytes. Up to 128
rows share a block, so the head is read from memory once. Of more rows, the blocks of all row tiles go through the
vocabulary side by side and find the head in L2.

Noise costs about 150 operations a logit: at 64 rows 20 us beside the 32 us in which an SM reads its tile, mostly in
the open. It is paid for only where the temperature is positive. All these figures are reasoned, none is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.interpret import gpu_interpreter
from kernels_pallas.unembed.noise import gumbel_noise_of
from kernels_pallas.unembed.reference import readable
from kernels_pallas.unembed.running import LARGEST_ID, Drawn, Greedy, finish, finite, join, logits_at, rescale
from kernels_pallas.unembed.support import MOSAIC_COLUMNS as COLUMNS
from kernels_pallas.unembed.support import MOSAIC_ROWS as ROWS
from kernels_pallas.unembed.support import MOSAIC_TILE_ROWS as TILE_ROWS
from kernels_pallas.unembed.support import MOSAIC_WARPGROUPS as WARPGROUPS
from kernels_pallas.unembed.support import mosaic_config
from kernels_pallas.unembed.types import Call, Readout

BY_ELEMENT = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Tiling(NamedTuple):
    """The layout of a call over blocks."""

    rows: int
    """Rows of `hidden` in a block, 64 or 128."""
    row_tiles: int
    ids: int
    """Ids of a tile, for one warpgroup."""
    tiles: int
    groups: int
    """Blocks that share the vocabulary, for each row tile."""
    stages: int
    slice: int
    """Ids that are reduced at a time: what bounds the registers."""


def make_tiling(rows: int, vocabulary: int, *, ids: int, stages: int, blocks: int, slice: int) -> Tiling:
    """Layout for N rows: about `blocks` blocks."""
    tile_rows = ROWS if rows <= ROWS else 2 * ROWS
    row_tiles, tiles = pl.cdiv(rows, tile_rows), pl.cdiv(vocabulary, WARPGROUPS * ids)
    groups = min(max(blocks // row_tiles, 1), tiles)
    return Tiling(
        rows=tile_rows, row_tiles=row_tiles, ids=ids, tiles=tiles, groups=groups, stages=stages, slice=slice)


class Scalars(NamedTuple):
    """Values that all rows share, in registers."""

    limit: Array
    """First id that is not allowed any more, or that the head has not."""
    first_id: Array
    forbidden: tuple[Array, ...]
    temperature: Array | None


def _columns(values: Array, shape: tuple[int, ...]) -> Array:
    """A value a row, for every column of `shape`."""
    return lax.broadcast_in_dim(values, shape, (0,))


def _load(ref: Any, layout: Any) -> Array:
    """A reference's values in a layout. Older jax, which the kernel does not support, wants an index besides."""
    load: Any = plgpu.load
    return load(ref, layout=layout, optimized=False)


def _full(shape: tuple[int, ...], value: float | int, dtype: Any, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


class Slice(NamedTuple):
    """Some ids of a tile for 64 rows."""

    logits: Float[Array, "R C"]
    ids: Int[Array, "R C"]
    allowed: Array

    def clean(self) -> Array:
        """`running.Tile.clean` on this tile's layout."""
        return jnp.where(self.allowed & (self.logits > -jnp.inf), self.logits, -jnp.inf)

    def kept(self) -> Array:
        """`running.Tile.kept` on this tile's layout."""
        return jnp.where(self.allowed | (self.logits != self.logits), self.logits, -jnp.inf)


def _slice(tile_ref: Any, index: Array, first: Array, fresh: Array, scalars: Scalars) -> Slice:
    """Ids from `first` + `index` slices on; those below `fresh` were in an earlier tile."""
    shape = tile_ref.shape[1:]
    logits = _load(tile_ref.at[index], BY_ELEMENT)
    ids = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=BY_ELEMENT) + (first + index * shape[1])
    allowed = (ids >= fresh) & (ids < scalars.limit)
    for forbidden in scalars.forbidden:
        allowed = allowed & (ids != forbidden)
    return Slice(logits, ids, allowed)


def _add_greedy(
    state: Greedy, slice_at: Callable[[Array], Slice], shape: tuple[int, ...], *, second: bool, entropy: bool
) -> Greedy:
    """`running.add_greedy` on vectors of 64 rows: over a thread's own ids, then over the threads of a row."""
    count, columns = shape[0], shape[1:]
    none, zeros = (_full(columns, value, jnp.float32, BY_ELEMENT) for value in (-jnp.inf, 0.0))

    def compare(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        logit, best, *runner_up = carry
        part = slice_at(index)
        clean = part.clean()
        better = part.allowed & ((clean > logit) | (best == LARGEST_ID))
        loser = [jnp.maximum(other, jnp.minimum(logit, clean)) for other in runner_up]
        return jnp.where(better, clean, logit), jnp.where(better, part.ids, best), *loser

    start = (none, _full(columns, LARGEST_ID, jnp.int32, BY_ELEMENT), *([none] if second else []))
    logit, best, *runner_up = lax.fori_loop(0, count, compare, start)
    tile_logit = jnp.max(logit, axis=1)
    tile_best = jnp.min(jnp.where(logit == _columns(tile_logit, columns), best, LARGEST_ID), axis=1)
    best_logit = jnp.maximum(state.best_logit, tile_logit)
    shift = _columns(finite(best_logit), columns)

    def add(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        kept = slice_at(index).kept() - shift
        weights = jnp.exp(kept)
        terms = [total + jnp.where(kept == -jnp.inf, 0.0, weights * kept) for total in carry[1:]]
        return carry[0] + weights, *terms

    sums = [jnp.sum(total, axis=1) for total in lax.fori_loop(0, count, add, (zeros, *([zeros] if entropy else [])))]
    exponent = rescale(state.best_logit, best_logit)
    factor = jnp.exp(exponent)
    second_logit, entropy_sum = state.second_logit, state.entropy_sum
    for other in runner_up:
        others = jnp.maximum(other, jnp.where(best == _columns(tile_best, columns), -jnp.inf, logit))
        loser = jnp.minimum(state.best_logit, tile_logit)
        second_logit = jnp.maximum(jnp.maximum(second_logit, jnp.max(others, axis=1)), loser)
    for terms in sums[1:]:
        entropy_sum = factor * (entropy_sum + exponent * state.total) + terms
    wins = (tile_logit > state.best_logit) | ((tile_logit == state.best_logit) & (tile_best < state.best))
    return Greedy(
        best=jnp.where(wins, tile_best, state.best), best_logit=best_logit, total=factor * state.total + sums[0],
        second_logit=second_logit, entropy_sum=entropy_sum)


def _add_drawn(
    state: Drawn, slice_at: Callable[[Array], Slice], shape: tuple[int, ...], best_logits: tuple[Array, Array],
    words: list[Array], temperature: Array,
) -> Drawn:
    """`running.add_drawn` on vectors of 64 rows."""
    count, columns = shape[0], shape[1:]
    none, zeros = (_full(columns, value, jnp.float32, BY_ELEMENT) for value in (-jnp.inf, 0.0))
    shift = _columns(finite(best_logits[1]), columns)
    first, second = (_columns(word, columns) for word in words)

    def add(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        score, logit, drawn, total = carry
        part = slice_at(index)
        clean = part.clean()
        noisy = clean + temperature * gumbel_noise_of(first, second, part.ids)
        better = part.allowed & ((noisy > score) | (drawn == LARGEST_ID))
        return (
            jnp.where(better, noisy, score), jnp.where(better, clean, logit), jnp.where(better, part.ids, drawn),
            total + jnp.exp((part.kept() - shift) / temperature))

    start = none, none, _full(columns, LARGEST_ID, jnp.int32, BY_ELEMENT), zeros
    score, logit, drawn, total = lax.fori_loop(0, count, add, start)
    tile_score = jnp.max(score, axis=1)
    tile_drawn = jnp.min(jnp.where(score == _columns(tile_score, columns), drawn, LARGEST_ID), axis=1)
    tile_logit = jnp.max(jnp.where(drawn == _columns(tile_drawn, columns), logit, -jnp.inf), axis=1)
    wins = (tile_score > state.drawn_score) | ((tile_score == state.drawn_score) & (tile_drawn < state.drawn))
    factor = jnp.exp(rescale(*best_logits) / temperature)
    return Drawn(
        drawn=jnp.where(wins, tile_drawn, state.drawn), drawn_logit=jnp.where(wins, tile_logit, state.drawn_logit),
        drawn_score=jnp.maximum(state.drawn_score, tile_score),
        tempered_total=factor * state.tempered_total + jnp.sum(total, axis=1))


def _start() -> tuple[Greedy, Drawn]:
    none, zero = (_full((ROWS,), value, jnp.float32, BY_ROW) for value in (-jnp.inf, 0.0))
    no_id = _full((ROWS,), LARGEST_ID, jnp.int32, BY_ROW)
    return Greedy(no_id, none, zero, none, zero), Drawn(no_id, none, none, zero)


def _fetch(hidden_ref: Any, head_ref: Any, tiles: Any, *, tiling: Tiling, steps: Array) -> None:
    """The fetching warpgroup: every stage of every tile of the block, in one go."""
    plgpu.set_max_registers(40, action="decrease")
    hidden_tile, head_tile, full, empty = tiles
    group, row_tile = lax.axis_index("group"), lax.axis_index("row_tile")
    stages_a_tile = hidden_ref.shape[1] // COLUMNS

    def wait_for_room(step: Array) -> Array:
        slot = lax.rem(step, jnp.int32(tiling.stages))
        pl.when(step >= tiling.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        return slot

    def fetch(step: Array, carry: None) -> None:
        slot = wait_for_room(step)
        index = lax.div(step, jnp.int32(stages_a_tile))
        columns = pl.ds((step - index * stages_a_tile) * COLUMNS, COLUMNS)
        first = _first_place(group + index * tiling.groups, head_ref.shape[0], tiling)
        plgpu.copy_gmem_to_smem(
            hidden_ref.at[pl.ds(row_tile * tiling.rows, tiling.rows), columns], hidden_tile.at[slot], full.at[slot])
        for part in range(WARPGROUPS):
            plgpu.copy_gmem_to_smem(
                head_ref.at[pl.ds(first + part * tiling.ids, tiling.ids), columns], head_tile.at[slot, part],
                full.at[slot])

    total = steps * stages_a_tile
    lax.fori_loop(0, total, fetch, None)

    @pl.loop(total, total + tiling.stages)
    def _observe_the_last_arrivals(step: Array) -> None:
        wait_for_room(step)


def _first_place(tile: Array, vocabulary: int, tiling: Tiling) -> Array:
    """First row of the head in a tile: the last tile reaches back, so that it is as long as all others."""
    return jnp.minimum(tile * (WARPGROUPS * tiling.ids), vocabulary - WARPGROUPS * tiling.ids)


def _tile_logits(
    hidden_tile: Any, head_tile: Any, full: Any, empty: Any, *, tiling: Tiling, step: Array, count: int
) -> Array:
    """Logits of one tile, [rows, ids] of this warpgroup, from the stages `step` to `step` + `count`."""
    part = lax.axis_index("warpgroup")

    def accumulate(acc: Any) -> Array:
        def multiply(index: Array, carry: None) -> None:
            slot = lax.rem(step + index, jnp.int32(tiling.stages))
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc, hidden_tile.at[slot], head_tile.at[slot, part].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # the product before this one is complete, and its stage free
            before = lax.rem(step + index + (tiling.stages - 1), jnp.int32(tiling.stages))
            pl.when(index > 0)(lambda: plgpu.barrier_arrive(empty.at[before]))

        lax.fori_loop(0, count, multiply, None)
        return acc[...]

    logits = pl.run_scoped(accumulate, plgpu.ACC((tiling.rows, tiling.ids), jnp.float32))
    plgpu.barrier_arrive(empty.at[lax.rem(step + (count - 1), jnp.int32(tiling.stages))])
    return logits


def _words_of(given: dict[str, Any], row: Array) -> list[Array]:
    """The key's two words of the 64 rows from `row` on; none without a temperature."""
    rows = pl.ds(row, ROWS)
    return [_load(given["words"].at[word, rows], BY_ROW) for word in range(2)] if "words" in given else []


def _kernel(
    given: dict[str, Any], greedy_out: Any, drawn_out: Any, ids_staged: Any, values_staged: Any,
    logits_staged: Any, *tiles: Any, tiling: Tiling, second: bool, entropy: bool,
) -> None:
    """One block: a row tile over every `tiling.groups`-th tile of the vocabulary."""
    hidden_ref, head_ref = given["hidden"], given["head"]
    draw, num_forbidden = "temperature" in given, given["forbidden"].shape[0] if "forbidden" in given else 0
    group, row_tile, part = (lax.axis_index(name) for name in ("group", "row_tile", "warpgroup"))
    steps = pl.cdiv(tiling.tiles - group, tiling.groups)
    vocabulary, stages_a_tile = head_ref.shape[0], hidden_ref.shape[1] // COLUMNS
    pl.when(part == WARPGROUPS)(functools.partial(_fetch, hidden_ref, head_ref, tiles, tiling=tiling, steps=steps))

    @pl.when(part < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        ids, values = (staged.at[part] for staged in (ids_staged, values_staged))
        # in the order of the fields of Greedy and Drawn, each of which starts with its id
        staged_fields: list[Any] = [
            ids.at[0], *(values.at[field] for field in range(4)),
            ids.at[1], *(values.at[field] for field in range(4, 7))]
        first_id = given["first_id"][0]
        scalars = Scalars(
            limit=jnp.minimum(given["vocab_limit"][0], first_id + vocabulary), first_id=first_id,
            forbidden=tuple(given["forbidden"][index] for index in range(num_forbidden)),
            temperature=given["temperature"][0] if draw else None)
        halves, mine = range(tiling.rows // ROWS), logits_staged.at[part]
        words = [_words_of(given, row_tile * tiling.rows + half * ROWS) for half in halves]

        def add_tile(index: Array, state: list[tuple[Greedy, Drawn]]) -> list[tuple[Greedy, Drawn]]:
            tile = group + index * tiling.groups
            logits = _tile_logits(
                *tiles, tiling=tiling, step=index * stages_a_tile, count=stages_a_tile)
            first = _first_place(tile, vocabulary, tiling) + part * tiling.ids + scalars.first_id
            fresh = tile * (WARPGROUPS * tiling.ids) + scalars.first_id
            after = []
            for half in halves:
                greedy, drawn = state[half]
                for number in range(mine.shape[0]):
                    start = half * ROWS, number * tiling.slice
                    mine[number] = lax.slice(logits, start, (start[0] + ROWS, start[1] + tiling.slice))
                plgpu.commit_smem()
                slice_at = functools.partial(_slice, mine, first=first, fresh=fresh, scalars=scalars)
                new = _add_greedy(greedy, slice_at, mine.shape, second=second, entropy=entropy)
                if scalars.temperature is not None:
                    drawn = lax.cond(
                        scalars.temperature > 0,
                        functools.partial(
                            _add_drawn, slice_at=slice_at, shape=mine.shape, words=words[half],
                            best_logits=(greedy.best_logit, new.best_logit), temperature=scalars.temperature),
                        lambda drawn: drawn, drawn)
                after.append((new, drawn))
            return after

        state = lax.fori_loop(0, steps, add_tile, [_start() for _ in halves])
        for half in halves:
            rows = pl.ds(half * ROWS, ROWS)
            for staged, values in zip(staged_fields, (*state[half][0], *state[half][1]), strict=True):
                staged[rows] = values
        plgpu.commit_smem()
        for staged, out in zip(staged_fields, (*greedy_out, *drawn_out), strict=True):
            plgpu.copy_smem_to_gmem(staged, out.at[group, part, pl.ds(row_tile * tiling.rows, tiling.rows)])
        plgpu.wait_smem_to_gmem(0)


def unembed_mosaic_gpu(call: Call, *, tiling: Tiling | None = None, interpret: bool = False) -> Readout:
    """See `kernels_pallas.unembed.unembed`. `tiling` is the configured one if None."""
    rows = call.hidden.shape[0]
    if tiling is None:
        tiling = make_tiling(rows, call.head.shape[0], **mosaic_config(rows))
    padded = tiling.row_tiles * tiling.rows
    # a copy cuts whole swizzled tiles, so that rows above their height come in multiples of it
    missing = -rows % TILE_ROWS if rows > TILE_ROWS else 0
    given = {"hidden": jnp.pad(call.hidden, ((0, missing), (0, 0))), "head": call.head}
    given |= {"vocab_limit": call.vocab_limit[None], "first_id": call.first_id[None]}
    if call.forbidden.shape[0]:
        given["forbidden"] = call.forbidden
    if call.temperature is not None and call.noise_keys is not None:
        given["temperature"] = call.temperature[None]
        given["words"] = jnp.pad(call.noise_keys.T, ((0, 0), (0, padded - rows)))
    ids, values = (
        jax.ShapeDtypeStruct((tiling.groups, WARPGROUPS, padded), dtype) for dtype in (jnp.int32, jnp.float32))
    out_type: Any = (Greedy, (ids, *(values,) * 4)), (Drawn, (ids, *(values,) * 3))
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, second=call.second, entropy=call.entropy),
        out_type=tuple(state(*fields) for state, fields in out_type),
        grid=(tiling.groups, tiling.row_tiles), grid_names=("group", "row_tile"),
        num_threads=WARPGROUPS + 1, thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((WARPGROUPS, 2, tiling.rows), jnp.int32),
            plgpu.SMEM((WARPGROUPS, 7, tiling.rows), jnp.float32),
            plgpu.SMEM((WARPGROUPS, tiling.ids // tiling.slice, ROWS, tiling.slice), jnp.float32),
            plgpu.SMEM((tiling.stages, tiling.rows, COLUMNS), call.hidden.dtype),
            plgpu.SMEM((tiling.stages, WARPGROUPS, tiling.ids, COLUMNS), call.head.dtype),
            plgpu.Barrier(num_arrivals=1 + WARPGROUPS, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiling.stages)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=gpu_interpreter(interpret))
    greedy, drawn = jax.tree.map(lambda field: field.reshape(-1, padded)[:, :rows], kernel(given))
    states = join(greedy, None if call.temperature is None else drawn, call.temperature)
    return finish(call, *states, at=logits_at(call, readable(call)))
