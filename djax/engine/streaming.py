"""A generation handed out while it happens: what became final, and drafts of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Int

from djax.contracts.ambient import without_mesh
from djax.contracts.canvas import Canvas
from djax.engine.results import Compared, draft_texts, first_open, generated_length, is_completion, without_eos
from djax.engine.running import Run
from djax.engine.tokenizer import TextStream, Tokenizer
from djax.loop.state import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class StreamStep(Compared):
    """One step of a stream: the canvas now, and what became final since the last step."""

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
    """Ends of a row's text."""
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


class StreamReader:
    """Turns the loop's states into `StreamStep`s: remembers what each row has already handed out."""

    def __init__(
        self, canvas: Canvas, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, limit: int | None = None
    ) -> None:
        """`limit` as in `djax.engine.results.trimmed`."""
        self._canvas, self._eos_ids, self._tokenizer = canvas, eos_ids, tokenizer
        is_open, self._valid = jax.device_get((canvas.is_masked, canvas.valid))
        self._is_open = first_open(is_open, limit)
        self._given = [0] * canvas.batch
        self._text: list[TextStream] | None = (
            None if tokenizer is None else [tokenizer.stream() for _ in range(canvas.batch)])

    def read(self, progress: Progress, *, last: bool) -> StreamStep:
        """The step for a state of the loop (`Run.fetch`); `last` flushes what the detokenizer held back."""
        got: Any = progress
        tokens, is_masked, done = got.result.tokens, got.result.is_masked, got.done
        final = [self._final(row, tokens, is_masked, bool(done[row]) or last) for row in range(self._canvas.batch)]
        committed = [row[given:] for row, given in zip(final, self._given, strict=True)]
        self._given = [len(row) for row in final]
        text = None
        if self._text is not None:
            text = [stream.push(without_eos(row, self._eos_ids)) + (stream.finish() if last else "")
                    for stream, row in zip(self._text, committed, strict=True)]
        first = int(self._is_open.any(0).argmax())
        ahead = [self._is_open[row] & (np.cumsum(self._is_open[row]) > self._given[row])
                 for row in range(self._canvas.batch)]
        drafts = None if self._tokenizer is None else [
            self._tokenizer.decode(without_eos(tokens[row][here & ~is_masked[row]], self._eos_ids))
            for row, here in enumerate(ahead)]
        return StreamStep(
            tokens=tokens, is_masked=is_masked, valid=self._valid, is_open=self._is_open,
            generated=slice(first, self._canvas.length), committed=committed, text=text,
            draft=[tokens[row][here] for row, here in enumerate(ahead)], draft_text=drafts,
            block=int(got.block), nfe=got.result.nfe, done=done, eos_ids=tuple(self._eos_ids))

    def _final(self, row: int, tokens: np.ndarray, is_masked: np.ndarray, done: bool) -> Int[np.ndarray, " n"]:
        """Tokens of the row's finished blocks; a position of an unfinished one might still be reopened."""
        open_here, masked = self._is_open[row], is_masked[row].copy()
        if not done and masked.any():
            canvas = self._canvas
            block = (int(masked.argmax()) - canvas.first_block) // canvas.block_length
            masked[canvas.first_block + block * canvas.block_length:] = True
        return tokens[row][is_completion(tokens[row], open_here, masked, self._eos_ids)]


def stream_run(
    begin: Callable[[], Run], canvas: Canvas, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, limit: int,
    drafts: bool,
) -> Iterator[StreamStep]:
    """The steps of a run, which begins with the first: each denoising step, or without `drafts` each finished block."""
    # no context around a yield: it would be the caller's between two steps
    with without_mesh():
        reader = StreamReader(canvas, eos_ids=eos_ids, tokenizer=tokenizer, limit=limit)
        run = begin()
    block = 0
    while run.left:
        block += 1
        shown = run.advance(steps=1) if drafts else run.advance(before_block=block)
        yield reader.read(run.fetch(shown), last=not run.left)


def with_streamer(streamer: Streamer, canvas: Canvas, steps: Iterator[StreamStep]) -> Iterator[StreamStep]:
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
