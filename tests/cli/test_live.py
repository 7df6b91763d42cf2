"""The live view: what a frame shows, and what the status line counts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from djax import assets
from djax.cli.live import MASKED, NEW, LiveCanvas, printable
from djax.engine.streaming import StreamStep
from djax.engine.tokenizer import Tokenizer

MASK, EOS = 472, 469


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.path())


def console(*, width: int = 40, height: int = 10) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="standard",
                   legacy_windows=False, highlight=False)


def frame(view: LiveCanvas, step: StreamStep) -> list[str]:
    """The frame's lines without escape sequences."""
    view.count(step)
    view.console.print(view.render(step))
    assert isinstance(view.console.file, io.StringIO)
    text = view.console.file.getvalue()
    view.console.file.truncate(0)
    view.console.file.seek(0)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


def make_step(
    rows: list[list[int]], *, prompt: int = 2, final: int = 0, nfe: int = 1, block: int = 0
) -> StreamStep:
    """A step whose rows are `prompt` pinned positions and then these tokens, masked where they are MASK."""
    open_part = np.asarray(rows)
    tokens = np.pad(open_part, ((0, 0), (prompt, 0)), constant_values=5)
    is_open = np.zeros(tokens.shape, bool)
    is_open[:, prompt:] = True
    batch = len(rows)
    return StreamStep(
        tokens=tokens, is_masked=is_open & (tokens == MASK), valid=np.ones(tokens.shape, bool), is_open=is_open,
        generated=slice(prompt, tokens.shape[1]), committed=[row[:final] for row in open_part],
        text=None, draft=[row[final:] for row in open_part], block=block, nfe=np.full(batch, nfe),
        done=np.zeros(batch, bool))


def test_decoded_text_and_masks(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=16, console=console())
    ids = tokenizer.encode("the model")
    lines = frame(view, make_step([[*ids[:1], MASK, MASK, *ids[1:]]]))
    first, rest = tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:])
    assert lines[0] == f"{first}░░{rest}"
    assert lines[1].startswith("block 1/1  step 1  NFE 1  ")


def test_prompt_and_padding_are_not_shown(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=8, console=console())
    assert frame(view, make_step([[MASK] * 4], prompt=7))[0] == "░░░░"


def test_only_what_is_new_is_highlighted(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=8, console=console())
    ids = tokenizer.encode("abc")
    assert len(ids) == 3

    def styled(step: StreamStep) -> dict[str, str]:
        view.count(step)
        text = view.render(step).renderables[0]
        assert isinstance(text, Text)
        return {text.plain[span.start:span.end]: str(span.style) for span in text.spans}

    assert styled(make_step([[ids[0], MASK, MASK]])) == {"a": NEW, "░░": MASKED}
    second = styled(make_step([[ids[0], ids[1], MASK]]))
    assert second["b"] == NEW
    assert second["a"] != NEW


def test_a_character_of_several_tokens_is_whole(tokenizer: Tokenizer) -> None:
    """Half of it old and half new: two styles, one character."""
    view = LiveCanvas(tokenizer=tokenizer, block_length=8, console=console())
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1
    half = [*ids[:-1], MASK, MASK]
    assert frame(view, make_step([half]))[0] == "\ufffd░░"
    assert frame(view, make_step([[*ids, MASK]]))[0] == "🎉░"


def test_long_text_shows_its_tail(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=8, console=console(width=20, height=8))
    ids = tokenizer.encode(" ".join(f"w{number}" for number in range(60)))
    lines = frame(view, make_step([[*ids, MASK, MASK]], final=len(ids)))
    assert len(lines) <= 8
    assert "w59░░" in "".join(lines)
    assert "w0 " not in "".join(lines)


def test_far_masks_are_cut(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=8, console=console(width=20, height=30))
    lines = frame(view, make_step([[MASK] * 4000]))
    assert "".join(lines[:-1]) == "░" * 40


@pytest.mark.parametrize("rows", [2, 3, 50])
def test_rows_share_the_height(tokenizer: Tokenizer, rows: int) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=4, console=console(width=30, height=12))
    lines = frame(view, make_step([[MASK] * 4] * rows))
    assert len(lines) <= 12
    assert lines[0] == "[0]"
    assert any("more rows" in line for line in lines) == (rows > 2)


def test_status_counts(tokenizer: Tokenizer) -> None:
    """TPF over all rows; tokens per second from the first step on, which held the compilation."""
    seconds = [100.0]
    view = LiveCanvas(tokenizer=tokenizer, block_length=2, console=console(width=100), clock=lambda: seconds[0])
    assert frame(view, make_step([[7, MASK, MASK, MASK]] * 2, nfe=1))[-1] == (
        "block 1/2  step 1  NFE 1  1.00 tokens/forward")
    seconds[0] += 2.0
    last = make_step([[7, 8, 9, 10]] * 2, nfe=3, block=1)
    assert frame(view, last)[-1] == "block 2/2  step 2  NFE 3  1.33 tokens/forward  3 tokens/s"


def test_without_a_tokenizer_ids_are_shown() -> None:
    view = LiveCanvas(tokenizer=None, block_length=4, console=console())
    assert frame(view, make_step([[7, 8, MASK, 300]]))[0] == "7 8 ░300"


def test_an_empty_step_is_drawn(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=4, console=console(width=60))
    assert frame(view, make_step([[MASK]], nfe=0))[-1].endswith("0.00 tokens/forward")


def test_run_returns_the_last_step_and_clears_the_view(tokenizer: Tokenizer) -> None:
    seconds = iter(range(1000))
    clock: Callable[[], float] = lambda: float(next(seconds))  # noqa: E731
    view = LiveCanvas(tokenizer=tokenizer, block_length=4, console=console(), clock=clock)
    steps = [make_step([[7, MASK, MASK]]), make_step([[7, 8, MASK]], nfe=2), make_step([[7, 8, 9]], nfe=3)]
    assert view.run(iter(steps)) is steps[-1]
    assert isinstance(view.console.file, io.StringIO)
    drawn = view.console.file.getvalue()
    assert "░░" in drawn
    assert "\x1b[2K" in drawn, "a transient view erases itself"
    assert view.run(iter([])) is None


def test_steps_faster_than_a_frame_are_not_drawn(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=4, console=console(), clock=lambda: 1.0)
    view.run(iter([make_step([[7, MASK, MASK]])] + [make_step([[7, 8, MASK]])] * 5))
    assert isinstance(view.console.file, io.StringIO)
    assert "step 1 " in view.console.file.getvalue()
    assert "step 2 " not in view.console.file.getvalue()


@pytest.mark.parametrize(("text", "shown"), [
    ("plain é 🎉\n\tx", "plain é 🎉\n\tx"),
    ("\x1b[2Jgone", "␛[2Jgone"), ("\x07\x08\r", "␇␈␍"), ("\x7f\x9b31m", "␡\ufffd31m"),
])
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_hostile_completion_reaches_the_terminal_as_symbols(tokenizer: Tokenizer) -> None:
    view = LiveCanvas(tokenizer=tokenizer, block_length=4, console=console())
    step = make_step([tokenizer.encode("a\x1b]0;title\x07[bold]b[/bold]")])
    assert frame(view, step)[0] == "a␛]0;title␇[bold]b[/bold]"
