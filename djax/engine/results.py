"""Results of a generation: NumPy records, trimmed for reading and untrimmed for replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from djax.contracts import struct
from djax.contracts.canvas import Canvas
from djax.engine.tokenizer import Tokenizer
from djax.loop.state import Progress, Result, StopReason

INTERRUPTED = "interrupted"
"""Stop reason of a row that is still at work."""


def tokens_per_forward(lengths: ArrayLike, forwards: ArrayLike) -> Float[np.ndarray, "..."]:
    """TPF: generated tokens up to and including the first EOS, for each forward; 0 where there was nothing to do.

    What fills a row after its EOS is not generated. Of a batch, the rows' tokens over the rows' forwards: pass sums.
    """
    tokens, count = np.asarray(lengths, float), np.asarray(forwards, float)
    return np.divide(tokens, count, out=np.zeros(np.broadcast(tokens, count).shape), where=count > 0)


def tokens_per_second(lengths: ArrayLike, seconds: float) -> float:
    """TPS: the tokens that TPF counts, of all rows, for each second of wall time after warm-up."""
    return float(np.sum(lengths) / seconds) if seconds > 0 else 0.0


def generated_length(
    tokens: Int[np.ndarray, " T"], is_open: Bool[np.ndarray, " T"], is_masked: Bool[np.ndarray, " T"],
    eos_ids: Sequence[int], *, done: bool,
) -> int:
    """Tokens of a row that TPF counts: its completion's, or while it is at work what is decoded up to an EOS."""
    if done:
        return int(is_completion(tokens, is_open, is_masked, eos_ids).sum())
    decoded = is_open & ~is_masked
    ends = np.flatnonzero(decoded & np.isin(tokens, np.asarray(eos_ids)))
    return int(decoded[: ends[0] + 1 if len(ends) else len(decoded)].sum())


class Compared:
    """Equality field by field, arrays by their numbers: dataclasses' own raises for arrays."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return struct.same_trees(vars(self), vars(other))


@dataclasses.dataclass(frozen=True, eq=False)
class Generation(Compared):
    """A batch of completions. Everything is on the host."""

    text: list[str] | None
    """The completions, trimmed at the first EOS; None without a tokenizer."""
    tokens: list[Int[np.ndarray, " length"]]
    """The completions up to and including the first EOS, or up to the first position still masked."""
    canvas: Int[np.ndarray, "B T"]
    """Untrimmed: left padding, prompt, every generated position, right padding."""
    canvas_mask: Bool[np.ndarray, "B T"]
    """False on padding."""
    is_open: Bool[np.ndarray, "B T"]
    """Positions that were to be generated."""
    is_masked: Bool[np.ndarray, "B T"]
    """Positions never decoded (a row that ended with "nan" or "max_steps")."""
    lengths: Int[np.ndarray, " B"]
    """`len` of each of `tokens`."""
    nfe: Int[np.ndarray, " B"]
    """Forwards of the network while the row was active."""
    steps: Int[np.ndarray, " B"]
    """Denoising steps of the row."""
    refreshes: Int[np.ndarray, " B"]
    """Steps that recomputed the whole canvas."""
    stop_reason: list[str]
    """"length", "eos", "nan" or "max_steps" per row, or a reason of the recipe's own stop rule; "interrupted" for one
    that is still at work (see `watch`)."""
    commit_step: Int[np.ndarray, "B T"]
    """The row's step (from 0) that committed each position; -1 for pinned, filled and masked ones."""
    log_prob: Float[np.ndarray, "B T"]
    """log-probability of each committed token under the distribution it was drawn from; 0 elsewhere."""

    @property
    def tokens_per_forward(self) -> Float[np.ndarray, " B"]:
        """TPF of each row, see `tokens_per_forward`."""
        return tokens_per_forward(self.lengths, self.nfe)

    def whole_rows(self, tokenizer: Tokenizer | None) -> Generation:
        """Replace `tokens` and `text` by those of whole rows, prompt and pinned tokens included."""
        rows = [row[valid] for row, valid in zip(self.canvas, self.canvas_mask, strict=True)]
        text = None if tokenizer is None else [tokenizer.decode(row) for row in rows]
        return dataclasses.replace(self, tokens=rows, text=text)


Watch = Callable[[Generation], None]
"""Called with what a generation has reached."""


