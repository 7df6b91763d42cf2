"""The one loop: denoise a canvas block by block inside a jitted `lax.while_loop`.

Everything that varies is a part (see `djax.types`). `denoise` runs to the end; `begin`, `advance` and
`finish` are the same loop in pieces, for streaming.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from djax.cache_policies import NoCache
from djax.canvas import Canvas
from djax.proposals import Greedy
from djax.smoothing import HardTokens
from djax.state import DenoiseState, Parts, Result, StopReason
from djax.stopping import Never
from djax.transforms import Identity
from djax.types import (
    Cache,
    CachePolicy,
    Decision,
    Denoiser,
    Hidden,
    Logits,
    Params,
    Plan,
    Positions,
    Propose,
    Smoothing,
    StepInfo,
    StopRule,
    Strategy,
    Transform,
)

HEAD_CHUNK = 128
"""Positions whose logits are held at once when smoothing reads the head over a longer window."""


def denoise(
    denoiser: Denoiser,
    params: Params,
    canvas: Canvas,
    key: Key[Array, ""],
    *,
    strategy: Strategy,
    cache_policy: CachePolicy = NoCache(),
    transform: Transform = Identity(),
    propose: Propose = Greedy(),
    smoothing: Smoothing = HardTokens(),
    stop_rule: StopRule = Never(),
    row_ids: Int[Array, "B"] | None = None,
) -> Result:
    """Decode every open position of a canvas, blocks from left to right.

    Pure and traceable: call it inside your own `jax.jit`. Row i's result depends on its own canvas row,
    on `row_ids[i]` and on `key`, not on the batch around it.

    Args:
        denoiser: the mask predictor.
        params: its weights.
        canvas: from `Canvas.from_prompts` or `Canvas.from_tokens`.
        key: random key; row i uses `fold_in(key, row_ids[i])`.
        strategy: which candidates to commit at each step.
        cache_policy: what each forward recomputes.
        transform: applied to the block's logits.
        propose: draws one candidate per position.
        smoothing: what masked positions feed the next forward.
        stop_rule: which rows are finished before their last block.
        row_ids: identity of each row for the random key, default 0..B-1; give it to cut one batch into
            several without changing a sample.
    """
    parts = Parts(strategy=strategy, cache_policy=cache_policy, transform=transform, propose=propose,
                  smoothing=smoothing, stop_rule=stop_rule)
    state = begin(denoiser, params, canvas, key, parts=parts, row_ids=row_ids)
    state = advance(denoiser, params, canvas, state, parts=parts)
    return finish(canvas, state, parts=parts)


def begin(
    denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], *, parts: Parts,
    row_ids: Int[Array, "B"] | None = None,
) -> DenoiseState:
    """The state before the first step."""
    batch, length = canvas.tokens.shape
    soft = parts.smoothing.soft
    window = parts.cache_policy.window_length(length, canvas.first_block, canvas.block_length)
    rows = jnp.arange(batch) if row_ids is None else jnp.asarray(row_ids)
    zeros = jnp.zeros(batch, jnp.int32)
    return DenoiseState(
        tokens=canvas.tokens, is_masked=canvas.is_masked,
        inputs=denoiser.embed(params, canvas.tokens) if soft else None,
        cache=None if window is None else denoiser.init_cache(params, batch, length),
        transform=parts.transform.init(batch, canvas.block_length),
        strategy=parts.strategy.init(batch, canvas.block_length),
        row_keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(rows),
        block=jnp.int32(-1), blocks_entered=jnp.int32(0), step_in_block=jnp.int32(0), iterations=jnp.int32(0),
        step=zeros, nfe=zeros, refreshes=zeros,
        commit_step=jnp.full((batch, length), -1, jnp.int32), log_prob=jnp.zeros((batch, length), jnp.float32),
        done=jnp.zeros(batch, bool), stop_reason=jnp.full(batch, StopReason.LENGTH, jnp.int32))


def unfinished(canvas: Canvas, state: DenoiseState) -> Bool[Array, ""]:
    """Whether any row still has something to decode."""
    return _work(canvas, state).any()


def advance(
    denoiser: Denoiser, params: Params, canvas: Canvas, state: DenoiseState, *, parts: Parts,
    steps: int | Int[Array, ""] | None = None, before_block: int | Int[Array, ""] | None = None,
) -> DenoiseState:
    """Denoising steps to the end, or at most `steps` of them, or while work is left before `before_block`.

    Both limits are leaves.
    """
    bound = canvas.num_blocks * parts.strategy.max_steps(canvas.block_length)
    last = jnp.int32(bound)
    if steps is not None:
        last = jnp.minimum(last - state.iterations, steps) + state.iterations
    blocks = jnp.arange(canvas.num_blocks) < (canvas.num_blocks if before_block is None else before_block)

    def more(state: DenoiseState) -> Bool[Array, ""]:
        return (state.iterations < last) & (_work(canvas, state) & blocks).any()

    def refresh_is_next(state: DenoiseState) -> Bool[Array, ""]:
        _, info, _ = _enter_block(canvas, parts, state)
        return parts.cache_policy.plan(info, canvas.length, canvas.block_length).refresh

    # outside the loop: XLA would compute its sines and cosines anew in every step and, on CPU, in every head
    positions = denoiser.place(params, canvas.positions)
    step = partial(denoising_step, denoiser, params, canvas, positions, parts)
    window = parts.cache_policy.window_length(canvas.length, canvas.first_block, canvas.block_length)
    if window is None or window == canvas.length:
        return lax.while_loop(more, partial(step, canvas.length), state)

    def phase(state: DenoiseState) -> DenoiseState:
        # Two inner loops and not a conditional: XLA would copy the whole cache around that at every step.
        state = lax.while_loop(lambda now: more(now) & refresh_is_next(now), partial(step, canvas.length), state)
        return lax.while_loop(lambda now: more(now) & ~refresh_is_next(now), partial(step, window), state)

    return lax.while_loop(more, phase, state)


def finish(canvas: Canvas, state: DenoiseState, *, parts: Parts) -> Result:
    """The result of a finished (or abandoned) state."""
    columns = jnp.arange(canvas.length)
    generated = canvas.is_masked & ~state.is_masked
    start = jnp.argmax(canvas.is_masked, axis=-1)
    stop = canvas.length - jnp.argmax(canvas.valid[:, ::-1], axis=-1)
    ends = parts.stop_rule.ends(state.tokens) & generated
    first_end = jnp.min(jnp.where(ends, columns + 1, canvas.length), axis=-1)
    lengths = jnp.where(canvas.is_masked.any(-1), jnp.minimum(first_end, stop) - start, 0)
    return Result(
        tokens=state.tokens, is_masked=state.is_masked, valid=canvas.valid, commit_step=state.commit_step,
        log_prob=state.log_prob, lengths=lengths.astype(jnp.int32), nfe=state.nfe, steps=state.step,
        refreshes=state.refreshes, stop_reason=state.stop_reason)


def denoising_step(
    denoiser: Denoiser, params: Params, canvas: Canvas, positions: Positions, parts: Parts, width: int,
    state: DenoiseState,
) -> DenoiseState:
    """One forward and one decision, for every row that has something to do in the current block.

    `width` is T or the cache policy's window: how many positions the forward computes. It has to be T where
    the policy's plan asks for a refresh.
    """
    state, info, active = _enter_block(canvas, parts, state)
    plan = parts.cache_policy.plan(info, canvas.length, canvas.block_length)
    logits, cache, expected, recomputed = _forward(
        denoiser, params, canvas, positions, state, info, plan, active, width=width, soft=parts.smoothing.soft)
    state = dataclasses.replace(
        state, cache=cache, step=state.step + active, nfe=state.nfe + active * denoiser.forwards,
        refreshes=state.refreshes + (active & plan.refresh), step_in_block=state.step_in_block + 1,
        iterations=state.iterations + 1)
    nan = active & jnp.isnan(logits).any((1, 2))
    state = dataclasses.replace(
        state, done=state.done | nan, stop_reason=jnp.where(nan, StopReason.NAN, state.stop_reason))
    state = _decide(canvas, parts, state, info, logits, active & ~nan)
    state = _stop(canvas, parts, state, info, active & ~nan)
    if state.inputs is not None and expected is not None:
        mixed = parts.smoothing.step(denoiser.embed(params, state.tokens), expected, state.is_masked, info)
        renew = (recomputed & active[:, None])[..., None]
        state = dataclasses.replace(state, inputs=jnp.where(renew, mixed, state.inputs))
    return state


def _work(canvas: Canvas, state: DenoiseState) -> Bool[Array, "B N"]:
    """Which blocks have something left to decode, in rows that are not done."""
    return canvas.open_per_block(state.is_masked & ~state.done[:, None]) > 0


def _enter_block(
    canvas: Canvas, parts: Parts, state: DenoiseState
) -> tuple[DenoiseState, StepInfo, Bool[Array, "B"]]:
    """Find the first block with work left; on a new one reset the parts' states. Also: the rows at work."""
    length = canvas.block_length
    work = _work(canvas, state)
    block = jnp.argmax(work.any(0)).astype(jnp.int32)
    entered = block != state.block
    fresh = parts.transform.init(canvas.batch, length), parts.strategy.init(canvas.batch, length)
    transform, strategy = jax.tree.map(
        lambda new, old: jnp.where(entered, new, old), fresh, (state.transform, state.strategy))
    state = dataclasses.replace(
        state, transform=transform, strategy=strategy, block=block, blocks_entered=state.blocks_entered + entered,
        step_in_block=jnp.where(entered, 0, state.step_in_block))
    start = canvas.first_block + block * length
    info = StepInfo(
        step=state.step, step_in_block=state.step_in_block, block=state.blocks_entered - 1, block_start=start,
        is_open=_columns(canvas.is_masked, start, length))
    return state, info, work[:, block]


