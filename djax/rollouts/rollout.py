"""Rollouts: samples of a model with all that replay and scoring need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

from djax import recipes
from djax.contracts import answers
from djax.contracts.ambient import on_device, without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.types import FORBID_NOTHING, Forbidden
from djax.engine.options import CallOptions, check_block_length, check_lengths, make_parts, resolve_ids
from djax.engine.prompts import Prompt, check_ids, encode_prompts
from djax.engine.results import Generation
from djax.errors import check_integer
from djax.loop.state import Parts, Result, StopReason, stop_reasons
from djax.recipes import Recipe
from djax.rollouts.types import PER_ROW, Rollout

if TYPE_CHECKING:
    from djax.api import DiffusionLM

EXACT = recipes.fast_dllm(threshold=0.9, cache="none")
"""The recipe of rollouts if nobody says: parallel decoding that a scorer can replay."""


@without_mesh()
def rollout(
    lm: DiffusionLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    key: int | Key[Array, ""],
    num_samples: int = 1,
    recipe: Recipe | None = None,
    max_new_tokens: int = 256,
    block_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    guidance: float | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop_on_eos: bool = True,
    align: bool = False,
    micro_batch: int | None = None,
    row_ids: Sequence[int] | None = None,
    allow_special_tokens: bool = False,
) -> Rollout:
    """Sample `num_samples` completions of every prompt; row `p * num_samples + g` is sample g of prompt p.

    The result does not depend on `micro_batch`: every row has its own key, and all rows have the canvas that the whole
    batch needs. Filters are honoured, but their rollouts are not replayable: what a filter keeps depends on all logits
    of the vocabulary, which the scorer never holds.

    Args:
        lm: whose weights sample.
        prompts: texts, conversations or token ids, as in `DiffusionLM.generate`.
        key: seed or `jax.random` key; give every training step another one.
        num_samples: G, samples per prompt.
        recipe: which decoder; None is `EXACT`, threshold decoding at 0.9 without a cache. Other recipes work, and
            `Rollout.replayable` says whether they can be replayed.
        max_new_tokens: positions to generate per row.
        block_length: positions decoded together; None is the length of the model's own blocks, or 64.
        temperature: of the draws; 0 is greedy, and then all samples of a prompt are the same.
        top_k, top_p, min_p: filters, see `DiffusionLM.generate`; top_p=1 and min_p=0 are none.
        guidance: see `DiffusionLM.generate`.
        mask_id: overrides the model's mask id.
        eos_id: overrides the model's EOS ids.
        stop_on_eos: end a row with the block that holds its first EOS.
        align: see `DiffusionLM.generate`; always for models whose attention has blocks.
        micro_batch: rows decoded at a time; None is all of them.
        row_ids: identity of each of the P * G rows for the random key; None is 0, 1, 2, ...
        allow_special_tokens: see `DiffusionLM.generate`.

    Raises:
        ValueError: names the argument, what came and what is allowed.
    """
    check_integer("num_samples", num_samples, 1)
    block_length = check_block_length(lm.config, block_length)
    options = CallOptions(
        recipe=EXACT if recipe is None else recipe, block_length=block_length, temperature=temperature, top_k=top_k,
        top_p=None if top_p == 1 else top_p, min_p=None if min_p == 0 else min_p, guidance=guidance, mask_id=mask_id,
        eos_id=eos_id, stop_on_eos=stop_on_eos)
    recipes.check_blocks(options.recipe, lm.config, block_length=block_length)
    mask_token, eos_ids = resolve_ids(options, lm.config)
    rows = encode_prompts(prompts, tokenizer=lm.tokenizer, vocab_size=lm.config.vocab_size,
                          allow_special_tokens=allow_special_tokens)
    max_new_tokens = check_lengths(
        lm.config, rows, max_new_tokens=max_new_tokens, samples=num_samples, least=1)
    canvas = Canvas.from_prompts(
        _repeat(rows, num_samples), max_new_tokens=max_new_tokens, block_length=block_length, mask_id=mask_token,
        pad_id=lm.config.pad_id, align=align or lm.config.block_length is not None,
        whole_blocks=lm.config.block_length is not None)
    parts = make_parts(options, mask_id=mask_token, eos_ids=eos_ids, vocab_limit=lm.vocab_limit)
    return _sample(lm, canvas, parts, options, eos_ids=eos_ids, key=key, micro_batch=micro_batch, row_ids=row_ids,
                   limit=max_new_tokens)


@without_mesh()
def rollout_infill(
    lm: DiffusionLM,
    tokens: Sequence[Sequence[int]],
    mask: Sequence[Sequence[bool]],
    *,
    key: int | Key[Array, ""],
    num_samples: int = 1,
    recipe: Recipe | None = None,
    block_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    guidance: float | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop_on_eos: bool = False,
    micro_batch: int | None = None,
    row_ids: Sequence[int] | None = None,
) -> Rollout:
    """Sample the masked positions of token sequences, the others pinned: inpainting-guided rollouts.

    IGPO (arXiv 2509.10396) pins parts of a known answer among the positions to generate: then give prompt, pinned and
    open positions as one row and `stop_on_eos=True`. Pinned tokens come back in `tokens`, with `is_open` False.

    Args:
        lm: whose weights sample.
        tokens: rows of token ids, ragged.
        mask: True where a token is to be generated; the shape of `tokens`.
        stop_on_eos: allow EOS, and end a row with the block that holds a generated one. False never generates it.
        key, num_samples, recipe, block_length, temperature, top_k, top_p, min_p, guidance, mask_id, eos_id,
            micro_batch, row_ids: as in `rollout`.

    Raises:
        ValueError: names the argument, what came and what is allowed.
    """
    check_integer("num_samples", num_samples, 1)
    block_length = check_block_length(lm.config, block_length)
    options = CallOptions(
        recipe=EXACT if recipe is None else recipe, block_length=block_length, temperature=temperature, top_k=top_k,
        top_p=None if top_p == 1 else top_p, min_p=None if min_p == 0 else min_p, guidance=guidance, mask_id=mask_id,
        eos_id=eos_id, stop_on_eos=stop_on_eos)
    recipes.check_blocks(options.recipe, lm.config, block_length=block_length, gaps=True)
    mask_token, eos_ids = resolve_ids(options, lm.config)
    rows = [check_ids(row, name=f"tokens[{index}]", vocab_size=lm.config.vocab_size)
            for index, row in enumerate(tokens)]
    check_lengths(lm.config, rows, samples=num_samples, name="tokens")
    if [len(row) for row in mask] != [len(row) for row in rows]:
        raise ValueError(f"mask: got rows of {[len(row) for row in mask]} entries; the rows of tokens have "
                         f"{[len(row) for row in rows]}; they must be equal")
    canvas = Canvas.from_tokens(
        _repeat(rows, num_samples), _repeat(list(mask), num_samples), block_length=block_length, mask_id=mask_token,
        pad_id=lm.config.pad_id, align=lm.config.block_length is not None)
    parts = make_parts(options, mask_id=mask_token, eos_ids=eos_ids, vocab_limit=lm.vocab_limit,
                       forbidden=() if stop_on_eos else eos_ids)
    return _sample(lm, canvas, parts, options, eos_ids=eos_ids if stop_on_eos else (), key=key,
                   micro_batch=micro_batch, row_ids=row_ids)


def record(
    canvas: Canvas, result: Result, *, parts: Parts, guided: bool = False, row_ids: Int[Array, " B"] | None = None,
) -> Rollout:
    """The rollout of a `djax.denoise` of your own: its canvas, its result, and the parts that it ran with.

    Pure and traceable.

    Args:
        canvas: what `denoise` started from.
        result: what it gave.
        parts: one choice per axis, as given to `denoise`.
        guided: whether the denoiser was wrapped in guidance.
        row_ids: as given to `denoise`; None is 0, 1, 2, ...
    """
    columns = jnp.arange(canvas.length, dtype=jnp.int32)[None]
    start = lax.argmax(canvas.is_masked, 1, jnp.int32)
    first_masked = jnp.min(jnp.where(result.is_masked, columns, canvas.length), axis=1)
    end = jnp.minimum(start + result.lengths, first_masked)
    lengths = (canvas.is_masked & (columns < end[:, None])).sum(axis=1, dtype=jnp.int32)
    obstacles = _obstacles(parts, guided=guided)
    return Rollout(
        tokens=result.tokens, valid=canvas.valid, is_open=canvas.is_masked, is_masked=result.is_masked,
        positions=canvas.positions, lengths=lengths, nfe=result.nfe, steps=result.steps,
        stop_reason=result.stop_reason, commit_step=result.commit_step, log_prob=result.log_prob,
        row_ids=jnp.arange(canvas.batch, dtype=jnp.int32) if row_ids is None else jnp.asarray(row_ids, jnp.int32),
        mask_id=canvas.mask_id, temperature=jnp.asarray(answers.sampling_temperature(parts.propose), jnp.float32),
        forbidden=jax.tree.map(jnp.asarray, answers.forbidden(parts.transform)),
        first_block=canvas.first_block, block_length=canvas.block_length,
        max_steps=canvas.num_blocks * parts.strategy.max_steps(canvas.block_length), replayable=not obstacles,
        not_replayable_because="; ".join(obstacles) or None)


def as_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    mask_id: int,
    pad_id: int,
    forbidden: Forbidden = FORBID_NOTHING,
) -> Rollout:
    """Given tokens as a rollout, to be scored at `masked_states`; nothing is open behind a completion.

    Args:
        prompts: token ids per row, ragged.
        completions: token ids per row, ragged; one may be empty.
        mask_id: what a masked position feeds the model.
        pad_id: token on padding; never attended.
        forbidden: tokens outside of the distribution.

    Raises:
        ValueError: different numbers of prompts and completions, or none.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"completions: got {len(completions)} for {len(prompts)} prompts; give one for each")
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    is_open = [np.arange(len(row)) >= len(prompt) for row, prompt in zip(whole, prompts, strict=True)]
    canvas = Canvas.from_tokens(whole, is_open, block_length=1, mask_id=mask_id, pad_id=pad_id)  # type: ignore[arg-type]
    tokens = np.array(jax.device_get(canvas.tokens))
    tokens[jax.device_get(canvas.is_masked)] = [token for completion in completions for token in completion]
    none = np.zeros(canvas.batch, np.int32)
    fields: dict[str, Any] = {
        "tokens": tokens, "valid": canvas.valid, "is_open": canvas.is_masked, "is_masked": np.zeros(tokens.shape, bool),
        "positions": canvas.positions, "lengths": np.asarray([len(row) for row in completions], np.int32), "nfe": none,
        "steps": none, "stop_reason": none + np.int32(StopReason.LENGTH),
        "commit_step": np.full(tokens.shape, -1, np.int32), "log_prob": np.zeros(tokens.shape, np.float32),
        "row_ids": np.arange(canvas.batch, dtype=np.int32), "mask_id": canvas.mask_id, "temperature": np.float32(1.0),
        "forbidden": forbidden}
    return Rollout(
        **jax.device_get(fields), first_block=canvas.first_block, block_length=canvas.block_length,
        max_steps=canvas.length - canvas.first_block, replayable=False,
        not_replayable_because="its tokens were given, not sampled")


