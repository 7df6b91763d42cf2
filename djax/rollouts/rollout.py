"""Rollouts: samples of a model with all that replay and scoring need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from djax import recipes
from djax.contracts import answers
from djax.contracts.ambient import on_device, without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.types import FORBID_NOTHING, Forbidden
from djax.engine.options import Call, Sampling, SamplingKwargs, check_lengths
from djax.engine.prompts import Prompt, check_ids, encode_prompts
from djax.engine.results import trimmed
from djax.engine.running import Run
from djax.errors import check_integer
from djax.loop.state import Parts, Result, StopReason
from djax.rollouts.types import Rollout

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
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    align: bool = False,
    micro_batch: int | None = None,
    row_ids: Sequence[int] | None = None,
    allow_special_tokens: bool = False,
    **options: Unpack[SamplingKwargs],
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
        sampling: how to decode, draw and stop. Its recipe None is `EXACT`; other recipes work, and
            `Rollout.replayable` says whether they can be replayed.
        max_new_tokens: positions to generate per row.
        align: see `DiffusionLM.generate`; always for models whose attention has blocks.
        micro_batch: rows decoded at a time; None is all of them.
        row_ids: identity of each of the P * G rows for the random key; None is 0, 1, 2, ...
        allow_special_tokens: see `DiffusionLM.generate`.
        options: instead of `sampling` its fields (`help(djax.Sampling)`), with a temperature of 1 unless it is given.

    Raises:
        ValueError: names the argument, what came and what is allowed.
        TypeError: an unknown keyword.
    """
    check_integer("num_samples", num_samples, 1)
    call = _resolve(lm, Sampling.of("rollout", sampling, options, temperature=1.0))
    rows = encode_prompts(prompts, tokenizer=lm.tokenizer, vocab_size=lm.config.vocab_size,
                          allow_special_tokens=allow_special_tokens)
    max_new_tokens = check_lengths(
        lm.config, rows, max_new_tokens=max_new_tokens, samples=num_samples, least=1)
    canvas = call.canvas(_repeat(rows, num_samples), max_new_tokens=max_new_tokens, align=align)
    return _sample(lm, canvas, call, key=key, micro_batch=micro_batch, row_ids=row_ids, limit=max_new_tokens)


@without_mesh()
def rollout_infill(
    lm: DiffusionLM,
    tokens: Sequence[Sequence[int]],
    mask: Sequence[Sequence[bool]],
    *,
    key: int | Key[Array, ""],
    num_samples: int = 1,
    sampling: Sampling | None = None,
    micro_batch: int | None = None,
    row_ids: Sequence[int] | None = None,
    **options: Unpack[SamplingKwargs],
) -> Rollout:
    """Sample the masked positions of token sequences, the others pinned: inpainting-guided rollouts.

    IGPO (arXiv 2509.10396) pins parts of a known answer among the positions to generate: then give prompt, pinned and
    open positions as one row and `stop_on_eos=True`. Pinned tokens come back in `tokens`, with `is_open` False.

    Args:
        lm: whose weights sample.
        tokens: rows of token ids, ragged.
        mask: True where a token is to be generated; the shape of `tokens`.
        key, num_samples, sampling, micro_batch, row_ids, options: as in `rollout`; `stop_on_eos` is False unless it is
            given, and then no EOS is generated.

    Raises:
        ValueError: names the argument, what came and what is allowed.
        TypeError: an unknown keyword.
    """
    check_integer("num_samples", num_samples, 1)
    call = _resolve(lm, Sampling.of("rollout_infill", sampling, options, temperature=1.0), gaps=True)
    rows = [check_ids(row, name=f"tokens[{index}]", vocab_size=lm.config.vocab_size)
            for index, row in enumerate(tokens)]
    check_lengths(lm.config, rows, samples=num_samples, name="tokens")
    if [len(row) for row in mask] != [len(row) for row in rows]:
        raise ValueError(f"mask: got rows of {[len(row) for row in mask]} entries; the rows of tokens have "
                         f"{[len(row) for row in rows]}; they must be equal")
    canvas = call.canvas_with_gaps(_repeat(rows, num_samples), _repeat(list(mask), num_samples))
    return _sample(lm, canvas, call, key=key, micro_batch=micro_batch, row_ids=row_ids)


