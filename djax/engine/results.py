"""What a generation returns: numpy records, trimmed for reading and untrimmed for replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from djax.contracts import struct
from djax.contracts.canvas import Canvas
from djax.engine.tokenizer import TextStream, Tokenizer
from djax.loop.state import Progress

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
    """How many tokens of a row TPF counts: its completion's, or while it is at work what is decoded up to an EOS."""
    if done:
        return len(completion(tokens, is_open, is_masked, eos_ids))
    decoded = is_open & ~is_masked
    ends = np.flatnonzero(decoded & np.isin(tokens, np.asarray(eos_ids)))
    return int(decoded[: ends[0] + 1 if len(ends) else len(decoded)].sum())


class _Compared:
    """Equality field by field, arrays by their numbers: dataclasses' own raises for arrays."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return struct.same_trees(vars(self), vars(other))


@dataclasses.dataclass(frozen=True, eq=False)
class Generation(_Compared):
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
    """How many steps recomputed the whole canvas."""
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
        """The same with `tokens` and `text` of whole rows, prompt and pinned tokens included."""
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
        edges = [0, *(np.flatnonzero(np.diff(hidden[:stop])) + 1).tolist(), stop] if stop else []
        texts.append("".join(
            f"[MASK:{end - start}]" if hidden[start]
            else " ".join(map(str, row[start:end])) if tokenizer is None else tokenizer.decode(row[start:end])
            for start, end in itertools.pairwise(edges)))
    return texts


@dataclasses.dataclass(frozen=True, eq=False)
class StreamStep(_Compared):
    """What a stream yields: where the canvas stands, and what became final since the last step."""

    tokens: Int[np.ndarray, "B T"]
    is_masked: Bool[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    """False on padding."""
    is_open: Bool[np.ndarray, "B T"]
    """Positions that were to be generated."""
    generated: slice
    """Canvas columns from the first open position on."""
    committed: list[Int[np.ndarray, " n"]]
    """Tokens of each row that became final: those of blocks finished since the last step, up to the EOS."""
    text: list[str] | None
    """Text of `committed`, never half a character; None without a tokenizer."""
    draft: list[Int[np.ndarray, " n"]]
    """Each row's open region as it stands after its final tokens, the mask id where it is masked."""
    block: int
    """Block that the last step worked on."""
    nfe: Int[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]
    eos_ids: tuple[int, ...] = ()
    """What ends a row's text."""
    draft_text: list[str] | None = None
    """Text of `draft` without its masked positions; None without a tokenizer."""

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Generated tokens of each row so far, up to and including the first EOS: what fills a row is not counted."""
        at_work = (self.is_masked & self.is_open).any(-1) & ~self.done
        return np.asarray([
            generated_length(tokens, is_open, is_masked, self.eos_ids, done=not working)
            for tokens, is_open, is_masked, working in zip(
                self.tokens, self.is_open, self.is_masked, at_work, strict=True)], np.int32)

    def reached(self, tokenizer: Tokenizer | None) -> list[str]:
        """The rows so far, drafts included, as `draft_texts`."""
        return draft_texts(self.tokens, self.is_open, self.is_masked, self.eos_ids, tokenizer)


class Streamer(Protocol):
    """A Hugging Face streamer. `put_draft(tokens)` is called too where it exists."""

    def put(self, value: Any) -> None:
        """Take token ids: the prompt first, then what became final."""
        ...

    def end(self) -> None:
        """The stream is over."""
        ...


def completion(
    tokens: Int[np.ndarray, " T"], is_open: Bool[np.ndarray, " T"], is_masked: Bool[np.ndarray, " T"],
    eos_ids: Sequence[int],
) -> Int[np.ndarray, " length"]:
    """Open positions' tokens up to and including the first EOS, or up to the first position still masked."""
    row, masked = tokens[is_open], is_masked[is_open]
    stop = int(masked.argmax()) if masked.any() else len(row)
    ends = np.isin(row[:stop], np.asarray(eos_ids))
    return row[: int(ends.argmax()) + 1] if ends.any() else row[:stop]


