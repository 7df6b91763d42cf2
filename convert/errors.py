"""Errors about a checkpoint: one type that names the file and the key."""

from __future__ import annotations

import os
from collections.abc import Sequence

from djax.errors import shown

_SHOWN = 3


def first_few(names: Sequence[str]) -> str:
    """The first few of `names` and how many more there are."""
    first = ", ".join(shown(name) for name in names[:_SHOWN])
    return first if len(names) <= _SHOWN else f"{first} and {len(names) - _SHOWN} more"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, mapped or written.

    `file` is the file (or directory) at fault, `key` the tensor or JSON field in it; None where there
    is none to name.
    """

    def __init__(self, message: str, *, file: str | os.PathLike[str] | None = None, key: str | None = None) -> None:
        self.file = None if file is None else os.fspath(file)
        self.key = key
        self.message = message
        place = [] if self.file is None else [self.file]
        if key is not None:
            place.append(shown(key))
        super().__init__(": ".join([*place, message]))


class SourceError(CheckpointError):
    """The source is not a checkpoint, or a file of it is missing, unreadable or too large."""


class HeaderError(CheckpointError):
    """A safetensors file whose header is not valid."""


class IndexFileError(CheckpointError):
    """`model.safetensors.index.json` is not valid or disagrees with the shards."""


class ConfigError(CheckpointError):
    """`config.json` lacks a field, holds a wrong value, or describes a model that is not supported."""


class MappingError(CheckpointError):
    """Checkpoint keys and parameters do not match one to one."""


class MissingKeyError(MappingError):
    """A parameter has no checkpoint key to fill it."""


class UnexpectedKeyError(MappingError):
    """A checkpoint key belongs to no parameter and is not listed as ignored."""


class TensorShapeError(MappingError):
    """A checkpoint tensor has another shape than the configuration says."""


class TensorDtypeError(MappingError):
    """A checkpoint tensor has a dtype that is not read, or a value that the target dtype cannot hold."""


class DestinationError(CheckpointError):
    """The destination cannot be written, or may not be replaced."""


class OutOfSpaceError(DestinationError):
    """The destination's file system has too little room."""
