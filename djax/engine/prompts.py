"""Prompts as users give them, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from djax.devices.distributed import share, spans_processes
from djax.engine.program import Program
from djax.engine.tokenizer import Tokenizer
from djax.errors import ArgumentError, check_flag, shown

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or a conversation (a list of {"role", "content"})."""


def encode_prompts(
    prompts: Prompt | Sequence[Prompt], *, tokenizer: Tokenizer | None, vocab_size: int,
    allow_special_tokens: bool = False,
) -> list[list[int]]:
    """Token ids of each prompt. One prompt on its own is a batch of one.

    Texts are taken as they are; conversations go through the chat template. Control tokens written in either are
    text, unless `allow_special_tokens`.

    Raises:
        ValueError: an empty batch, an id outside the vocabulary, something that is no prompt, or text
            for a model without a tokenizer.
    """
    check_flag("allow_special_tokens", allow_special_tokens)
    prompts = jax.device_get(prompts) if isinstance(prompts, jax.Array) else prompts
    batch: list[Any] = [prompts] if _is_single(prompts) else list(prompts)
    if not batch:
        raise ArgumentError("prompts", "an empty list", allowed="at least one prompt", advice="give one")
    return [_encode(prompt, f"prompts[{index}]", tokenizer, vocab_size, allow_special_tokens)
            for index, prompt in enumerate(batch)]


def shared_prompts(
    prompts: Prompt | Sequence[Prompt] | None, *, tokenizer: Tokenizer | None, program: Program,
    call: Mapping[str, Any], allow_special_tokens: bool = False,
) -> list[list[int]]:
    """`encode_prompts`, of a mesh whose processes have them all or one of them: the others give None.

    `call` are the call's other arguments, which must be the same on all, and so must program and tokenizer.

    Raises:
        ValueError: as `encode_prompts` and `djax.distributed.share`, on every process.
    """
    def encode() -> list[list[int]]:
        return encode_prompts(prompts, tokenizer=tokenizer, vocab_size=program.config.vocab_size,  # type: ignore[arg-type]
                              allow_special_tokens=allow_special_tokens)

    shared: list[list[int]] = _shared("prompts", prompts, encode, program, tokenizer, {
        **call, "allow_special_tokens": allow_special_tokens})
    return shared


def shared_masked(
    token_ids: Sequence[Sequence[int]] | Sequence[int] | None, mask: Sequence[Sequence[bool]] | Sequence[bool] | None,
    *, tokenizer: Tokenizer | None, program: Program, call: Mapping[str, Any],
) -> tuple[list[list[int]], Sequence[Any]]:
    """Rows to fill in and their masks, by the rules of `shared_prompts`."""
    def encode() -> tuple[list[list[int]], Sequence[Any]]:
        if token_ids is None:
            raise ArgumentError("token_ids", "None", allowed="one or several lists of token ids")
        host_mask = jax.device_get(mask) if isinstance(mask, jax.Array) else mask
        rows = encode_prompts(token_ids, tokenizer=None, vocab_size=program.config.vocab_size)
        if host_mask is None:
            raise ArgumentError("mask", "None", allowed="one for each row of token_ids")
        many = len(host_mask) > 0 and isinstance(host_mask[0], Sequence | np.ndarray | jax.Array)
        return rows, host_mask if many else [host_mask]

    rows, masks = _shared("token_ids", token_ids, encode, program, tokenizer, call)
    return rows, masks


def _shared(
    name: str, value: Any, encode: Callable[[], Any], program: Program, tokenizer: Tokenizer | None,
    call: Mapping[str, Any],
) -> Any:
    mesh = program.mesh
    if mesh is None or not spans_processes(mesh):
        return encode()
    same = {**call, "mesh": repr(mesh), "rules": dict(program.rules), "config": repr(program.config),
            "kernels": repr(program.kernels), "tokenizer": None if tokenizer is None else tokenizer.size}
    return share(lambda: None if value is None else encode(), devices=mesh.devices.flat, name=name, same=same)


def check_ids(ids: Any, *, name: str, vocab_size: int) -> list[int]:
    """Token ids as a list of ints.

    Raises:
        ValueError: an entry is not an integer in [0, vocab_size).
    """
    array = np.asarray(jax.device_get(ids))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(name, shown(ids), allowed=f"a flat list of token ids, integers in [0, {vocab_size})")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise ArgumentError(name, f"token id {wrong}", allowed=f"0 to {vocab_size - 1}, the model's vocabulary")
    return [int(token) for token in array]


def _is_single(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ArgumentError(
            "prompts", shown(prompts), allowed="a text, token ids, chat messages, or a list of one of these")
    return len(prompts) > 0 and isinstance(prompts[0], int | np.integer | Mapping)


def _encode(
    prompt: Any, name: str, tokenizer: Tokenizer | None, vocab_size: int, allow_special_tokens: bool
) -> list[int]:
    is_chat = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if isinstance(prompt, str) or is_chat:
        if tokenizer is None:
            raise ArgumentError(
                name, f"{'text' if isinstance(prompt, str) else 'chat messages'}, but this checkpoint has no "
                "tokenizer.json", allowed="token ids there", advice="give them, or add the tokenizer's files")
        encode = tokenizer.encode if isinstance(prompt, str) else tokenizer.apply_chat
        prompt = encode(prompt, allow_special_tokens=allow_special_tokens)
    return check_ids(prompt, name=name, vocab_size=vocab_size)
