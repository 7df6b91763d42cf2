"""The one loop: denoise a canvas block by block inside a jitted `lax.while_loop`.

Everything that varies is a part (see `djax.contracts.types`). `denoise` runs to the end; `begin`, `advance` and
`finish` are the same loop in pieces, for streaming.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from djax.contracts.ambient import is_traced, on_device, without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.keys import as_key
from djax.contracts.types import CachePolicy, Denoiser, Params, Propose, Smoothing, StopRule, Strategy, Transform
from djax.loop.state import DenoiseState, Parts, Result, StopReason
from djax.loop.step import denoising_step, enter_block, work_left
from djax.parts.cache_policies import NoCache
from djax.parts.proposals import Greedy
from djax.parts.smoothing import HardTokens
from djax.parts.stopping import Never
from djax.parts.transforms import Identity


@without_mesh()
def denoise(
    denoiser: Denoiser,
    params: Params,
    canvas: Canvas,
    key: int | Key[Array, ""],
    *,
    strategy: Strategy,
    cache_policy: CachePolicy = NoCache(),
    transform: Transform = Identity(),
    propose: Propose = Greedy(),
    smoothing: Smoothing = HardTokens(),
    stop_rule: StopRule = Never(),
    row_ids: Int[Array, " B"] | None = None,
) -> Result:
    """Decode every open position of a canvas, blocks from left to right.

    Pure and traceable: call it inside your own `jax.jit`. Outside of any it is one jitted program, compiled once for
    each structure of parts and shape of canvas. Row i's result depends on its own canvas row,
    on `row_ids[i]` and on `key`, not on the batch around it. It may run inside `jax.shard_map`, with a model made for
    that (`djax.models.build(parallel=)`) and rows over the canvas' `row_axes`; `djax.engine.program` does that.

    Args:
        denoiser: the mask predictor.
        params: its weights.
        canvas: from `Canvas.from_prompts` or `Canvas.from_tokens`.
        key: seed or random key, as a threefry key (`djax.contracts.keys.as_key`); row i uses
            `fold_in(key, row_ids[i])`.
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
    arguments = (denoiser, params, canvas, as_key(key), parts, row_ids)
    if is_traced(arguments):  # the caller's program
        return _denoise(*arguments)
    return _program(*on_device(arguments))


def _denoise(
    denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], parts: Parts,
    row_ids: Int[Array, " B"] | None,
) -> Result:
    state = begin(denoiser, params, canvas, key, parts=parts, row_ids=row_ids)
    state = advance(denoiser, params, canvas, state, parts=parts)
    return finish(canvas, state, parts=parts)


_program = jax.jit(_denoise)


def begin(
    denoiser: Denoiser, params: Params, canvas: Canvas, key: int | Key[Array, ""], *, parts: Parts,
    row_ids: Int[Array, " B"] | None = None,
) -> DenoiseState:
    """The state before the first step."""
    batch, length = canvas.tokens.shape
    soft = parts.smoothing.soft
    window = parts.cache_policy.window_length(length, canvas.first_block, canvas.block_length)
    rows = jnp.arange(batch, dtype=jnp.int32) if row_ids is None else jnp.asarray(row_ids, jnp.int32)
    zeros, key = jnp.zeros(batch, jnp.int32), as_key(key)
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
        done=jnp.zeros(batch, bool), stop_reason=jnp.full(batch, np.int32(StopReason.LENGTH), jnp.int32))


def unfinished(canvas: Canvas, state: DenoiseState) -> Bool[Array, ""]:
    """Whether any row still has something to decode."""
    return canvas.any_row(work_left(canvas, state)).any()


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
    end = canvas.num_blocks if before_block is None else before_block
    blocks = jnp.arange(canvas.num_blocks, dtype=jnp.int32) < end

    def more(state: DenoiseState) -> Bool[Array, ""]:
        return (state.iterations < last) & (canvas.any_row(work_left(canvas, state)) & blocks).any()

    def refresh_is_next(state: DenoiseState) -> Bool[Array, ""]:
        _, info, _ = enter_block(canvas, parts, state)
        return parts.cache_policy.window(info, canvas.length, canvas.block_length).refresh

    # outside the loop: XLA would compute its sines and cosines anew in every step and, on CPU, in every head
    positions = denoiser.prepare_positions(params, canvas.positions)
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
    columns = jnp.arange(canvas.length, dtype=jnp.int32)
    generated = canvas.is_masked & ~state.is_masked
    start = lax.argmax(canvas.is_masked, 1, jnp.int32)
    stop = canvas.length - lax.argmax(canvas.valid[:, ::-1], 1, jnp.int32)
    ends = parts.stop_rule.ends(state.tokens) & generated
    first_end = jnp.min(jnp.where(ends, columns + 1, canvas.length), axis=-1)
    lengths = jnp.where(canvas.is_masked.any(-1), jnp.minimum(first_end, stop) - start, 0)
    return Result(
        tokens=state.tokens, is_masked=state.is_masked, valid=canvas.valid, commit_step=state.commit_step,
        log_prob=state.log_prob, lengths=lengths.astype(jnp.int32), nfe=state.nfe, steps=state.step,
        refreshes=state.refreshes, stop_reason=state.stop_reason)
