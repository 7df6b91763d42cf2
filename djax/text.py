"""Text in, text out: the tokenizer and the chat template. The only file that imports transformers, lazily."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
MASK_TOKEN = "<|mask|>"
"""How LLaDA's tokenizers write the mask."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LFS_POINTER = b"version https://git-lfs"

Message = Mapping[str, str]
"""{"role": one of `ROLES`, "content": text}."""


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a checkpoint directory brings a tokenizer that djax can read (a `tokenizer.json`)."""
    return (Path(directory) / "tokenizer.json").is_file()


def check_messages(messages: Sequence[Message]) -> None:
    """Check that `messages` is one conversation: texts by known roles, at most one system message, first.

    Raises:
        ValueError: names the message and the field that is wrong, and what is allowed.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: got {_short(messages)}; allowed a list of "
                         '{"role": ..., "content": ...}; wrap a single message in a list')
    if not messages:
        raise ValueError("messages: got an empty list; allowed at least one message; add a user message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{where}: got {_short(message)}; allowed {{"role": ..., "content": ...}}')
        for field in ("role", "content"):
            if field not in message:
                got = ", ".join(sorted(map(repr, message))) or "no fields"
                raise ValueError(f"{where}.{field}: got nothing (only {got}); allowed a text; add it")
            if not isinstance(message[field], str):
                raise ValueError(f"{where}.{field}: got {_short(message[field])}; allowed a text")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}.role: got {_short(message['role'])}; allowed {', '.join(ROLES)}")
        if message["role"] == "system" and index:
            raise ValueError(f"{where}.role: got 'system'; allowed user, assistant; "
                             "a system message can only be the first one")