def to_generation(
    canvas: Canvas, progress: Progress, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, reasons: Sequence[str],
    limit: int | None = None,
) -> Generation:
    """Fetch a state of the loop to the host and cut the completions out of it.

    `reasons` names the numbers in `progress.stop_reason` (`djax.loop.state.stop_reasons`). With a `limit` only so many
    open positions of each row were asked for; the rest of its last block was opened for the model's sake.
    """
    got, is_open, valid = jax.device_get((progress, canvas.is_masked, canvas.valid))
    asked = first_open(is_open, limit)
    # on a mesh there may be rows behind the canvas' own
    got = jax.tree.map(lambda array: array[:canvas.batch] if array.ndim else array, got)
    working = (got.is_masked & is_open).any(-1) & ~got.done
    tokens = [completion(*row, eos_ids) for row in zip(got.tokens, asked, got.is_masked, strict=True)]
    why = [reasons[reason] for reason in got.stop_reason]
    if limit is not None:  # an EOS behind what was asked for ended nothing
        why = ["length" if reason == "eos" and len(row) == limit and not np.isin(row, np.asarray(eos_ids)).any()
               else reason for reason, row in zip(why, tokens, strict=True)]
    return Generation(
        text=None if tokenizer is None else [tokenizer.decode(_without_eos(row, eos_ids)) for row in tokens],
        tokens=tokens, canvas=got.tokens, canvas_mask=valid, is_open=asked, is_masked=got.is_masked,
        lengths=np.asarray([len(row) for row in tokens], np.int32), nfe=got.nfe, steps=got.step,
        refreshes=got.refreshes,
        stop_reason=[INTERRUPTED if at_work else reason for reason, at_work in zip(why, working, strict=True)],
        commit_step=got.commit_step, log_prob=got.log_prob)


def first_open(is_open: Bool[np.ndarray, "B T"], limit: int | None) -> Bool[np.ndarray, "B T"]:
    """The first `limit` open positions of each row; all of them without a limit."""
    return is_open if limit is None else is_open & (np.cumsum(is_open, axis=1) <= limit)


class StreamReader:
    """Turns the loop's states into `StreamStep`s: remembers what each row has already handed out."""

    def __init__(
        self, canvas: Canvas, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, limit: int | None = None
    ) -> None:
        """`limit` as in `to_generation`."""
        self._canvas, self._eos_ids, self._tokenizer = canvas, eos_ids, tokenizer
        is_open, self._valid = jax.device_get((canvas.is_masked, canvas.valid))
        self._is_open = first_open(is_open, limit)
        self._given = [0] * canvas.batch
        self._text: list[TextStream] | None = (
            None if tokenizer is None else [tokenizer.stream() for _ in range(canvas.batch)])

    def read(self, progress: Progress, *, last: bool) -> StreamStep:
        """The step for a state of the loop; `last` flushes what the detokenizer held back."""
        got = jax.device_get(progress)
        tokens, is_masked, done, nfe = (array[:self._canvas.batch] for array in got[:4])
        final = [self._final(row, tokens, is_masked, bool(done[row]) or last) for row in range(self._canvas.batch)]
        committed = [row[given:] for row, given in zip(final, self._given, strict=True)]
        self._given = [len(row) for row in final]
        text = None
        if self._text is not None:
            text = [stream.push(_without_eos(row, self._eos_ids)) + (stream.finish() if last else "")
                    for stream, row in zip(self._text, committed, strict=True)]
        first = int(self._is_open.any(0).argmax())
        ahead = [self._is_open[row] & (np.cumsum(self._is_open[row]) > self._given[row])
                 for row in range(self._canvas.batch)]
        drafts = None if self._tokenizer is None else [
            self._tokenizer.decode(_without_eos(tokens[row][here & ~is_masked[row]], self._eos_ids))
            for row, here in enumerate(ahead)]
        return StreamStep(
            tokens=tokens, is_masked=is_masked, valid=self._valid, is_open=self._is_open,
            generated=slice(first, self._canvas.length), committed=committed, text=text,
            draft=[tokens[row][here] for row, here in enumerate(ahead)], draft_text=drafts,
            block=int(got.block), nfe=nfe, done=done, eos_ids=tuple(self._eos_ids))

    def _final(self, row: int, tokens: np.ndarray, is_masked: np.ndarray, done: bool) -> Int[np.ndarray, " n"]:
        """Tokens of the row's finished blocks; a position of an unfinished one might still be reopened."""
        open_here, masked = self._is_open[row], is_masked[row].copy()
        if not done and masked.any():
            canvas = self._canvas
            block = (int(masked.argmax()) - canvas.first_block) // canvas.block_length
            masked[canvas.first_block + block * canvas.block_length:] = True
        return completion(tokens[row], open_here, masked, self._eos_ids)


def feed(streamer: Streamer, canvas: Canvas, steps: Iterator[StreamStep]) -> Iterator[StreamStep]:
    """The steps of one row, each handed to the streamer before it is passed on."""
    tokens, pinned = jax.device_get((canvas.tokens, canvas.valid & ~canvas.is_masked))
    streamer.put(tokens[0][pinned[0]])
    put_draft = getattr(streamer, "put_draft", None)
    for step in steps:
        if len(step.committed[0]):
            streamer.put(step.committed[0])
        if put_draft is not None:
            put_draft(step.draft[0])
        yield step
    streamer.end()


def _without_eos(row: Int[np.ndarray, " n"], eos_ids: Sequence[int]) -> Int[np.ndarray, " n"]:
    return row[~np.isin(row, np.asarray(eos_ids))]