def _sample(
    lm: DiffusionLM, canvas: Canvas, parts: Parts, options: CallOptions, *, eos_ids: Sequence[int],
    key: int | Key[Array, ""], micro_batch: int | None, row_ids: Sequence[int] | None, limit: int | None = None,
) -> Rollout:
    """Decode a canvas, some rows at a time, and keep the record on the host."""
    ids = np.arange(canvas.batch) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (canvas.batch,):
        raise ValueError(f"row_ids: got {ids.size} ids; allowed one for each of the {canvas.batch} rows "
                         "(prompts times num_samples)")
    if micro_batch is not None:
        check_integer("micro_batch", micro_batch, 1)
    size = canvas.batch if micro_batch is None else min(micro_batch, canvas.batch)
    rollouts = []
    for start in range(0, canvas.batch, size):
        rows = np.arange(start, start + size)
        idle = rows >= canvas.batch  # a last cut that is not full has the others' shape, and nothing to do in these
        rows = np.minimum(rows, canvas.batch - 1)
        cut = _take(canvas, rows, idle)
        generation = lm.decode(
            cut, parts, guidance=options.guidance, eos_ids=eos_ids, key=key, row_ids=ids[rows].tolist(),
            limit=limit)
        got = _of_generation(cut, generation, parts, ids[rows], guided=options.guidance is not None)
        rollouts.append(got.take(slice(0, size - int(idle.sum()))))
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in rollouts]) for name in PER_ROW}
    return dataclasses.replace(rollouts[0], **joined)


