"""Text tasks: prompts drawn from a generator, and the one worked answer that each prompt has.

The answer is a function of the prompt, so "right" means equal text, and every step of it follows from the prompt and
the steps beside it. Numbers are written so that each step keeps its shape when digits are tokens of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

MARKER = "answer: "
"""Comes before the final answer, in every task."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt of a task and its worked answer, as trained."""

    task: str
    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation, which the chat template takes."""
        return [{"role": "user", "content": self.prompt}]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: how its prompts are drawn and how they are solved.

    Args:
        name: the key of the task in `TASKS`.
        draw: a prompt from a generator.
        solve: the worked answer, read off the prompt's text alone; None if the text is no prompt of the task.
    """

    name: str
    draw: Callable[[np.random.Generator], str]
    solve: Callable[[str], str | None]

    def example(self, prompt: str) -> Example:
        """The prompt with its answer.

        Raises:
            ValueError: `prompt` is none of the task's.
        """
        answer = self.solve(prompt)
        if answer is None:
            raise ValueError(
                f"prompt: got {prompt!r}; allowed what the task {self.name!r} draws; pass such a prompt unchanged")
        return Example(task=self.name, prompt=prompt, answer=answer)

    def verify(self, prompt: str, completion: str) -> bool:
        """Whether `completion`, but for white space around it, is the worked answer to `prompt`.

        Raises:
            ValueError: `prompt` is none of the task's. No completion raises.
        """
        return completion.strip() == self.example(prompt).answer

    def final(self, completion: str) -> str | None:
        """The text behind the last `MARKER`, white space around it dropped; None if nothing follows one."""
        _, marker, rest = completion.rpartition(MARKER)
        return (rest.strip() or None) if marker else None

    def verify_final(self, prompt: str, completion: str) -> bool:
        """Whether the final answer has the right text; the steps may be wrong or missing.

        Raises:
            ValueError: `prompt` is none of the task's. No completion raises.
        """
        return self.final(completion) == self.final(self.example(prompt).answer)


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """The wordings of a task's prompts, written with `fill` and read back with `parse`.

    Args:
        templates: `str.format` templates; each names every slot once.
        slots: a regular expression, without named groups, for the text of each slot.
    """

    templates: tuple[str, ...]
    slots: Mapping[str, str]

    def fill(self, rng: np.random.Generator, values: Mapping[str, str | int]) -> str:
        """One of the wordings, each as likely, with the values in its slots."""
        return self.templates[int(rng.integers(len(self.templates)))].format_map(values)

    def parse(self, prompt: str) -> dict[str, str] | None:
        """The text of each slot; None if the prompt has none of the wordings."""
        for pattern in self._patterns:
            if found := pattern.fullmatch(prompt):
                return found.groupdict()
        return None

    @functools.cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(
            re.compile("".join(
                re.escape(literal) + (f"(?P<{slot}>{self.slots[slot]})" if slot else "")
                for literal, slot, _, _ in string.Formatter().parse(template)))
            for template in self.templates)


def worked(steps: Sequence[str], final: str) -> str:
    """The text of an answer: one step a line, and the final answer after `MARKER` on the last."""
    return "\n".join([*steps, MARKER + final])


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, for good: one in twenty is held out, by the prompt's SHA-256."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0 else "train"
