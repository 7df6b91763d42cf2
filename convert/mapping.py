"""Exactly-once mapping between checkpoint keys and parameters.

A table of `Rule`s says which key fills which parameter. `fill` applies it to the keys that a checkpoint
holds and checks that every element of every tensor is used once and every parameter is filled once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from convert.errors import (
    MappingError,
    MissingKeyError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
    first_few,
)
from djax.errors import shown

FLOAT_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""safetensors dtypes that parameters are read from, and their NumPy names."""


class Tensor(Protocol):
    """The facts about a checkpoint tensor that the mapping reads."""

    @property
    def file(self) -> Path: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table: checkpoint key pattern to parameter.

    `key` and `leaf` are dotted names in which `{layer}` and `{expert}` stand for a number. A key with
    `{expert}` fills one index of the parameter's first axis.
    """

    key: str
    leaf: str
    merge: tuple[int, ...] | None = None
    """Number of the parameter's axes that each checkpoint axis spans, in order; None: one each."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the parameter is the i-th of n equal parts of the checkpoint's second last axis."""
    stacked: bool = False
    """Whether the tensor holds the rows of several parameters, one after the other in the order of their rules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The map from an architecture's checkpoints to its parameters."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    """Key patterns that no parameter needs (buffers that old files hold)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A contiguous run of a checkpoint tensor that fills a contiguous run of a parameter.

    The elements from flat index `start` of tensor `key` on fill `parameter[index]`, or the whole
    parameter where `index` is None.
    """

    key: str
    start: int
    index: int | None


Filling = Mapping[str, tuple[Piece, ...]]
"""Parameter name to the pieces that fill it."""


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    number = r"(0|[1-9][0-9]{0,5})"
    return re.compile(
        re.escape(text).replace(r"\{layer\}", f"(?P<layer>{number})").replace(r"\{expert\}", f"(?P<expert>{number})"))


def _stored_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the checkpoint tensor must have to fill a parameter (or one index of it) of `shape`."""
    if rule.merge is None:
        stored = shape
    else:
        ends = [sum(rule.merge[: position + 1]) for position in range(len(rule.merge))]
        stored = tuple(math.prod(shape[end - count : end]) for end, count in zip(ends, rule.merge, strict=True))
    if rule.part[1] > 1:
        stored = (*stored[:-2], stored[-2] * rule.part[1], stored[-1])
    return stored