def render_chat(messages: Sequence[Message]) -> str:
    """LLaDA-MoE-Instruct's prompt for a conversation, ready for the assistant's next answer.

    No newline stands between the parts; a system message goes before `\\ndetailed thinking off`.

    Raises:
        ValueError: `messages` is not a conversation (`check_messages`).
    """
    check_messages(messages)
    system, turns = "", messages
    if messages[0]["role"] == "system":
        system, turns = messages[0]["content"] + "\n", messages[1:]
    names = {"user": "HUMAN", "assistant": "ASSISTANT"}
    parts = [f"<role>SYSTEM</role>{system}detailed thinking off<|role_end|>"]
    parts += [f"<role>{names[turn['role']]}</role>{turn['content']}<|role_end|>" for turn in turns]
    return "".join(parts) + "<role>ASSISTANT</role>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A thin, typed face of a Hugging Face fast tokenizer. Only data is read; nothing in it is executed."""

    backend: Any
    """A `transformers.PreTrainedTokenizerFast`."""

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint directory, read from local files only.

        Raises:
            FileNotFoundError: the directory has no tokenizer.json.
            ValueError: tokenizer.json cannot be read.
        """
        file = Path(directory) / "tokenizer.json"
        if not has_tokenizer(directory):
            raise FileNotFoundError(
                f"tokenizer: got {directory}, which has no tokenizer.json; allowed a checkpoint directory with one; "
                "copy it there from the original checkpoint, or work with token ids")
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"tokenizer: got {file}, a git-lfs pointer; allowed the file itself; "
                                 "fetch it with 'git lfs pull'")
        try:
            with _quiet_transformers():
                from transformers import PreTrainedTokenizerFast
            # The class is named here: tokenizer_config.json's auto_map never decides which code runs.
            return cls(PreTrainedTokenizerFast.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False))
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise ValueError(f"tokenizer: got {file}, which cannot be read ({_short(str(error))}); "
                             "allowed a Hugging Face fast tokenizer; fetch the file again") from error

    @functools.cached_property
    def size(self) -> int:
        """One more than the highest id that the tokenizer knows: ids from here on are vocabulary padding."""
        return max(self.backend.get_vocab().values()) + 1

    @functools.cached_property
    def mask_id(self) -> int | None:
        """Id of `<|mask|>`, or None if the tokenizer has no such token."""
        return self.backend.get_vocab().get(MASK_TOKEN)

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token, or None if the tokenizer names none."""
        return self.backend.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added to it, and special tokens written in it are recognised.

        Raises:
            ValueError: `text` is not a text, or not representable in UTF-8.
        """
        if not isinstance(text, str):
            raise ValueError(f"text: got {_short(text)}; allowed a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: got a lone surrogate at character {error.start}; allowed valid Unicode; "
                             "read the input as UTF-8") from error
        return list(self.backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless `skip_special` is False.

        Ids without a token (vocabulary padding) have no text. Bytes that are no valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative.
        """
        numbers = [int(number) for number in ids]
        if numbers and min(numbers) < 0:
            raise ValueError(f"ids: got {min(numbers)}; allowed non-negative token ids")
        return self.backend.decode([number for number in numbers if number < self.size],
                                   skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation by the checkpoint's own template, else by LLaDA-MoE's.

        A checkpoint's template is rendered by transformers in Jinja's sandbox.

        Raises:
            ValueError: `messages` is not a conversation, or the template refuses it.
        """
        check_messages(messages)
        if not self.backend.chat_template:
            return render_chat(messages)
        try:
            return self.backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything, through Jinja or by itself
            if _is_bundled_template(self.backend.chat_template):  # no Jinja here, and none needed
                return render_chat(messages)
            raise ValueError(
                f"messages: the checkpoint's chat template failed ({_short(str(error))}); allowed what it accepts; "
                "change the messages, or give the prompt as text or token ids") from error

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `chat_text(messages)`.

        Raises:
            ValueError: `messages` is not a conversation, or the template refuses it.
        """
        return self.encode(self.chat_text(messages))

    def stable_prefix(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids` as far as no later token can change it: never half a UTF-8 character.

        What may still be an unfinished character decodes to U+FFFD at the end, and is held back.
        """
        return self.decode(ids, skip_special=skip_special).rstrip(_REPLACEMENT)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """An incremental detokenizer for one sequence."""
        return TextStream(self, skip_special=skip_special)


class TextStream:
    """Tokens to text as they come: each `push` returns text that no later token changes.

    The pieces, with `finish()` as the last, join to `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        """Tokens whose text is out: the next tokens decode differently without them (leading spaces)."""
        self._pending: list[int] = []
        self._emitted = 0
        """Characters of the pending tokens' text that are out already."""

    def push(self, ids: Iterable[int]) -> str:
        """Text that the new tokens settle; may be empty."""
        self._pending += [int(number) for number in ids]
        text = self._text()
        stable = text.rstrip(_REPLACEMENT)
        new = stable[self._emitted:]
        self._emitted = max(self._emitted, len(stable))
        if stable == text and text:
            self._context, self._pending, self._emitted = self._pending, [], 0
        return new

    def finish(self) -> str:
        """What was held back: bytes that stayed incomplete come out as U+FFFD. The stream is then empty."""
        new = self._text()[self._emitted:]
        self._context, self._pending, self._emitted = [], [], 0
        return new

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special=self._skip_special)
        text = self._tokenizer.decode(self._context + self._pending, skip_special=self._skip_special)
        return text[len(before):]


_QUIET = threading.Lock()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Import transformers without its advice to install PyTorch, which djax has no use for."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    with _QUIET:
        logger.addFilter(keep)
        try:
            yield
        finally:
            logger.removeFilter(keep)


@functools.cache
def _bundled_template() -> str:
    from djax import assets

    return (assets.path() / "chat_template.jinja").read_text(encoding="utf-8")


def _is_bundled_template(template: object) -> bool:
    return isinstance(template, str) and template.strip() == _bundled_template().strip()


def _short(value: object) -> str:
    """`value` on one line of bounded length, for a message."""
    text = repr(" ".join(value.split())) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