def _resolve(lm: DiffusionLM, sampling: Sampling, *, gaps: bool = False) -> Call:
    """With the recipe of rollouts, and without filters that keep everything."""
    return lm.resolve(dataclasses.replace(
        sampling, recipe=EXACT if sampling.recipe is None else sampling.recipe,
        top_p=None if sampling.top_p == 1 else sampling.top_p,
        min_p=None if sampling.min_p == 0 else sampling.min_p), gaps=gaps)


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
    ids = jnp.arange(canvas.batch, dtype=jnp.int32) if row_ids is None else jnp.asarray(row_ids, jnp.int32)
    return _rollout(canvas, result, parts, lengths=lengths, row_ids=ids, drawn_by=_drawn_by(parts), guided=guided)


def _drawn_by(parts: Parts) -> tuple[Float[Array, ""], Forbidden]:
    """Temperature of the draws, and what they leave out."""
    return (jnp.asarray(answers.sampling_temperature(parts.propose), jnp.float32),
            jax.tree.map(jnp.asarray, answers.forbidden(parts.transform)))


def _rollout(
    canvas: Canvas, result: Result, parts: Parts, *, lengths: Int[Array, " B"], row_ids: Int[Array, " B"],
    drawn_by: tuple[Float[Array, ""], Forbidden], guided: bool,
) -> Rollout:
    """The record of arrays wherever they are; nothing is computed."""
    obstacles = _obstacles(parts, guided=guided)
    temperature, forbidden = drawn_by
    return Rollout(
        tokens=result.tokens, valid=canvas.valid, is_open=canvas.is_masked, is_masked=result.is_masked,
        positions=canvas.positions, lengths=lengths, nfe=result.nfe, steps=result.steps,
        stop_reason=result.stop_reason, commit_step=result.commit_step, log_prob=result.log_prob, row_ids=row_ids,
        mask_id=canvas.mask_id, temperature=temperature, forbidden=forbidden,
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
    lm: DiffusionLM, whole: Canvas, call: Call, *, key: int | Key[Array, ""], micro_batch: int | None,
    row_ids: Sequence[int] | None, limit: int | None = None,
) -> Rollout:
    """Decode a canvas, some rows at a time, and keep the record on the host: one transfer for each cut."""
    canvas: Any = jax.device_get(whole)
    ids: Any = np.arange(canvas.batch) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (canvas.batch,):
        raise ValueError(f"row_ids: got {ids.size} ids; allowed one for each of the {canvas.batch} rows "
                         "(prompts times num_samples)")
    check_integer("micro_batch", micro_batch, 1, optional=True)
    size = canvas.batch if micro_batch is None else min(micro_batch, canvas.batch)
    cuts = []
    for start in range(0, canvas.batch, size):
        rows = np.arange(start, start + size)
        idle = rows >= canvas.batch  # a last cut that is not full has the others' shape, and nothing to do in these
        rows = np.minimum(rows, canvas.batch - 1)
        cut = dataclasses.replace(
            canvas, tokens=canvas.tokens[rows], is_masked=canvas.is_masked[rows] & ~idle[:, None],
            valid=canvas.valid[rows], positions=canvas.positions[rows])
        run = Run(lm.program, lm.params, cut, call.parts, guidance=call.guidance, key=key, row_ids=ids[rows].tolist())
        cuts.append(run.finish().result)
    result: Any = jax.tree.map(lambda *parts: np.concatenate(parts)[:canvas.batch], *cuts)
    completed, why = trimmed(result, canvas.is_masked, eos_ids=call.eos_ids, limit=limit)
    lengths: Any = completed.sum(axis=1, dtype=np.int32)
    return _rollout(
        canvas, dataclasses.replace(result, stop_reason=why), call.parts, lengths=lengths,
        row_ids=ids.astype(np.int32), guided=call.guidance is not None,
        drawn_by=jax.device_get(jax.jit(_drawn_by)(on_device(call.parts))))


def _obstacles(parts: Parts, *, guided: bool) -> list[str]:
    """The reasons why the sampler's log-probs do not follow from the order of its commits."""
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