def _pieces(rule: Rule, key: str, expert: int | None, shape: tuple[int, ...], start: int) -> list[Piece]:
    """Places of the elements of tensor `key` in a parameter of `shape`; those of a stacked one begin at `start`."""
    part, parts = rule.part
    if parts == 1:
        return [Piece(key=key, start=start, index=expert)]
    each = math.prod(shape[1:])
    return [Piece(key=key, start=(index * parts + part) * each, index=index) for index in range(shape[0])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """The piece of a checkpoint tensor that is a parameter, or one index of its first axis."""

    key: str
    index: int | None
    """None where the tensor holds the whole parameter."""
    shape: tuple[int, ...]
    """The parameter's elements as the tensor holds them."""
    order: int
    """Parameters that come first in a tensor in which several are stacked."""


def published_keys(table: Table, leaf: str, shape: tuple[int, ...]) -> Iterator[TensorSlice]:
    """The tensors that hold a parameter in a table's first layout.

    Raises MissingKeyError if the table has no rule for it.
    """
    for order, rule in enumerate(table.rules):
        match = _pattern(rule.leaf).fullmatch(leaf)
        if match is None:
            continue
        key = rule.key.replace("{layer}", match.groupdict().get("layer") or "")
        if "{expert}" not in key:
            yield TensorSlice(key=key, index=None, shape=_stored_shape(rule, shape), order=order)
            return
        for index in range(shape[0]):
            yield TensorSlice(key=key.replace("{expert}", str(index)), index=index,
                              shape=_stored_shape(rule, shape[1:]), order=order)
        return
    raise MissingKeyError("missing: a rule that fills this parameter", key=leaf)


def _uses(table: Table, key: str, leaves: Mapping[str, tuple[int, ...]]) -> list[tuple[Rule, str, int | None]]:
    """(rule, parameter, expert) for every rule that the key obeys and whose parameter exists."""
    result = []
    for rule in table.rules:
        match = _pattern(rule.key).fullmatch(key)
        if match is None:
            continue
        numbers = match.groupdict()
        leaf = rule.leaf.replace("{layer}", numbers.get("layer") or "")
        expert = int(numbers["expert"]) if numbers.get("expert") else None
        if leaf in leaves and (expert is None or expert < leaves[leaf][0]):
            result.append((rule, leaf, expert))
    return result


def _check_tensor(key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise TensorDtypeError or TensorShapeError unless `tensor` is of a float dtype and the expected shape."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TensorDtypeError(
            f"dtype: got {tensor.dtype}; read are {', '.join(FLOAT_DTYPES)} (quantised checkpoints are not)",
            file=tensor.file, key=key)
    if tensor.shape != expected:
        raise TensorShapeError(
            f"shape: got {shown(tensor.shape)}; the configuration says {expected}", file=tensor.file, key=key)


def _check_filled(
    table: Table, leaves: Mapping[str, tuple[int, ...]], found: Mapping[str, list[Piece]], source: Path
) -> None:
    """Raise MissingKeyError unless every parameter is filled, MappingError if one is filled twice."""
    missing: dict[str, None] = {}
    count = 0
    for leaf, shape in leaves.items():
        pieces = found.get(leaf, [])
        indices = [piece.index for piece in pieces]
        if len(set(indices)) < len(indices) or (None in indices and len(indices) > 1):
            keys = sorted({piece.key for piece in pieces})
            raise MappingError(f"fills {leaf}, which {first_few(keys[1:] or keys)} fills too", file=source, key=keys[0])
        if indices != [None] and len(indices) < shape[0]:
            have = set(indices)
            absent = [share.key for share in published_keys(table, leaf, shape) if share.index not in have]
            count += len(absent) if absent[0] not in missing else 0  # one that several parameters are stacked in, once
            missing |= dict.fromkeys(absent[:4])
    if missing:
        names = list(missing)
        raise MissingKeyError(
            f"missing: {count} keys that the configuration asks for, such as {first_few(names[:3])}",
            file=source, key=names[0])


def fill(
    table: Table, tensors: Mapping[str, Tensor], leaves: Mapping[str, tuple[int, ...]], *, source: Path
) -> Filling:
    """The runs of tensors that fill each parameter.

    `leaves` maps parameter names to shapes; `source` is named in errors about the whole checkpoint.

    Raises UnexpectedKeyError, MissingKeyError, TensorShapeError, TensorDtypeError or MappingError. On
    success every element of every tensor that is not ignored is used once, and every parameter is filled once.
    """
    found: dict[str, list[Piece]] = {}
    unexpected: list[str] = []
    for key, tensor in tensors.items():
        uses = _uses(table, key, leaves)
        if not uses:
            if not any(_pattern(pattern).fullmatch(key) for pattern in table.ignored):
                unexpected.append(key)
            continue
        used = 0
        rows = sum(_stored_shape(rule, leaves[leaf])[0] for rule, leaf, _ in uses if rule.stacked)
        for rule, leaf, expert in uses:
            shape = leaves[leaf] if expert is None else leaves[leaf][1:]
            own = _stored_shape(rule, shape)
            _check_tensor(key, tensor, (rows, *own[1:]) if rule.stacked else own)
            found.setdefault(leaf, []).extend(_pieces(rule, key, expert, shape, used if rule.stacked else 0))
            used += math.prod(shape)
        if used != math.prod(tensor.shape):
            raise MappingError(f"{used} of its {math.prod(tensor.shape)} elements are used", file=tensor.file, key=key)
    if unexpected:
        raise UnexpectedKeyError(
            f"not expected: {len(unexpected)} keys fill no parameter of this configuration: {first_few(unexpected)}",
            file=tensors[unexpected[0]].file, key=unexpected[0])
    _check_filled(table, leaves, found, source)
    return {leaf: tuple(sorted(found[leaf], key=lambda piece: piece.index or 0)) for leaf in leaves}