def _forward(
    denoiser: Denoiser, params: Params, canvas: Canvas, positions: Positions, state: DenoiseState, info: StepInfo,
    plan: Plan, active: Bool[Array, "B"], *, width: int, soft: bool,
) -> tuple[Logits, Cache | None, Float[Array, "B T D"] | None, Bool[Array, "B T"]]:
    """The block's logits, the cache, the expected embeddings (if smoothing asks), and what was recomputed."""
    start = jnp.clip(plan.start, 0, canvas.length - width)
    column = jnp.arange(canvas.length)
    recomputed = canvas.valid & (plan.refresh | ((column >= plan.start) & (column < plan.end)))
    inputs = (denoiser.embed(params, _columns(state.tokens, start, width)) if state.inputs is None
              else _columns(state.inputs, start, width))
    hidden, cache = denoiser.apply(
        params, inputs, positions=jax.tree.map(lambda array: _columns(array, start, width), positions),
        key_mask=canvas.valid, window_start=start, write=_columns(recomputed, start, width) & active[:, None],
        cache=state.cache)
    logits, expected = _read_head(
        denoiser, params, hidden, offset=info.block_start - start, block_length=canvas.block_length, soft=soft)
    if expected is not None:
        blank = jnp.zeros((canvas.batch, canvas.length, expected.shape[-1]), expected.dtype)
        expected = lax.dynamic_update_slice(blank, expected, (0, start, 0))
    return logits, cache, expected, recomputed


