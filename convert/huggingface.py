"""Parameters back to the published layout: safetensors that any Hugging Face loader reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert.atomic import atomic_directory, require_space
from convert.hf_config import CONFIG_NAME, family_of
from convert.mapping import Table, TensorSlice, published_keys
from convert.safetensors_io import INDEX_NAME, SINGLE_NAME
from convert.source import write_text_files
from djax.devices.sharding import named_leaves
from djax.models.config import ModelConfig

LARGEST_FILE = 5_000_000_000
"""Bytes of tensors per file, as the hub likes them."""


def export(
    destination: str | os.PathLike[str],
    params: nnx.State | Mapping[str, object],
    *,
    config: ModelConfig,
    overwrite: bool = False,
    text_files: Path | None = None,
    largest_file: int = LARGEST_FILE,
) -> Path:
    """Write a directory with config.json and safetensors in the architecture's own keys, complete or not at all.

    Args:
        destination: a new directory, or with `overwrite` one that has a config.json.
        params: the tree of `djax.models.abstract_params(config)`, or its pure dict; fully addressable.
        config: what the parameters belong to.
        overwrite: replace what is there.
        text_files: a directory whose config.json (which then wins) and tokenizer files are copied along.
        largest_file: bytes of tensors after which another file is begun.

    Returns:
        The directory.

    Raises:
        DestinationError: it exists or cannot be written; OutOfSpaceError if the disk is too small. Then nothing
            has changed.
    """
    target = Path(destination).expanduser().resolve()
    leaves = named_leaves(params)
    with atomic_directory(target, overwrite=overwrite, marker=CONFIG_NAME) as temporary:
        require_space(target, sum(leaf.nbytes for leaf in leaves.values()))
        groups = list(_groups(family_of(config, file=target).table, leaves, largest_file))
        names = [SINGLE_NAME] if len(groups) == 1 else [
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        for name, group in zip(names, groups, strict=True):
            save_file({key: _tensor(leaves, parts) for key, parts in group.items()}, temporary / name,
                      metadata={"format": "pt"})
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(leaf.nbytes for leaf in leaves.values())},
                     "weight_map": {key: name for name, group in zip(names, groups, strict=True) for key in group}}
            (temporary / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
        write_text_files(temporary, config, source=text_files)
    return target


_Part = tuple[str, TensorSlice]
"""A parameter's name, and what it is of a tensor."""


def _groups(table: Table, leaves: Mapping[str, jax.Array], largest: int) -> Iterator[dict[str, list[_Part]]]:
    """Checkpoint keys, file by file, and what fills the rows of each, from the first on."""
    tensors: dict[str, list[_Part]] = {}
    for name, leaf in leaves.items():
        for share in published_keys(table, name, leaf.shape):
            tensors.setdefault(share.key, []).append((name, share))
    group: dict[str, list[_Part]] = {}
    size = 0
    for key, parts in tensors.items():
        nbytes = sum(leaves[name].dtype.itemsize * int(np.prod(share.shape)) for name, share in parts)
        if group and size + nbytes > largest:
            yield group
            group, size = {}, 0
        group[key], size = sorted(parts, key=lambda part: part[1].order), size + nbytes
    yield group


def _tensor(leaves: Mapping[str, jax.Array], parts: list[_Part]) -> np.ndarray:
    arrays = []
    for name, share in parts:
        leaf = leaves[name] if share.index is None else leaves[name][share.index]
        arrays.append(np.ascontiguousarray(jax.device_get(leaf)).reshape(share.shape))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
