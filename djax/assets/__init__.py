"""The bundled model, a small LLaDA-MoE that learned the tasks of `djax.tasks`, with its compressed form.

`python -m djax.train.bundled` makes its files, which are read through the same path as any checkpoint. `targets` is
apart: descriptions of GPUs as XLA's compiler takes them, for `djax.plan`.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from djax.errors import ArgumentError, shown

NAMES = ("base", "compressed")
"""Bundled models; the second is the first after trajectory compression (`djax.train.trajectory`)."""
PREFIX = "djax:"
"""Before one of `NAMES`, where a checkpoint's directory or hub id could be."""


def path(name: str = "base") -> Path:
    """Directory of a bundled checkpoint.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ArgumentError("source", shown(PREFIX + name), allowed=", ".join(PREFIX + one for one in NAMES),
                            advice="pick one of them, or give a directory or a hub id")
    root = Path(str(importlib.resources.files(__name__)))
    return root if name == "base" else root / name


def resolve(source: str | Path | None) -> str | Path:
    """The directory that None ("djax:base") or "djax:NAME" stands for; anything else as it is.

    Raises:
        ValueError: no bundled checkpoint has that name, or it is no path.
    """
    if source is None:
        return path()
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError("source", shown(source), allowed="a directory, a hub id or None")
    return path(source.removeprefix(PREFIX)) if isinstance(source, str) and source.startswith(PREFIX) else source
