"""Exact match of sampled answers of the bundled model, with and without each filter of the draw.

    python -m benchmarks.sampling                      # temperature 0.2, 200 held-out prompts

Prompts are the first held-out ones of each task (`djax.tasks.held_out_set`), as many of each; every row of
the table decodes the same ones with the same key. A filter narrows a draw and decides
nothing, so it should cost no accuracy.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import djax
from djax import tasks

BLOCK_LENGTH = MAX_NEW_TOKENS = 64


def exact_match(lm: djax.DiffusionLM, examples: list[tasks.Example], *, batch: int, **settings: Any) -> float:
    """Percentage of right worked answers."""
    right = 0
    for start in range(0, len(examples), batch):
        part = examples[start:start + batch]
        prompts: list[Any] = [example.messages for example in part]
        got = lm.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, block_length=BLOCK_LENGTH, key=start, **settings)
        right += sum(tasks.TASKS[example.task].verify(example.prompt, text)
                     for example, text in zip(part, got.text or (), strict=True))
    return 100 * right / len(examples)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts in all")
    parser.add_argument("--batch", type=int, default=50, help="prompts decoded together")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--filters", nargs="*", default=["top_p=0.95"], metavar="NAME=VALUE",
                        help="top_k, top_p or min_p, one a row")
    options = parser.parse_args(arguments)
    for name in ("prompts", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}; allowed at least 1")
    each = -(-options.prompts // len(tasks.TASKS))
    sets = [tasks.held_out_set(name, each) for name in tasks.TASKS]
    examples = [example for group in zip(*sets, strict=True) for example in group][: options.prompts]
    lm = djax.load(dtype="float32")
    rows: list[tuple[str, dict[str, float]]] = [("none", {})]
    for text in options.filters:
        name, _, value = text.partition("=")
        rows.append((text, {name: int(value) if name == "top_k" else float(value)}))
    print(f"temperature {options.temperature:g}, {len(examples)} prompts")
    for text, filters in rows:
        score = exact_match(lm, examples, batch=options.batch, temperature=options.temperature, **filters)
        print(f"{text:12} {score:5.1f} % exact", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