def _read_head(
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
    starts = jnp.minimum(jnp.arange(0, width, HEAD_CHUNK), width - HEAD_CHUNK)

    def add(expected: Float[Array, "B W D"], start: Int[Array, ""]) -> tuple[Float[Array, "B W D"], None]:
        chunk = jax.tree.map(lambda array: _columns(array, start, HEAD_CHUNK), hidden)
        values = denoiser.expected_embedding(params, denoiser.unembed(params, chunk))
        return lax.dynamic_update_slice(expected, values.astype(expected.dtype), (0, start, 0)), None

    shape = jax.eval_shape(lambda: denoiser.expected_embedding(params, denoiser.unembed(params, hidden)))
    expected, _ = lax.scan(add, jnp.zeros(shape.shape, shape.dtype), starts)
    return denoiser.unembed(params, jax.tree.map(block, hidden)), expected


def _decide(
    canvas: Canvas, parts: Parts, state: DenoiseState, info: StepInfo, logits: Logits, working: Bool[Array, "B"]
) -> DenoiseState:
    """Transform, propose, decide, and write the block."""
    block = partial(_columns, start=info.block_start, width=canvas.block_length)
    tokens, is_masked = block(state.tokens), block(state.is_masked)
    keys = jax.vmap(lambda key, step: jax.random.split(jax.random.fold_in(key, step), 2))(state.row_keys, info.step)
    logits, transform = parts.transform.step(logits, is_masked, state.transform)
    candidates = parts.propose.step(keys[:, 0], logits, tokens)
    decision, strategy = parts.strategy.step(keys[:, 1], candidates, is_masked, info, state.strategy)
    decision = _allowed(decision, info, working)
    commit, reopen = decision.commit, decision.reopen

    def put(array: Array, committed: Array, reopened: Array | int | float) -> Array:
        value = jnp.where(commit, committed, jnp.where(reopen, reopened, block(array)))
        return lax.dynamic_update_slice(array, value.astype(array.dtype), (0, info.block_start))

    return dataclasses.replace(
        state, transform=transform, strategy=strategy,
        tokens=put(state.tokens, candidates.token, canvas.mask_id),
        is_masked=put(state.is_masked, jnp.zeros_like(commit), True),
        commit_step=put(state.commit_step, jnp.broadcast_to(info.step[:, None], commit.shape), -1),
        log_prob=put(state.log_prob, candidates.log_prob, 0.0))


def _allowed(decision: Decision, info: StepInfo, working: Bool[Array, "B"]) -> Decision:
    """A decision without pinned positions and frozen rows; committing wins over reopening."""
    may = info.is_open & working[:, None]
    commit = decision.commit & may
    return Decision(commit=commit, reopen=decision.reopen & may & ~commit)


def _stop(
    canvas: Canvas, parts: Parts, state: DenoiseState, info: StepInfo, working: Bool[Array, "B"]
) -> DenoiseState:
    """End rows whose finished block asks for it, and rows whose block ran out of steps."""
    masked = _columns(state.is_masked, info.block_start, canvas.block_length).any(-1)
    ended = working & ~masked & parts.stop_rule.step(state.tokens, canvas.is_masked, state.is_masked, info)
    stuck = working & masked & (state.step_in_block >= parts.strategy.max_steps(canvas.block_length))
    reason = jnp.where(stuck, StopReason.MAX_STEPS, jnp.where(ended, StopReason.EOS, state.stop_reason))
    tokens, is_masked, fill = state.tokens, state.is_masked, parts.stop_rule.fill()
    if fill is not None:
        rest = ended[:, None] & is_masked
        tokens, is_masked = jnp.where(rest, fill, tokens), is_masked & ~rest
    return dataclasses.replace(
        state, tokens=tokens, is_masked=is_masked, done=state.done | ended | stuck, stop_reason=reason)


def _columns(array: Array, start: Int[Array, ""], width: int) -> Array:
    """Columns [start, start + width) of an array with leading axes [B, T]."""
    return lax.dynamic_slice_in_dim(array, start, width, axis=1)
