"""One denoising step: a forward, what its head says about the block, and a decision."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import answers
from djax.contracts.canvas import Canvas
from djax.contracts.types import (
    Cache,
    Candidates,
    Decision,
    Denoiser,
    HeadQuery,
    Hidden,
    Logits,
    Noise,
    Params,
    PartState,
    Positions,
    Reading,
    ReadingDenoiser,
    ReadingPropose,
    ReadingTransform,
    StepInfo,
    Window,
)
from djax.loop.state import DenoiseState, Parts, StopReason, stop_reasons

HEAD_CHUNK = 128
"""Positions whose logits are held at once when smoothing needs the logits of a longer window."""


class HeadOutput(NamedTuple):
    """A forward's answer about the block."""

    candidates: Candidates
    transform: PartState
    """The transform's next state."""
    is_nan: Bool[Array, " B"]
    """Rows with a NaN among their logits."""
    expected: Float[Array, "B W D"] | None
    """Expected embeddings of the window's positions, if smoothing asks for them."""


def denoising_step(
    denoiser: Denoiser, params: Params, canvas: Canvas, positions: Positions, parts: Parts, width: int,
    state: DenoiseState,
) -> DenoiseState:
    """One forward and one decision, for every row that has something to do in the current block.

    `width` is T or the cache policy's window: how many positions the forward computes. It has to be T where
    the policy asks for a refresh.
    """
    state, info, active = enter_block(canvas, parts, state)
    window = parts.cache_policy.window(info, canvas.length, canvas.block_length)
    start = jnp.clip(window.start, 0, canvas.length - width)
    hidden, cache, recomputed = _forward(
        denoiser, params, canvas, positions, state, window, active, start=start, width=width)
    keys = jax.vmap(lambda key, step: jax.random.split(jax.random.fold_in(key, step), 2))(state.row_keys, info.row_step)
    output = _ask_head(denoiser, params, parts, hidden, state, info, keys[:, 0], offset=info.block_start - start,
                       block_length=canvas.block_length)
    counted = active.astype(jnp.int32)
    state = dataclasses.replace(
        state, cache=cache, step=state.step + counted, nfe=state.nfe + counted * denoiser.forwards,
        refreshes=state.refreshes + (active & window.refresh).astype(jnp.int32), step_in_block=state.step_in_block + 1,
        iterations=state.iterations + 1, transform=output.transform)
    nan = active & output.is_nan
    state = dataclasses.replace(
        state, done=state.done | nan, stop_reason=jnp.where(nan, StopReason.NAN, state.stop_reason))
    state = _decide(canvas, parts, state, info, output.candidates, keys[:, 1], active & ~nan)
    state = _stop(canvas, parts, state, info, active & ~nan)
    if state.inputs is not None and output.expected is not None:
        # what is recomputed lies in the window
        tokens, is_masked, old, renew = (
            _columns(array, start, width)
            for array in (state.tokens, state.is_masked, state.inputs, recomputed & active[:, None]))
        mixed = parts.smoothing.step(denoiser.embed(params, tokens), output.expected, is_masked, info)
        new = jnp.where(renew[..., None], mixed, old).astype(old.dtype)
        state = dataclasses.replace(state, inputs=lax.dynamic_update_slice_in_dim(state.inputs, new, start, axis=1))
    return state


def work_left(canvas: Canvas, state: DenoiseState) -> Bool[Array, "B N"]:
    """Blocks that have something left to decode, in rows that are not done."""
    return canvas.open_per_block(state.is_masked & ~state.done[:, None]) > 0


def enter_block(
    canvas: Canvas, parts: Parts, state: DenoiseState
) -> tuple[DenoiseState, StepInfo, Bool[Array, " B"]]:
    """Find the first block with work left; on a new one reset the parts' states.

    Returns the state, where it stands, and which rows are active.
    """
    length = canvas.block_length
    work = work_left(canvas, state)
    block = lax.argmax(canvas.any_row(work), 0, jnp.int32)
    entered = block != state.block
    fresh = parts.transform.init(canvas.batch, length), parts.strategy.init(canvas.batch, length)
    transform, strategy = jax.tree.map(
        lambda new, old: jnp.where(entered, new, old), fresh, (state.transform, state.strategy))
    state = dataclasses.replace(
        state, transform=transform, strategy=strategy, block=block,
        blocks_entered=state.blocks_entered + entered.astype(jnp.int32),
        step_in_block=jnp.where(entered, 0, state.step_in_block))
    start = canvas.first_block + block * length
    info = StepInfo(
        row_step=state.step, step_in_block=state.step_in_block, block=state.blocks_entered - 1, block_start=start,
        is_open=_columns(canvas.is_masked, start, length))
    return state, info, work[:, block]


