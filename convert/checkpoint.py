"""Converted checkpoints: an Orbax tree, a manifest with digests, and the tokenizer's files.

A directory holds `params/` (Orbax, a plain nested dict that any Orbax user can restore), `config.json`, the
tokenizer's files and `manifest.json`, which lists every file with its digest and is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from convert.atomic import as_destination_error, atomic_directory, require_space
from convert.errors import CheckpointError, SourceError, TensorShapeError
from convert.files import file_digests, read_json, sha256
from convert.hf_config import hf_fields, model_config
from convert.source import write_text_files
from djax import __version__
from djax.devices.distributed import PeerError, processes, share
from djax.devices.sharding import LogicalAxes, Rules, named_leaves, shardings
from djax.errors import first_line, shown
from djax.models import abstract_params, logical_axes
from djax.models.config import DTYPES, ModelConfig

MANIFEST_NAME = "manifest.json"
PARAMS_NAME = "params"
_FORMAT = "djax-checkpoint"
_VERSION = 1
_IN_FLIGHT_BYTES = 256 * 1024 * 1024
"""Orbax's bound on bytes between devices and disk, or the largest parameter if that is larger."""
_CHUNK_BYTES = 32 * 1024 * 1024
_SPARE_BYTES = 64 * 1024 * 1024


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to a nested dict with string keys."""
    return unflatten_dict(leaves, sep=".")


def _checkpointer(leaves: Iterable[Any], devices: set[jax.Device]) -> ocp.Checkpointer:
    """Orbax for the processes of `devices`, which all use it, and no others."""
    # parameters may be stored in four bytes and wanted in two
    largest = max(math.prod(leaf.shape) for leaf in leaves) * 4
    gigabytes = (max(_IN_FLIGHT_BYTES, largest) + 1) / 1e9
    taking_part = processes(devices)
    options = ocp.options.MultiprocessingOptions(primary_host=taking_part[0], active_processes=set(taking_part))
    # Weights hardly compress (a quarter at most) and it takes ten times as long to write them.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes, use_compression=False,
            multiprocessing_options=options),
        multiprocessing_options=options)


def _chunks(axes: LogicalAxes) -> ocp.SaveArgs:
    """Chunks of one expert or head each, so that a device which holds some of them reads these only. (Of an axis that
    is named here Orbax makes as many chunks as it is long, and of others it splits the longest, which `ffn` is not: a
    device that holds a part of each expert reads them whole, unless the parameters were saved from such devices.)"""
    apart = tuple(index for index, name in enumerate(axes) if name in ("experts", "heads", "kv_heads"))
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=apart)


def nbytes(leaf: Any) -> int:
    """Bytes of a parameter, which may be abstract."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def is_converted(directory: Path) -> bool:
    """Whether a directory is one that `save` wrote."""
    return (directory / MANIFEST_NAME).is_file() and (directory / PARAMS_NAME).is_dir()


