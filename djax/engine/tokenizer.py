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

from djax.errors import ArgumentError, check_choice, shown

ROLES = ("system", "user", "assistant")
MASK_TOKEN = "<|mask|>"
"""The mask in LLaDA's tokenizers."""
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
        raise ArgumentError("messages", shown(messages), allowed='a list of {"role": ..., "content": ...}',
                            advice="wrap a single message in a list")
    if not messages:
        raise ArgumentError("messages", "an empty list", allowed="at least one message", advice="add a user message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ArgumentError(where, shown(message), allowed='{"role": ..., "content": ...}')
        for field in ("role", "content"):
            if field not in message:
                got = ", ".join(sorted(map(repr, message))) or "no fields"
                raise ArgumentError(f"{where}.{field}", f"nothing (only {got})", allowed="a text", advice="add it")
            if not isinstance(message[field], str):
                raise ArgumentError(f"{where}.{field}", shown(message[field]), allowed="a text")
        check_choice(f"{where}.role", message["role"], ROLES)
        if message["role"] == "system" and index:
            raise ArgumentError(f"{where}.role", "'system'", allowed="user, assistant",
                                advice="a system message can only be the first one")


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
                raise ArgumentError("tokenizer", f"{file}, a git-lfs pointer", allowed="the file itself",
                                    advice="fetch it with 'git lfs pull'")
        try:
            with _quiet_transformers():
                from transformers import PreTrainedTokenizerFast
            # The class is named here: tokenizer_config.json's auto_map never decides which code runs.
            return cls(PreTrainedTokenizerFast.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False))
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise ArgumentError("tokenizer", f"{file}, which cannot be read ({shown(str(error))})",
                                allowed="a Hugging Face fast tokenizer", advice="fetch the file again") from error

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

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: the mask, ends, role marks and the like."""
        return frozenset(token for token, added in self.backend.added_tokens_decoder.items() if added.special)

    def encode(self, text: str, *, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added to it.

        Control tokens that are written in it, such as `<|role_end|>` or the mask, are encoded as the text they are:
        what users write must not end a turn or open a mask. With `allow_special_tokens` they become control tokens.

        Raises:
            ValueError: `text` is not a text, or not representable in UTF-8.
        """
        if not isinstance(text, str):
            raise ArgumentError("text", shown(text), allowed="a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError("text", f"a lone surrogate at character {error.start}", allowed="valid Unicode",
                                advice="read the input as UTF-8") from error
        return list(self.backend.encode(
            text, add_special_tokens=False, split_special_tokens=not allow_special_tokens))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless `skip_special` is False.

        Ids without a token (vocabulary padding) have no text. Bytes that are no valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative.
        """
        return self.backend.decode(
            self.known(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def known(self, ids: Iterable[int]) -> list[int]:
        """The ids that have a token: all but the vocabulary's padding.

        Raises:
            ValueError: an id is negative.
        """
        numbers = [int(number) for number in ids]
        if numbers and min(numbers) < 0:
            raise ArgumentError("ids", min(numbers), allowed="non-negative token ids")
        return [number for number in numbers if number < self.size]

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation by the checkpoint's own template, else by LLaDA-MoE's.

        Templates are rendered by transformers in Jinja's sandbox. LLaDA-MoE's writes no newline between the parts; a
        system message goes before `\\ndetailed thinking off`.

        Raises:
            ValueError: `messages` is not a conversation, or the template refuses it.
        """
        check_messages(messages)
        try:
            return self.backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True,
                chat_template=None if self.backend.chat_template else _llada_template())
        except Exception as error:  # a template may raise anything, through Jinja or by itself
            raise ArgumentError(
                "messages", f"some that the checkpoint's chat template failed on ({shown(str(error))})",
                allowed="what it accepts", advice="change them, or give the prompt as text or token ids") from error

    def apply_chat(self, messages: Sequence[Message], *, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of `chat_text(messages)`: only the template's own control tokens, unless others are allowed.

        A conversation without any in its messages has the ids of its text as a whole. Otherwise each message is
        encoded as text, and the template around it apart.

        Raises:
            ValueError: `messages` is not a conversation, the template refuses it, or it changes messages that hold
                control tokens, so that they cannot be told from its own.
        """
        text = self.chat_text(messages)
        ids = self.encode(text, allow_special_tokens=True)
        if allow_special_tokens:
            return ids
        pieces = self._pieces(messages)
        own = [token for piece in pieces for token in self.encode(piece, allow_special_tokens=True)
               if token in self.special_ids]
        if [token for token in ids if token in self.special_ids] == own:
            return ids
        contents = [message["content"] for message in messages]
        if len(pieces) != len(contents) + 1 or text != "".join(
                part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair):
            raise ArgumentError(
                "messages", "control tokens in a message that the checkpoint's chat template changes",
                allowed="messages without control tokens there", advice="leave them out, or give token ids")
        return [token for piece, content in zip(pieces, [*contents, ""], strict=True)
                for token in (*self.encode(piece, allow_special_tokens=True), *self.encode(content))]

    def _pieces(self, messages: Sequence[Message]) -> list[str]:
        """The template's own text before, between and after the messages' contents."""
        mark = "\ue000"  # of the private use area: no template writes it, nothing strips or changes it
        while any(mark in message["content"] for message in messages):
            mark += "\ue001"
        return self.chat_text([{**message, "content": mark} for message in messages]).split(mark)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """An incremental detokenizer for one sequence."""
        return TextStream(self, skip_special=skip_special)


class TextStream:
    """Tokens to text as they come: each `push` returns text that no later token changes.

    The pieces, with `finish()` as the last, join to `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._start()

    def _start(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._decoder = DecodeStream(skip_special_tokens=self._skip_special)
        self._ids: list[int] = []
        self._emitted = 0
        """Characters of the tokens' text that are out already."""

    def push(self, ids: Iterable[int]) -> str:
        """Text that the new tokens settle; may be empty."""
        known = self._tokenizer.known(ids)
        self._ids += known
        new = "".join(self._decoder.step(self._tokenizer.backend.backend_tokenizer, token) or "" for token in known)
        self._emitted += len(new)
        return new

    def finish(self) -> str:
        """Give what was held back: bytes that stayed incomplete come out as U+FFFD. The stream is then empty."""
        new = self._tokenizer.decode(self._ids, skip_special=self._skip_special)[self._emitted:]
        self._start()
        return new


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
def _llada_template() -> str:
    from djax import assets

    return (assets.path() / "chat_template.jinja").read_text(encoding="utf-8")