def _forward(
    denoiser: Denoiser, params: Params, canvas: Canvas, positions: Positions, state: DenoiseState, window: Window,
    active: Bool[Array, " B"], *, start: Int[Array, ""], width: int,
) -> tuple[Hidden, Cache | None, Bool[Array, "B T"]]:
    """The window's hidden states, the cache, and which positions were recomputed."""
    column = jnp.arange(canvas.length, dtype=jnp.int32)[None]
    recomputed = canvas.valid & (window.refresh | ((column >= window.start) & (column < window.end)))
    inputs = (denoiser.embed(params, _columns(state.tokens, start, width)) if state.inputs is None
              else _columns(state.inputs, start, width))
    hidden, cache = denoiser.apply(
        params, inputs, positions=jax.tree.map(lambda array: _columns(array, start, width), positions),
        key_mask=canvas.valid, window_start=start, write=_columns(recomputed, start, width) & active[:, None],
        cache=state.cache)
    return hidden, cache, recomputed


def _ask_head(
    denoiser: Denoiser, params: Params, parts: Parts, hidden: Hidden, state: DenoiseState, info: StepInfo,
    keys: Key[Array, " B"], *, offset: Int[Array, ""], block_length: int,
) -> HeadOutput:
    """Candidates from a reading of the head, or from all logits of the block where a part or the denoiser needs them.

    The block is at `offset` in the window.
    """
    tokens, is_masked = (_columns(array, info.block_start, block_length) for array in (state.tokens, state.is_masked))
    if any(map(answers.needs_logits, (denoiser, parts.transform, parts.propose))):
        logits, expected = _logits(
            denoiser, params, hidden, offset=offset, block_length=block_length, soft=parts.smoothing.soft)
        is_nan = jnp.isnan(logits).any((1, 2))
        logits, after = parts.transform.step(logits, is_masked, state.transform)
        return HeadOutput(parts.propose.step(keys, logits, tokens), after, is_nan, expected)
    transform, propose = cast(ReadingTransform, parts.transform), cast(ReadingPropose, parts.propose)
    asked = answers.wanted_ids(transform, state.transform)
    ids = tokens[..., None] if asked is None else jnp.concatenate([tokens[..., None], asked], axis=-1)
    query = HeadQuery(ids=ids, forbidden=answers.forbidden(transform), noise=propose.noise(keys, block_length))
    reading, expected = _read(
        cast(ReadingDenoiser, denoiser), params, hidden, query, offset=offset, block_length=block_length,
        soft=parts.smoothing.soft)
    is_nan = jnp.isnan(reading.log_total).any(-1)
    reading, after = transform.step_reading(reading, is_masked, state.transform)
    return HeadOutput(propose.read(reading, tokens), after, is_nan, expected)


def _read(
    denoiser: ReadingDenoiser, params: Params, hidden: Hidden, query: HeadQuery, *, offset: Int[Array, ""],
    block_length: int, soft: bool,
) -> tuple[Reading, Float[Array, "B W D"] | None]:
    """The block's reading; with `soft` also the window's expected embeddings, in the same pass over the vocabulary."""
    if not soft:
        block = jax.tree.map(lambda array: _columns(array, offset, block_length), hidden)
        return denoiser.read(params, block, query, expected=False)
    width = jax.tree.leaves(hidden)[0].shape[1]

    def widen(array: Array, fill: int) -> Array:
        blank = jnp.full((array.shape[0], width, *array.shape[2:]), fill, array.dtype)
        return lax.dynamic_update_slice_in_dim(blank, array, offset, axis=1)

    noise = query.noise
    wide = HeadQuery(
        ids=widen(query.ids, -1), forbidden=query.forbidden,
        noise=None if noise is None else Noise(temperature=noise.temperature, keys=widen(noise.keys, 0)))
    reading, expected = denoiser.read(params, hidden, wide, expected=True)
    narrow = {field.name: _columns(getattr(reading, field.name), offset, block_length)
              for field in dataclasses.fields(reading) if field.name != "temperature"}
    return Reading(**narrow, temperature=reading.temperature), expected