def _of_generation(
    canvas: Canvas, generation: Generation, parts: Parts, row_ids: np.ndarray, *, guided: bool
) -> Rollout:
    got: dict[str, Any] = {
        field.name: getattr(generation, field.name) for field in dataclasses.fields(Generation)
        if field.name not in ("text", "tokens", "stop_reason")}
    reasons = [stop_reasons(parts.stop_rule).index(reason) for reason in generation.stop_reason]
    result = Result(
        tokens=got["canvas"], is_masked=got["is_masked"], valid=got["canvas_mask"], commit_step=got["commit_step"],
        log_prob=got["log_prob"], lengths=got["lengths"], nfe=got["nfe"], steps=got["steps"],
        refreshes=got["refreshes"], stop_reason=np.asarray(reasons, np.int32))  # type: ignore[arg-type]
    # a `Generation` counts generated tokens, as is wanted here; `record` expects a `Result`'s count of positions
    found = _record(*on_device((canvas, result, parts, row_ids.astype(np.int32))), guided=guided)
    return jax.device_get(dataclasses.replace(found, lengths=got["lengths"]))


@partial(jax.jit, static_argnames="guided")
def _record(canvas: Canvas, result: Result, parts: Parts, row_ids: Int[Array, " B"], *, guided: bool) -> Rollout:
    return record(canvas, result, parts=parts, guided=guided, row_ids=row_ids)


