"""Output of the commands: text, or one JSON object per prompt."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from djax.cli.live import printable
from djax.engine.results import Generation, draft_texts
from djax.engine.tokenizer import Tokenizer


def print_texts(texts: Sequence[str] | None, tokens: Sequence[np.ndarray]) -> None:
    """One completion after the other; token ids where there is no text. Made printable for a terminal."""
    for index, row in enumerate(tokens):
        text = " ".join(map(str, row.tolist())) if texts is None else texts[index]
        write_line(printable(text) if sys.stdout.isatty() else text)


def print_json(generation: Generation, *, full: bool) -> None:
    """One JSON object per line and prompt; `full` as in `json_row`."""
    for row in range(len(generation.tokens)):
        write_line(json.dumps(json_row(generation, row, full=full), ensure_ascii=False, allow_nan=False))


class Output:
    """Prints a generation, or what it had reached when it is interrupted; give `put` to `generate(watch=)`.

    Interrupted JSON rows have the stop reason "interrupted"; in a text masked positions are [MASK:n].
    """

    def __init__(
        self, *, as_json: bool, full: bool, prints: bool, eos_ids: Sequence[int], tokenizer: Tokenizer | None,
        whole: bool = False,
    ) -> None:
        """`prints`: whether this process is the one that prints; `whole`: show whole rows and not completions."""
        self._as_json, self._full, self._prints, self._whole = as_json, full, prints, whole
        self._eos_ids, self._tokenizer = eos_ids, tokenizer
        self._latest: Generation | None = None

    def put(self, generation: Generation) -> None:
        """Remember it in the place of the one before."""
        self._latest = generation

    def print(self, generation: Generation) -> None:
        """Print JSON lines or texts, where this process prints."""
        if self._prints and self._as_json:
            print_json(generation, full=self._full)
        elif self._prints:
            print_texts(generation.text, generation.tokens)

    def tell(self) -> str:
        """Print it as if it were the end; what there is to say about it."""
        got = self._latest
        if got is None:
            return "interrupted before the first denoising step was done"
        if self._prints and self._as_json:
            print_json(got, full=self._full)
        elif self._prints:
            wanted = got.canvas_mask if self._whole else got.is_open
            print_texts(draft_texts(got.canvas, wanted, got.is_masked, self._eos_ids, self._tokenizer), got.tokens)
        return f"interrupted after {int(got.steps.max())} denoising steps; what was reached is on standard output"


def json_row(generation: Generation, row: int, *, full: bool) -> dict[str, Any]:
    """A row of a generation as JSON values.

    `tokens` is the completion (the whole row for infilling). With `full`, `canvas` has every real position of the
    row, prompt included, and `positions` the indices in it that were generated; `commit_step` and `log_prob`
    go with `positions`. What is not finite becomes null.
    """
    valid = generation.canvas_mask[row]
    is_open = generation.is_open[row]
    short = {
        "index": row,
        "text": None if generation.text is None else generation.text[row],
        "tokens": generation.tokens[row].tolist(),
        "length": int(generation.lengths[row]),
        "nfe": int(generation.nfe[row]),
        "refreshes": int(generation.refreshes[row]),
        "tokens_per_forward": _finite(generation.tokens_per_forward[row]),
        "stop_reason": generation.stop_reason[row],
        "masked_left": int((generation.is_masked[row] & is_open).sum()),
    }
    if not full:
        return short
    return short | {
        "canvas": generation.canvas[row][valid].tolist(),
        "positions": np.flatnonzero(is_open[valid]).tolist(),
        "commit_step": generation.commit_step[row][is_open].tolist(),
        "log_prob": [_finite(value) for value in generation.log_prob[row][is_open]],
    }


def print_summary(summary: dict[str, Any], *, as_json: bool) -> None:
    """Print a checkpoint's contents: as one JSON object, or as text with layers and experts folded."""
    if as_json:
        write_line(json.dumps(summary, ensure_ascii=False))
        return
    write_line(printable(f"{summary['directory']} ({summary['format']})"))
    write_line(f"parameters: {summary['parameter_count']:,}")
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(summary["bytes_per_dtype"].items()))
    write_line(f"bytes: {summary['bytes']:,} ({parts})")
    write_line("config:")
    for name, value in summary["config"].items():
        write_line(printable(f"  {name}: {value}"))
    write_line("parameters and the keys that fill them:")
    for line in _folded(summary["parameters"]):
        write_line(printable(line))
    write_line("ignored keys: " + (printable(", ".join(summary["ignored"])) or "none"))


def _folded(parameters: Sequence[dict[str, Any]]) -> list[str]:
    """One line per kind of parameter: numbers in names become *, and how often each stands there is counted."""
    leaves: Counter[tuple[str, str]] = Counter()
    keys: dict[tuple[str, str], Counter[str]] = {}
    for parameter in parameters:
        axes = parameter["axes"] or [None] * len(parameter["shape"])
        shape = ", ".join(f"{size} {axis}" if axis else str(size)
                          for size, axis in zip(parameter["shape"], axes, strict=True))
        kind = (_starred(parameter["name"]), f"[{shape}]")
        leaves[kind] += 1
        keys.setdefault(kind, Counter()).update(_starred(key) for key in parameter["keys"])
    return [
        f"  {_times(count)}{name} {shape} <- " + ", ".join(f"{_times(n)}{key}" for key, n in keys[name, shape].items())
        for (name, shape), count in leaves.items()]


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def write_line(text: str) -> None:
    """A line on standard output: as UTF-8 into a pipe or file, as the terminal can show it on a terminal."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        reconfigure(**({"errors": "replace"} if sys.stdout.isatty() else {"encoding": "utf-8"}))
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
