"""Data of the bundled model's last stage: answers as block by block decoding meets them."""

from __future__ import annotations

import dataclasses

import numpy as np

from djax.train.data import Sample, Source, tail_length


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """Another source's answers as block by block decoding meets them: all before a window is given, and all behind it
    is masked and not learned. What lies far ahead can hardly be guessed, and drowns what comes next. Some EOS count
    as the answer's, and how much is masked behind the window does not depend on how long the answer is."""

    source: Source
    mask_id: int
    eos_id: int
    seed: int
    shortest: int = 8
    longest: int = 32
    longest_tail: int = 16
    """Most EOS behind an answer; their number's logarithm is uniform."""
    longest_behind: int = 96
    """Most masks behind a window."""

    def sample(self, index: int) -> Sample:
        """Example `index` with its window, from its number alone."""
        rng = np.random.default_rng([self.seed, index])
        tokens, is_answer, _ = self.source.sample(index)
        tail = tail_length(self.longest_tail, rng.random())
        tokens, is_answer = [*tokens, *[self.eos_id] * tail], [*is_answer, *[True] * tail]
        places = [place for place, learned in enumerate(is_answer) if learned]
        start = places[int(rng.integers(len(places)))]
        end = min(start + int(rng.integers(self.shortest, self.longest, endpoint=True)), len(tokens))
        behind = int(rng.integers(self.longest_behind, endpoint=True))
        return Sample([*tokens[:end], *[self.mask_id] * behind],
                      [*([False] * start), *is_answer[start:end], *[False] * behind], ends=False)


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