def _take(canvas: Canvas, rows: np.ndarray, idle: np.ndarray) -> Canvas:
    tokens, is_masked, valid, positions = (
        jax.device_get(array)[rows] for array in (canvas.tokens, canvas.is_masked, canvas.valid, canvas.positions))
    arrays: dict[str, Any] = jax.device_put({
        "tokens": tokens, "is_masked": is_masked & ~idle[:, None], "valid": valid, "positions": positions})
    return dataclasses.replace(canvas, **arrays)


def _obstacles(parts: Parts, *, guided: bool) -> list[str]:
    """Why the sampler's log-probs do not follow from the order of its commits."""
    found = []
    if not parts.cache_policy.exact:
        found.append(f"cache policy {_name(parts.cache_policy)} approximates: it looks at stale keys and values")
    if parts.strategy.reopens:
        found.append(f"strategy {_name(parts.strategy)} reopens: commit_step holds only a position's last commit")
    if parts.smoothing.soft:
        found.append(f"smoothing {_name(parts.smoothing)} is soft: inputs depend on earlier logits")
    changes = "changes the distribution that tokens are drawn from"
    found += [f"transform {_name(part)} {changes}" for part in answers.distribution_changes(parts.transform)]
    found += [f"{'proposal' if part is parts.propose else 'filter'} {_name(part)} {changes}"
              for part in answers.distribution_changes(parts.propose)]
    if guided:
        found.append("guidance mixes the logits of two forwards")
    return found


def _name(part: Any) -> str:
    return type(part).__name__


def _repeat(rows: Sequence[Any], times: int) -> list[Any]:
    return [row for row in rows for _ in range(times)]
