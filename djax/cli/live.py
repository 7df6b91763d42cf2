"""A live view of the canvas being denoised, for terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from djax.engine.results import runs, tokens_per_forward, tokens_per_second
from djax.engine.streaming import StreamStep
from djax.engine.tokenizer import Tokenizer

FINAL, DRAFT, NEW, MASKED, STATUS = "", "cyan", "bold black on green", "dim", "dim"
_FRAME_SECONDS = 1 / 15
_LEAST_LINES = 3
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: "\N{SYMBOL FOR DELETE}"} | dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")
"""Glyphs in place of control characters (Cc)."""


def printable(text: str) -> str:
    """`text` as it may be sent to a terminal: control characters but newline and tab become visible symbols.

    A model's output must not move the cursor or talk to the terminal.
    """
    return text.translate(_VISIBLE)


class LiveCanvas:
    """Draws `StreamStep`s: final text, drafts, what was just committed, and masked positions, with a status line.

    Args:
        tokenizer: turns tokens into text; None shows token ids.
        block_length: for the status line's block count.
        console: where to draw; None is standard output.
        clock: seconds, for tokens per second.
    """

    def __init__(
        self, *, tokenizer: Tokenizer | None, block_length: int, console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.console = Console(highlight=False) if console is None else console
        self._tokenizer, self._block_length, self._clock = tokenizer, block_length, clock
        self._glyph = "░" if self.console.encoding.lower().startswith("utf") else "_"
        self._started: float | None = None
        self._before_start = 0
        self._steps = 0
        self._live: Live | None = None
        self.last: StreamStep | None = None
        """The last step that came."""
        self._drawn: Bool[np.ndarray, "B T"] | None = None
        """Positions that were decoded in the last frame drawn."""

    def run(self, steps: Iterable[StreamStep]) -> StreamStep | None:
        """Draw steps until they end; the view then disappears. Returns the last step, None if there was none."""
        drawn_at, self.last = -1.0, None
        with Live(console=self.console, transient=True, auto_refresh=False, vertical_overflow="crop") as live:
            self._live = live
            live.update(Text("compiling", style=STATUS), refresh=True)
            for step in steps:
                self.count(step)
                self.last = step
                now = self._clock()
                # Drawing costs more than a denoising step: a frame shows all that happened since the last one.
                if now - drawn_at >= _FRAME_SECONDS:
                    live.update(self.render(step), refresh=True)
                    drawn_at = now
        return self.last

    def close(self) -> None:
        """Take the view away and give the terminal back, from any thread; once it is gone this does nothing."""
        if self._live is not None:
            self._live.stop()

    def count(self, step: StreamStep) -> None:
        """Take note of a step. The clock starts at the first one, which holds the compilation."""
        self._steps += 1
        if self._started is None:
            self._started, self._before_start = self._clock(), int(step.lengths.sum())

    def render(self, step: StreamStep) -> Group:
        """A frame: the tail of each row that fits the terminal, and the status line."""
        decoded = step.is_open & ~step.is_masked
        new = decoded & ~(np.zeros_like(decoded) if self._drawn is None else self._drawn)
        self._drawn = decoded
        rows = len(step.tokens)
        space = max(self.console.height - 2, _LEAST_LINES)
        shown = min(rows, max(space // (_LEAST_LINES + 1), 1))
        lines: list[Text] = []
        for row in range(shown):
            if rows > 1:
                lines.append(Text(f"[{row}]", style=STATUS))
            text = self._row(step, row, new[row])
            wrapped = list(text.wrap(self.console, max(self.console.width, 10)))
            lines += wrapped[-max(space // shown - (rows > 1), 1):]
        if shown < rows:
            lines.append(Text(f"and {rows - shown} more rows", style=STATUS))
        return Group(*lines, Text(self.status(step), style=STATUS, no_wrap=True, overflow="ellipsis"))

    def status(self, step: StreamStep) -> str:
        """Block, step, forwards (of the row that had most), and TPF and TPS over all rows."""
        generated = int(step.lengths.sum())
        open_width = int(step.is_open.sum(-1).max())
        blocks = max(-(-open_width // self._block_length), step.block + 1)
        seconds = 0.0 if self._started is None else self._clock() - self._started
        parts = [f"block {step.block + 1}/{blocks}", f"step {self._steps}", f"NFE {int(step.nfe.max())}",
                 f"{float(tokens_per_forward(generated, step.nfe.sum())):.2f} tokens/forward"]
        if seconds > 0 and generated > self._before_start:
            parts.append(f"{tokens_per_second(generated - self._before_start, seconds):.0f} tokens/s")
        return "  ".join(parts)

    def _row(self, step: StreamStep, row: int, new: Bool[np.ndarray, " T"]) -> Text:
        """A row's open region: decoded runs as text, each masked position as one glyph."""
        here = step.is_open[row]
        tokens, masked, fresh = step.tokens[row][here], step.is_masked[row][here], new[here]
        final = len(tokens) - len(step.draft[row])
        # Masks after the working block say nothing: two lines of them show that there is more.
        ahead = int(np.flatnonzero(~masked)[-1]) + 1 if not masked.all() else 0
        until = min(len(tokens), max(ahead, final) + max(self._block_length, 2 * self.console.width))
        styles = np.where(masked, 3, np.where(fresh, 2, np.where(np.arange(len(tokens)) < final, 0, 1)))[:until]
        text = Text()
        for start, stop in runs(masked[:until]):
            if masked[start]:
                text.append(self._glyph * (stop - start), style=MASKED)
                continue
            # One stream per run: a character whose bytes lie in two differently styled tokens stays whole.
            stream = None if self._tokenizer is None else self._tokenizer.stream()
            for first, end in runs(styles[start:stop]):
                ids = tokens[start + first:start + end]
                piece = " ".join(map(str, ids)) + " " if stream is None else stream.push(ids.tolist())
                text.append(printable(piece), style=(FINAL, DRAFT, NEW)[styles[start + first]])
            if stream is not None:
                text.append(printable(stream.finish()), style=DRAFT)
        return text
