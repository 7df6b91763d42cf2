"""Examples to batches. The batch of update n follows from n alone, so a resumed run sees what it would have seen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from djax import tasks
from djax.engine.tokenizer import Tokenizer, check_messages
from djax.errors import ArgumentError, check_integer, check_number, shown
from djax.train.loss import Batch

BUCKET = 32
"""Batches are as long as their longest row, rounded up to this: one compiled step for each length."""

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, without EOS."""


class Sample(NamedTuple):
    """One example as tokens."""

    tokens: list[int]
    is_answer: list[bool]
    """The learned part; the rest is given."""
    ends: bool = True
    """Whether EOS follows, which is learned too."""


class Source(Protocol):
    """Numbered examples."""

    def sample(self, index: int) -> Sample:
        """Example `index`, any number from 0."""
        ...


def prompted(pair: Pair) -> Sample:
    """A prompt, which is given, and its answer."""
    prompt, answer = pair
    return Sample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


@dataclasses.dataclass(frozen=True)
class FixedSource:
    """A list of pairs; every pass over it is in an order of its own, shuffled by (seed, pass)."""

    pairs: Sequence[Pair]
    seed: int

    def sample(self, index: int) -> Sample:
        """The example at place `index` of the endless sequence of passes."""
        number, place = divmod(index, len(self.pairs))
        return prompted(self.pairs[_order(len(self.pairs), self.seed, number)[place]])


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(count)


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Training examples of `djax.tasks` that are never repeated, the named tasks in turn."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    seed: int

    def __post_init__(self) -> None:
        for name in self.names:
            tasks.examples(name, split="train", seed=self.seed)

    def sample(self, index: int) -> Sample:
        """Example `index` of the mix."""
        name = self.names[index % len(self.names)]
        example = next(tasks.examples(name, split="train", seed=self.seed, start=index))
        return prompted(encode_pair(example.messages, example.answer, self.tokenizer))


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
    # str.splitlines would also cut at U+2028, U+2029 and U+0085, which JSON allows inside a text
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                pairs.append(_pair_of(json.loads(line), tokenizer))
            except ArgumentError as error:
                raise error.renamed(f"{path}, line {number}: {error.name}") from error
            except (ValueError, RecursionError) as error:
                raise ArgumentError(f"{path}, line {number}", f"no JSON ({error})", allowed="a JSON object a line",
                                    advice="correct it") from error
    if not pairs:
        raise ArgumentError(str(path), "no examples", allowed="at least one JSON object a line", advice="add some")
    return pairs


def _pair_of(record: Any, tokenizer: Tokenizer) -> Pair:
    if not isinstance(record, dict) or not ({"prompt", "answer"} <= record.keys() or "messages" in record):
        raise ArgumentError("example", shown(record),
                            allowed='{"prompt": ..., "answer": ...} and {"messages": [...]}')
    if "messages" in record:
        messages = record["messages"]
        check_messages(messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ArgumentError("messages", "no answer at the end", allowed="a conversation that ends with an "
                                "assistant's message", advice="add it")
        return encode_pair(messages[:-1], messages[-1]["content"], tokenizer)
    for field in ("prompt", "answer"):
        if not isinstance(record[field], str):
            raise ArgumentError(field, shown(record[field]), allowed="a text")
    return encode_pair(record["prompt"], record["answer"], tokenizer)


def tail_length(most: int, draw: float) -> int:
    """Number of EOS behind an answer, from a uniform draw: its logarithm is uniform, up to `most`."""
    return int((most + 1) ** draw)


def batcher(
    source: Source, *, batch_size: int, row_length: int, eos_id: int, longest_tail: int, seed: int, group: int = 1,
    given: float = 0.0,
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
        seed: of the tails' lengths, of what is given, and of the order within a group.
        group: updates whose rows are shared out by length, so that a batch has rows of nearly the same length and
            little padding. Each example is still seen in its group, the batches in a random order.
        given: share of the rows in which the answer's first part, of a random length, counts as prompt: what block
            by block decoding sees. It is never masked, and what follows is learned as an answer to it.

    Raises:
        ValueError: (when called) an example does not fit; names it and what to raise.
    """
    for name, value in (("batch_size", batch_size), ("row_length", row_length), ("longest_tail", longest_tail),
                        ("group", group)):
        check_integer(name, value, 1)
    check_number("given", given, 0.0, 1.0)

    @functools.lru_cache(maxsize=1)
    def rows_of(number: int) -> list[list[Sample]]:
        """Every batch of a group."""
        count = group * batch_size
        rows = [row(index) for index in range(number * count, (number + 1) * count)]
        if group > 1:
            rows.sort(key=lambda row: len(row.tokens))
        order = np.random.default_rng([seed, number]).permutation(group)
        return [rows[place * batch_size : (place + 1) * batch_size] for place in order]

    def row(index: int) -> Sample:
        tokens, is_answer, ends = source.sample(index)
        room = row_length - len(tokens)
        if room < ends:
            raise ArgumentError(
                "row_length", row_length, allowed=f"what example {index} needs, {len(tokens) - sum(is_answer)} + "
                f"{sum(is_answer)} tokens and one EOS", advice="raise it, or leave the example out")
        for_tail, for_share, for_place = np.random.default_rng([seed, index]).random(3)
        if for_share < given:
            known = int(for_place * (sum(is_answer) + 1))
            is_answer = [learned and count > known for learned, count in zip(
                is_answer, itertools.accumulate(is_answer), strict=True)]
        tail = tail_length(min(room, longest_tail), for_tail) if ends else 0
        return Sample([*tokens, *[eos_id] * tail], [*is_answer, *[True] * tail])

    def batch(update: int) -> Batch:
        number, place = divmod(update, group)
        rows = rows_of(number)[place]
        length = min(-(-max(len(row.tokens) for row in rows) // BUCKET) * BUCKET, row_length)
        tokens = np.full((batch_size, length), eos_id, np.int32)
        is_answer, valid = np.zeros((2, batch_size, length), bool)
        for place, row in enumerate(rows):
            here = slice(len(row.tokens))
            tokens[place, here], is_answer[place, here], valid[place, here] = row.tokens, row.is_answer, True
        return Batch(tokens=jnp.asarray(tokens), is_answer=jnp.asarray(is_answer), valid=jnp.asarray(valid))

    return batch
