"""Rows of bare facts for the bundled model: what its tasks compute, many times as often as their answers have it.

    7+3+0=10
    2+6+1=09

What a step starts from is given and its result is learned. Half of the rows stand behind a prompt, and half have
nothing but masks from some place on: facts that were only met by themselves are not found again in an answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from djax.text import Tokenizer
from djax.train import tasks
from djax.train.data import Sample, Source
from djax.train.tasks.expressions import MAX_VALUE, operate

Segment = tuple[str, bool]
"""A text, and whether it is learned."""


def _column(rng: np.random.Generator) -> list[Segment]:
    """A step of an addition."""
    a, b, carry = (int(rng.integers(high)) for high in (10, 10, 2))
    return [(f"{a}+{b}+{carry}=", False), (f"{a + b + carry:02d}", True), ("\n", False)]


def _operation(rng: np.random.Generator) -> list[Segment]:
    """A step of an expression, without what it leads to."""
    while True:
        sign = "+-*"[int(rng.integers(3))]
        left, right = (int(rng.integers(high + 1)) for high in ((9, 9) if sign == "*" else (MAX_VALUE, 9)))
        if sign == "+" and rng.integers(4) == 0:
            left, right = right, left
        value = operate(left, sign, right)
        if value is not None:
            return [(f"{left}{sign}{right}=", False), (str(value), True), (":\n", False)]


def _total(rng: np.random.Generator) -> list[Segment]:
    """Two lines of a sum without repeats."""
    before, digit = int(rng.integers(46)), int(rng.integers(1, 10))
    return [(f"{rng.integers(1, 10)} seen {before:02d}\n{digit} new ", False), (f"{before + digit:02d}", True),
            ("\n", False)]


KINDS: tuple[Callable[[np.random.Generator], list[Segment]], ...] = (_column, _operation, _total)


@dataclasses.dataclass(frozen=True)
class DrillSource:
    """Rows of facts, the kinds in turn."""

    tokenizer: Tokenizer
    mask_id: int
    seed: int
    length: int = 64
    """Tokens of the facts at most."""

    def sample(self, index: int) -> Sample:
        """Row `index`, from its number alone."""
        rng = np.random.default_rng([self.seed, index])
        tokens, is_answer = self._facts(rng, KINDS[index % len(KINDS)])
        prompt: list[int] = []
        if rng.integers(2):
            example = next(tasks.examples(None, split="train", seed=self.seed, start=index))
            prompt = self.tokenizer.apply_chat(example.messages)
        if rng.integers(2):
            ends = [place for place, (here, after) in enumerate(itertools.pairwise([*is_answer, False]), start=1)
                    if here and not after]
            end = ends[int(rng.integers(len(ends)))]
            tokens[end:] = [self.mask_id] * (len(tokens) - end)
            is_answer[end:] = [False] * (len(tokens) - end)
        return Sample([*prompt, *tokens], [False] * len(prompt) + is_answer, ends=False)

    def _facts(
        self, rng: np.random.Generator, kind: Callable[[np.random.Generator], list[Segment]]
    ) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        is_answer: list[bool] = []
        while True:
            encoded = [(self.tokenizer.encode(text), learned) for text, learned in kind(rng)]
            if len(tokens) + sum(len(ids) for ids, _ in encoded) > self.length:
                return tokens, is_answer
            for ids, learned in encoded:
                tokens += ids
                is_answer += [learned] * len(ids)


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """Another source's answers as block by block decoding meets them: all before a window is given, and all behind it
    is masked and not learned. What lies far ahead can hardly be guessed, and drowns what comes next."""

    source: Source
    mask_id: int
    seed: int
    shortest: int = 8
    longest: int = 32

    def sample(self, index: int) -> Sample:
        """Example `index` with its window, from its number alone."""
        rng = np.random.default_rng([self.seed, index])
        tokens, is_answer, _ = self.source.sample(index)
        places = [place for place, learned in enumerate(is_answer) if learned]
        start = places[int(rng.integers(len(places)))]
        end = start + int(rng.integers(self.shortest, self.longest, endpoint=True))
        behind = len(tokens[end:])
        return Sample([*tokens[:end], *[self.mask_id] * behind],
                      [start <= place < end and learned for place, learned in enumerate(is_answer)], ends=False)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Two sources: of every `period` examples the last is the second's."""

    first: Source
    second: Source
    period: int

    def sample(self, index: int) -> Sample:
        """Example `index` of the mix."""
        number, place = divmod(index, self.period)
        if place == self.period - 1:
            return self.second.sample(number)
        return self.first.sample(number * (self.period - 1) + place)