def draft_texts(
    canvas: Int[np.ndarray, "B T"], wanted: Bool[np.ndarray, "B T"], is_masked: Bool[np.ndarray, "B T"],
    eos_ids: Sequence[int], tokenizer: Tokenizer | None,
) -> list[str]:
    """Each row's wanted positions as text, ids without a tokenizer: up to an EOS or the last that is decoded.

    n masked positions before that are [MASK:n], as `djax infill` reads them.
    """
    texts = []
    for tokens, here, masked in zip(canvas, wanted, is_masked, strict=True):
        row, hidden = tokens[here], masked[here]
        decoded = np.flatnonzero(~hidden)
        ends = np.flatnonzero(~hidden & np.isin(row, np.asarray(eos_ids)))
        stop = int(ends[0]) if len(ends) else int(decoded[-1]) + 1 if len(decoded) else 0
        if len(ends):  # masked positions right before the EOS hold nothing yet
            before = decoded[decoded < stop]
            stop = int(before[-1]) + 1 if len(before) else 0
        texts.append("".join(
            f"[MASK:{end - start}]" if hidden[start]
            else " ".join(map(str, row[start:end])) if tokenizer is None else tokenizer.decode(row[start:end])
            for start, end in runs(hidden[:stop])))
    return texts


def runs(values: Bool[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """[start, stop) of each maximal run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(itertools.pairwise(edges)) if len(values) else []


def is_completion(
    tokens: Int[np.ndarray, "... T"], is_open: Bool[np.ndarray, "... T"], is_masked: Bool[np.ndarray, "... T"],
    eos_ids: Sequence[int],
) -> Bool[np.ndarray, "... T"]:
    """Open positions up to and including the first EOS, or up to the first that is still masked."""
    decoded = is_open & (np.cumsum(is_open & is_masked, axis=-1) == 0)
    ends = decoded & np.isin(tokens, np.asarray(eos_ids))
    return decoded & (np.cumsum(ends, axis=-1) - ends == 0)


def trimmed(
    result: Result, is_open: Bool[np.ndarray, "B T"], *, eos_ids: Sequence[int], limit: int | None,
) -> tuple[Bool[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Which positions of a result on the host are completions, and why each row stopped.

    With a `limit` only so many open positions of each row were asked for; the rest of its last block was opened for the
    model's sake.
    """
    got: Any = result
    found = is_completion(got.tokens, first_open(is_open, limit), got.is_masked, eos_ids)
    if limit is None:
        return found, got.stop_reason
    # an EOS behind what was asked for ended nothing
    whole = (found.sum(axis=1) == limit) & ~(found & np.isin(got.tokens, np.asarray(eos_ids))).any(axis=1)
    return found, np.where(whole & (got.stop_reason == StopReason.EOS), np.int32(StopReason.LENGTH), got.stop_reason)


def to_generation(
    canvas: Canvas, progress: Progress, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, reasons: Sequence[str],
    limit: int | None = None,
) -> Generation:
    """Cut the completions out of what a run has reached (`Run.fetch`).

    `reasons` names the numbers in `stop_reason` (`djax.loop.state.stop_reasons`); `limit` as in `trimmed`.
    """
    got: Any = progress.result
    is_open, valid = jax.device_get((canvas.is_masked, canvas.valid))
    working = (got.is_masked & is_open).any(-1) & ~np.asarray(progress.done)
    found, why = trimmed(got, is_open, eos_ids=eos_ids, limit=limit)
    tokens = [row[here] for row, here in zip(got.tokens, found, strict=True)]
    return Generation(
        text=None if tokenizer is None else [tokenizer.decode(without_eos(row, eos_ids)) for row in tokens],
        tokens=tokens, canvas=got.tokens, canvas_mask=valid, is_open=first_open(is_open, limit),
        is_masked=got.is_masked, lengths=found.sum(axis=1, dtype=np.int32), nfe=got.nfe, steps=got.steps,
        refreshes=got.refreshes,
        stop_reason=[INTERRUPTED if at_work else reasons[reason] for reason, at_work in zip(why, working, strict=True)],
        commit_step=got.commit_step, log_prob=got.log_prob)


def first_open(is_open: Bool[np.ndarray, "B T"], limit: int | None) -> Bool[np.ndarray, "B T"]:
    """The first `limit` open positions of each row; all of them without a limit."""
    return is_open if limit is None else is_open & (np.cumsum(is_open, axis=1) <= limit)


def without_eos(row: Int[np.ndarray, " n"], eos_ids: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Tokens that are text."""
    return row[~np.isin(row, np.asarray(eos_ids))]