def save(
    destination: str | os.PathLike[str],
    params: nnx.State,
    *,
    config: ModelConfig,
    overwrite: bool = False,
    text_files: Path | None = None,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write parameters to a new directory, complete or not at all, and return its path.

    `text_files` is a directory whose config.json and tokenizer files are copied along; `source` goes
    into the manifest as it is. With `overwrite` a converted checkpoint that is there is replaced in one step.
    Parameters on devices of several processes are written by all of these, each its own part: all call, and see the
    same file system.

    Raises DestinationError if it exists or cannot be written, OutOfSpaceError if the disk is too small;
    then nothing has changed.
    """
    target = Path(destination).expanduser().resolve()
    leaves = named_leaves(params)
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves.values()))
    first = jax.process_index() == processes(devices)[0]

    def begin() -> str | None:
        if not first:
            return None
        temporary = stack.enter_context(atomic_directory(target, overwrite=overwrite, marker=MANIFEST_NAME))
        require_space(target, sum(nbytes(leaf) for leaf in leaves.values()) + _SPARE_BYTES)
        return str(temporary)

    def write() -> bool:
        chunked = {name: _chunks(axes) for name, axes in named_leaves(logical_axes(config)).items()}
        try:
            with _checkpointer(leaves.values(), devices) as checkpointer:
                checkpointer.save(
                    temporary / PARAMS_NAME, ocp.args.PyTreeSave(_nested(leaves), save_args=_nested(chunked)))
        except Exception as error:  # Orbax and TensorStore raise several kinds for a failed write
            raise as_destination_error(error, target) from error
        return True

    def complete() -> bool | None:
        if not first:
            return None
        write_text_files(temporary, config, source=text_files)
        manifest = _manifest(temporary, leaves, config, source or {})
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")
        stack.close()
        return True

    # Each step waits for all processes and fails in all of them, where the first then removes what it made.
    with contextlib.ExitStack() as stack:
        try:
            temporary = Path(share(begin, devices=devices, name="temporary directory"))
            share(write, devices=devices, name="parameters")
            share(complete, devices=devices, name="manifest")
        except PeerError as error:
            raise as_destination_error(error, target) from error
    return target


def _manifest(
    directory: Path, leaves: Mapping[str, Any], config: ModelConfig, source: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "djax": __version__,
        "config": hf_fields(config),
        "dtype": config.dtype,
        "parameter_count": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "parameters": {name: list(leaf.shape) for name, leaf in leaves.items()},
        "source": dict(source),
        "files": file_digests(sorted(path for path in directory.rglob("*") if path.is_file()), directory),
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint, its list of files compared with the directory by size.

    Raises SourceError if it is not a manifest of this version, or a file is missing or has another size.
    """
    path = directory / MANIFEST_NAME
    manifest = read_json(path, error=SourceError)
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise SourceError(
            f"format and version: got {shown(manifest.get('format'))} and {shown(manifest.get('version'))}; "
            f"read is {_FORMAT!r} version {_VERSION}", file=path)
    for name, kind in (("config", dict), ("parameters", dict), ("files", dict), ("dtype", str)):
        if not isinstance(manifest.get(name), kind):
            raise SourceError(f"got {shown(manifest.get(name))}; convert the checkpoint again", file=path, key=name)
    if manifest["dtype"] not in DTYPES:
        raise SourceError(f"got {shown(manifest['dtype'])}; allowed are {', '.join(DTYPES)}", file=path, key="dtype")
    for name, entry in manifest["files"].items():
        file = directory / name
        if name.startswith("/") or ".." in Path(name).parts or not isinstance(entry, dict):
            raise SourceError("is not a file of this directory", file=path, key=name)
        if not file.is_file() or file.stat().st_size != entry.get("bytes"):
            raise SourceError("is missing or has another size than the manifest says; convert it again", file=file)
    return manifest


def stored_config(manifest: Mapping[str, Any], directory: Path) -> ModelConfig:
    """The configuration in a manifest; its dtype is that of the stored parameters. Raises ConfigError."""
    return dataclasses.replace(
        model_config(manifest["config"], file=directory / MANIFEST_NAME), dtype=manifest["dtype"])


def verify(directory: str | os.PathLike[str]) -> None:
    """Compare every file of a converted checkpoint with the manifest's digest; SourceError at the first difference."""
    root = Path(directory).resolve()
    for name, entry in read_manifest(root)["files"].items():
        if sha256(root / name) != entry.get("sha256"):
            raise SourceError("has another content than the manifest says; convert it again", file=root / name)


def restore(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[ModelConfig, nnx.State]:
    """Parameters of a converted checkpoint, in any dtype and under any sharding; each device reads its part. All
    processes of a mesh call it together.

    Arguments and result as in `convert.load_params`. Raises CheckpointError if the directory is incomplete
    or does not hold this configuration's parameters.
    """
    root = Path(directory).resolve()
    manifest = read_manifest(root)
    config = config or stored_config(manifest, root)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    abstract = checked_params(config, manifest, root)
    wanted = placed_params(config, abstract, mesh=mesh, rules=rules)
    target = _nested(wanted)
    devices = set().union(*(leaf.sharding.device_set for leaf in wanted.values()))
    try:
        with _checkpointer(wanted.values(), devices) as checkpointer:
            tree = checkpointer.restore(root / PARAMS_NAME, ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)))
    except Exception as error:  # Orbax and TensorStore raise several kinds for a damaged file
        raise SourceError(f"cannot be restored: {first_line(error)}", file=root / PARAMS_NAME) from error
    leaves = named_leaves(tree)
    return config, jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


def checked_params(config: ModelConfig, manifest: Mapping[str, Any], directory: Path) -> nnx.State:
    """`abstract_params(config)`; CheckpointError unless the manifest lists exactly these parameters and shapes."""
    path, stored = directory / MANIFEST_NAME, manifest["parameters"]
    # Every layer has parameters of its own: checked first, so that a wrong count costs no memory.
    if config.num_layers > len(stored):
        raise CheckpointError(
            f"the configuration has {config.num_layers} layers and the checkpoint {len(stored)} parameters", file=path)
    abstract = abstract_params(config)
    wanted = named_leaves(abstract)
    for name in sorted(set(wanted) ^ set(stored)):
        problem = "is not in the checkpoint" if name in wanted else "is not a parameter of this configuration"
        raise CheckpointError(problem, file=path, key=name)
    for name, leaf in wanted.items():
        if list(leaf.shape) != stored[name]:
            raise TensorShapeError(
                f"shape: got {shown(stored[name])}; the configuration says {list(leaf.shape)}",
                file=path, key=name)
    return abstract


def placed_params(
    config: ModelConfig, abstract: nnx.State, *, mesh: Mesh | None, rules: Rules | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter by name, in the tree's order."""
    placed = shardings(logical_axes(config), abstract, mesh=mesh, rules=rules)
    return named_leaves(jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placed))
