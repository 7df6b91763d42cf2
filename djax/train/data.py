"""Examples to batches. The batch of update n follows from n alone, so a resumed run sees what it would have seen."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from djax.text import Tokenizer, check_messages
from djax.train import tasks
from djax.train.loss import Batch

BUCKET = 32
"""Batches are as long as their longest row, rounded up to this: one compiled step for each length."""

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, without EOS."""
Row = tuple[int, list[int]]
"""How many tokens are the prompt's, and all tokens."""


class Source(Protocol):
    """Numbered examples."""

    def pair(self, index: int) -> Pair:
        """Example `index`, any number from 0."""
        ...


@dataclasses.dataclass(frozen=True)
class FixedSource:
    """A list of pairs; every pass over it is in an order of its own, shuffled by (seed, pass)."""

    pairs: Sequence[Pair]
    seed: int

    def pair(self, index: int) -> Pair:
        """The example at place `index` of the endless sequence of passes."""
        number, place = divmod(index, len(self.pairs))
        return self.pairs[_order(len(self.pairs), self.seed, number)[place]]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(count)


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Training examples of `djax.train.tasks` that are never repeated, the named tasks in turn."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    seed: int

    def __post_init__(self) -> None:
        for name in self.names:
            tasks.examples(name, split="train", seed=self.seed)

    def pair(self, index: int) -> Pair:
        """Example `index` of the mix."""
        name = self.names[index % len(self.names)]
        example = next(tasks.examples(name, split="train", seed=self.seed, start=index))
        return encode_pair([{"role": "user", "content": example.prompt}], example.answer, self.tokenizer)


def encode_pair(prompt: str | Sequence[Mapping[str, str]], answer: str, tokenizer: Tokenizer) -> Pair:
    """Ids of a prompt (a text as it is, or a conversation through the chat template) and of its answer."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.apply_chat(prompt)
    return ids, tokenizer.encode(answer)


def read_jsonl(path: Path, tokenizer: Tokenizer) -> list[Pair]:
    """Pairs of a JSON Lines file: {"prompt": text, "answer": text}, or {"messages": [..., an assistant's last]}.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is neither, or there is none; names file, line and field.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                pairs.append(_pair_of(json.loads(line), tokenizer))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{path}: got no examples; allowed at least one JSON object a line; add some")
    return pairs


def _pair_of(record: Any, tokenizer: Tokenizer) -> Pair:
    if not isinstance(record, dict) or not ({"prompt", "answer"} <= record.keys() or "messages" in record):
        raise ValueError('got neither form; allowed {"prompt": ..., "answer": ...} and {"messages": [...]}')
    if "messages" in record:
        messages = record["messages"]
        check_messages(messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("messages: got no answer at the end; allowed a conversation that ends with an assistant's "
                             "message; add it")
        return encode_pair(messages[:-1], messages[-1]["content"], tokenizer)
    for field in ("prompt", "answer"):
        if not isinstance(record[field], str):
            raise ValueError(f"{field}: got {record[field]!r:.60}; allowed a text")
    return encode_pair(record["prompt"], record["answer"], tokenizer)


def batcher(
    source: Source, *, batch_size: int, row_length: int, eos_id: int, longest_tail: int, seed: int, group: int = 1
) -> Callable[[int], Batch]:
    """The batch of each update.

    A row is prompt, answer, and 1 to `longest_tail` EOS, all of which are learned: in generation the canvas
    ends somewhere behind the answer, and the model has to fill what is left. Short tails are the more frequent
    ones (their logarithm is uniform): long ones teach little more and take as long.

    Args:
        source: examples; update n takes n * batch_size and following (its group's, if `group` is above 1).
        batch_size: rows.
        row_length: bound on a row's tokens, one EOS included.
        eos_id: ends and fills an answer.
        longest_tail: most EOS after an answer, as far as they fit.
        seed: of the tails' lengths, and of the order within a group.
        group: updates whose rows are shared out by length, so that a batch has rows of nearly the same length and
            little padding. Each example is still seen in its group, the batches in a random order.

    Raises:
        ValueError: (when called) an example does not fit; names it and what to raise.
    """
    for name, value in (("batch_size", batch_size), ("row_length", row_length), ("longest_tail", longest_tail),
                        ("group", group)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; it must be at least 1")

    @functools.lru_cache(maxsize=1)
    def rows_of(number: int) -> list[list[Row]]:
        """Every batch of a group."""
        count = group * batch_size
        rows = [row(index) for index in range(number * count, (number + 1) * count)]
        if group > 1:
            rows.sort(key=lambda row: len(row[1]))
        order = np.random.default_rng([seed, number]).permutation(group)
        return [rows[place * batch_size : (place + 1) * batch_size] for place in order]

    def row(index: int) -> Row:
        prompt, answer = source.pair(index)
        room = row_length - len(prompt) - len(answer)
        if room < 1:
            raise ValueError(
                f"row_length: got {row_length}; example {index} has {len(prompt)} + {len(answer)} tokens and needs "
                "one EOS; raise row_length or leave it out")
        tail = int((min(room, longest_tail) + 1) ** np.random.default_rng([seed, index]).random())
        return len(prompt), [*prompt, *answer, *[eos_id] * tail]

    def batch(update: int) -> Batch:
        number, place = divmod(update, group)
        rows = rows_of(number)[place]
        length = min(-(-max(len(row) for _, row in rows) // BUCKET) * BUCKET, row_length)
        column = np.arange(length)
        tokens = np.full((batch_size, length), eos_id, np.int32)
        for place, (_, row) in enumerate(rows):
            tokens[place, : len(row)] = row
        valid = column < np.array([[len(row)] for _, row in rows])
        is_answer = valid & (column >= np.array([[prompt] for prompt, _ in rows]))
        return Batch(tokens=jnp.asarray(tokens), is_answer=jnp.asarray(is_answer), valid=jnp.asarray(valid))

    return batch
