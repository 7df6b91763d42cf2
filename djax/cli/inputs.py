"""Input of the commands: prompts from arguments, files and standard input, and infilling templates."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from djax.engine.tokenizer import Tokenizer, check_messages
from djax.errors import ArgumentError, one_line, shown

_PLACEHOLDER = re.compile(r"\[MASK(?::([^\]]*))?\]")
_LARGEST_FILL = 65536


def read_prompts(
    prompts: list[str] | None, *, messages: str | None, token_ids: str | None, raw: bool
) -> list[Any]:
    """The batch that `generate` gets: conversations, texts (`raw`), or token ids.

    A plain text becomes a conversation of one user message unless `raw`. Without any source the prompt
    is read from standard input, unless that is a terminal.

    Raises:
        ArgumentError: more than one source or none, an unreadable file, or content of the wrong form.
    """
    given = [name for name, value in (("PROMPT", prompts), ("--messages", messages), ("--token-ids", token_ids))
             if value]
    if len(given) > 1:
        raise ArgumentError(given[1], f"{' and '.join(given)} together", allowed="one source of prompts",
                            advice="drop the others")
    if messages is not None:
        if raw:
            raise ArgumentError("--raw", "it with --messages", allowed="with plain text prompts",
                                advice="drop --raw, or give the text as PROMPT")
        return _conversations(read_json(messages, "--messages"))
    if token_ids is not None:
        if raw:
            raise ArgumentError("--raw", "it with --token-ids", allowed="with plain text prompts", advice="drop --raw")
        return _rows(read_json(token_ids, "--token-ids"), "--token-ids", _token_id, "token ids")
    texts = [read_stdin("PROMPT") if text == "-" else text for text in prompts or ["-"]]
    for text in texts:
        if not text.strip():
            raise ArgumentError("PROMPT", "an empty text", allowed="some text", advice="write one, or pipe it in")
    return list(texts) if raw else [[{"role": "user", "content": text}] for text in texts]


def read_stdin(field: str) -> str:
    """Standard input as UTF-8, without its last newline.

    Raises:
        ArgumentError: standard input is a terminal, or not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ArgumentError(field, "nothing", allowed="an argument, a file, or standard input",
                            advice="give it as an argument, or pipe it in")
    return _decoded(sys.stdin.buffer.read(), field, "standard input").removesuffix("\n").removesuffix("\r")


def read_json(source: str, field: str) -> Any:
    """The value of a JSON file, or of standard input for "-".

    Raises:
        ArgumentError: the file cannot be read, or is not JSON.
    """
    if source == "-":
        name, text = "standard input", read_stdin(field)
    else:
        name = source
        try:
            text = _decoded(Path(source).read_bytes(), field, source)
        except OSError as error:
            raise ArgumentError(
                field, f"{one_line(repr(source))} ({error.strerror or error})", allowed="a readable JSON file",
                advice="check the path") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(field, f"{name}, which is not JSON ({error})", allowed="valid JSON",
                            advice="correct it") from error


def read_template(template: str, tokenizer: Tokenizer | None, *, mask_id: int) -> tuple[list[int], list[bool]]:
    """Token ids and mask of a text with `[MASK:n]` (n positions to fill) or `[MASK]` (one) in it.

    Raises:
        ArgumentError: no placeholder, a wrong count in one, or no tokenizer.
    """
    if tokenizer is None:
        raise ArgumentError("TEMPLATE", "text for a checkpoint without tokenizer.json", allowed="token ids there",
                            advice="give --token-ids FILE with null for each masked position")
    ids: list[int] = []
    mask: list[bool] = []
    end = 0
    for found in _PLACEHOLDER.finditer(template):
        count = found[1] if found[1] is not None else "1"
        if not (count.isascii() and count.isdigit() and 1 <= int(count[:9]) <= _LARGEST_FILL):
            raise ArgumentError("TEMPLATE", shown(found[0]), allowed=f"[MASK:n] with n from 1 to {_LARGEST_FILL}",
                                advice="correct the count")
        piece = tokenizer.encode(template[end:found.start()])
        ids += piece + [mask_id] * int(count)
        mask += [False] * len(piece) + [True] * int(count)
        end = found.end()
    if not end:
        raise ArgumentError("TEMPLATE", f"{shown(template)} without a placeholder",
                            allowed="text with [MASK:n] where n tokens are to be filled in", advice="add one")
    tail = tokenizer.encode(template[end:])
    return ids + tail, mask + [False] * len(tail)


def read_masked_ids(source: str, *, mask_id: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Token ids and masks of a JSON file of ids with null for each masked position: one row or a list of rows.

    Raises:
        ArgumentError: content of the wrong form, or a row without null.
    """
    rows = _rows(read_json(source, "--token-ids"), "--token-ids", lambda value: value is None or _token_id(value),
                 "token ids and nulls")
    for index, row in enumerate(rows):
        if None not in row:
            raise ArgumentError(f"--token-ids[{index}]", "no null", allowed="null at each position to fill in",
                                advice="mark at least one")
    return ([[mask_id if value is None else value for value in row] for row in rows],
            [[value is None for value in row] for row in rows])


def _conversations(value: Any) -> list[Any]:
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise ArgumentError("--messages", shown(value), advice="correct the file",
                            allowed='a list of {"role", "content"}, or a list of such lists')
    batch = value if isinstance(value[0], list) else [value]
    for index, conversation in enumerate(batch):
        try:
            check_messages(conversation)
        except ArgumentError as error:
            place = f"--messages[{index}]" if len(batch) > 1 else "--messages"
            raise error.renamed(place + error.name.removeprefix("messages")) from error
    return batch


def _token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _rows(value: Any, field: str, accepts: Callable[[Any], bool], what: str) -> list[list[Any]]:
    """`value` as a list of rows: it is one row, or a list of rows."""
    if not isinstance(value, list) or not value:
        raise ArgumentError(field, shown(value), allowed=f"a list of {what}, or a list of such lists",
                            advice="correct the file")
    rows = value if isinstance(value[0], list) else [value]
    for index, row in enumerate(rows):
        place = f"{field}[{index}]" if rows is value else field
        if not isinstance(row, list) or not row:
            raise ArgumentError(place, shown(row), allowed=f"a list of {what} with at least one",
                                advice="correct the file")
        for position, item in enumerate(row):
            if not accepts(item):
                raise ArgumentError(f"{place}[{position}]", shown(item), allowed=what + ": integers from 0",
                                    advice="correct the file")
    return rows


def _decoded(data: bytes, field: str, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(field, f"{name} with a byte that is not UTF-8 (at {error.start})", allowed="UTF-8 text",
                            advice="convert it") from error