def _logits(
    denoiser: Denoiser, params: Params, hidden: Hidden, *, offset: Int[Array, ""], block_length: int, soft: bool
) -> tuple[Logits, Float[Array, "B W D"] | None]:
    """The block's logits; with `soft` also every window position's expected embedding."""
    block = partial(_columns, start=offset, width=block_length)
    if not soft:
        return denoiser.unembed(params, jax.tree.map(block, hidden)), None
    width = jax.tree.leaves(hidden)[0].shape[1]
    if width <= HEAD_CHUNK:
        logits = denoiser.unembed(params, hidden)
        return block(logits), denoiser.expected_embedding(params, logits)
    # The window's logits are never held whole: chunk by chunk, the last one overlapping its neighbour.
    starts = jnp.minimum(jnp.arange(0, width, HEAD_CHUNK, dtype=jnp.int32), width - HEAD_CHUNK)

    def add(expected: Float[Array, "B W D"], start: Int[Array, ""]) -> tuple[Float[Array, "B W D"], None]:
        chunk = jax.tree.map(lambda array: _columns(array, start, HEAD_CHUNK), hidden)
        values = denoiser.expected_embedding(params, denoiser.unembed(params, chunk))
        return lax.dynamic_update_slice_in_dim(expected, values.astype(expected.dtype), start, axis=1), None

    shape = jax.eval_shape(lambda: denoiser.expected_embedding(params, denoiser.unembed(params, hidden)))
    expected, _ = lax.scan(add, jnp.zeros(shape.shape, shape.dtype), starts)
    return denoiser.unembed(params, jax.tree.map(block, hidden)), expected


def _decide(
    canvas: Canvas, parts: Parts, state: DenoiseState, info: StepInfo, candidates: Candidates, keys: Key[Array, " B"],
    working: Bool[Array, " B"],
) -> DenoiseState:
    """Ask the strategy, and write the block."""
    block = partial(_columns, start=info.block_start, width=canvas.block_length)
    decision, strategy = parts.strategy.step(keys, candidates, block(state.is_masked), info, state.strategy)
    decision = _allowed(decision, info, working)
    commit, reopen = decision.commit, decision.reopen

    def put(array: Array, committed: Array, reopened: Array | int | float) -> Array:
        value = jnp.where(commit, committed, jnp.where(reopen, reopened, block(array)))
        return lax.dynamic_update_slice_in_dim(array, value.astype(array.dtype), info.block_start, axis=1)

    return dataclasses.replace(
        state, strategy=strategy,
        tokens=put(state.tokens, candidates.token, canvas.mask_id),
        is_masked=put(state.is_masked, jnp.zeros_like(commit), True),
        commit_step=put(state.commit_step, jnp.broadcast_to(info.row_step[:, None], commit.shape), -1),
        log_prob=put(state.log_prob, candidates.log_prob, 0.0))


def _allowed(decision: Decision, info: StepInfo, working: Bool[Array, " B"]) -> Decision:
    """A decision without pinned positions and frozen rows; committing wins over reopening."""
    may = info.is_open & working[:, None]
    commit = decision.commit & may
    return Decision(commit=commit, reopen=decision.reopen & may & ~commit)


def _stop(
    canvas: Canvas, parts: Parts, state: DenoiseState, info: StepInfo, working: Bool[Array, " B"]
) -> DenoiseState:
    """End rows whose finished block asks for it, and rows whose block ran out of steps."""
    masked = _columns(state.is_masked, info.block_start, canvas.block_length).any(-1)
    names, rule = stop_reasons(parts.stop_rule), parts.stop_rule
    why = jnp.asarray(rule.step(state.tokens, canvas.is_masked, state.is_masked, info), jnp.int32)
    ended = working & ~masked & (why > 0)
    # a rule counts its own reasons from 1
    reasons = jnp.asarray([StopReason.LENGTH, *map(names.index, rule.reasons)], jnp.int32)[why]
    stuck = working & masked & (state.step_in_block >= parts.strategy.max_steps(canvas.block_length))
    reason = jnp.where(stuck, StopReason.MAX_STEPS, jnp.where(ended, reasons, state.stop_reason))
    tokens, is_masked, fill = state.tokens, state.is_masked, rule.fill()
    if fill is not None:
        each = jnp.concatenate([jnp.full(1, -1, jnp.int32), jnp.broadcast_to(fill, len(rule.reasons))])[why][:, None]
        rest = ended[:, None] & is_masked & (each >= 0)
        tokens, is_masked = jnp.where(rest, each, tokens), is_masked & ~rest
    return dataclasses.replace(
        state, tokens=tokens, is_masked=is_masked, done=state.done | ended | stuck, stop_reason=reason)


def _columns(array: Array, start: Int[Array, ""], width: int) -> Array:
    """Columns [start, start + width) of an array with leading axes [B, T]."""
    return lax.dynamic_slice_in_dim(array, start, width, axis=1)
