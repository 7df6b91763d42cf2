"""Loading: a Hugging Face directory, a hub id or a converted checkpoint to parameters on devices."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from convert import checkpoint
from convert.errors import MissingKeyError
from convert.hf_config import CONFIG_NAME, family_of, read_config
from convert.mapping import FLOAT_DTYPES, Filling, fill
from convert.placement import read_parameters
from convert.safetensors_io import SafetensorsReader
from convert.source import refuse_other_kinds, resolve_source
from djax.devices.sharding import LogicalAxes, Rules, named_leaves
from djax.errors import check_choice
from djax.models import abstract_params, logical_axes
from djax.models.config import DTYPES, ModelConfig

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""


class Meter:
    """Adds up what has been done of `total` bytes and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a checkpoint: `keys` are the checkpoint keys that fill it, in order."""

    name: str
    shape: tuple[int, ...]
    axes: LogicalAxes
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """Contents of a checkpoint, as read from its headers."""

    directory: Path
    format: str
    """"huggingface", or "djax" for a directory that `convert` wrote."""
    config: ModelConfig
    parameters: tuple[Parameter, ...]
    ignored: tuple[str, ...]
    """Checkpoint keys that no parameter needs."""
    files: tuple[str, ...]
    bytes_per_dtype: Mapping[str, int]
    """Bytes of the stored tensors, the ignored ones too, by the name of their dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(self.bytes_per_dtype.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint:
    """An open Hugging Face directory whose headers, configuration and mapping have all been checked."""

    directory: Path
    config: ModelConfig
    reader: SafetensorsReader
    abstract: nnx.State
    """Shapes of the configuration's parameters, without a sharding."""
    filling: Filling

    @property
    def files(self) -> tuple[Path, ...]:
        """config.json and the safetensors files."""
        return (self.directory / CONFIG_NAME, *self.reader.files)


def _stored_dtype(reader: SafetensorsReader, config: ModelConfig) -> str:
    stored = {FLOAT_DTYPES.get(tensor.dtype) for tensor in reader.tensors.values()}
    only = stored.pop() if len(stored) == 1 else None
    return only or config.dtype


@contextlib.contextmanager
def open_huggingface(
    directory: Path, config: ModelConfig | None, *, dtype: str | None
) -> Iterator[HuggingFaceCheckpoint]:
    """Check a Hugging Face directory without allocating anything large; the files stay open in the block.

    Raises a CheckpointError that names the file and the key.
    """
    given = config
    refuse_other_kinds(directory)
    if config is None:
        config = read_config(directory)
    table = family_of(config, file=directory).table
    with SafetensorsReader(directory) as reader:
        # Every layer has keys of its own: checked first, so that a wrong count costs no memory.
        if config.num_layers > len(reader.tensors):
            raise MissingKeyError(
                f"the configuration has {config.num_layers} layers and the files only {len(reader.tensors)} "
                "tensors", file=directory, key="num_hidden_layers")
        chosen = dtype or (given.dtype if given is not None else _stored_dtype(reader, config))
        config = dataclasses.replace(config, dtype=chosen)
        abstract = abstract_params(config)
        shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}
        mapped = fill(table, reader.tensors, shapes, source=directory)
        yield HuggingFaceCheckpoint(
            directory=directory, config=config, reader=reader, abstract=abstract, filling=mapped)


def load_params(
    source: str | os.PathLike[str],
    config: ModelConfig | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, nnx.State]:
    """The configuration and the parameters of a checkpoint, placed on devices.

    `source` is a local Hugging Face directory, a directory that `convert` wrote, or a hub id; a local path
    goes first. `config` replaces the checkpoint's own. `dtype` (bfloat16, float16, float32) defaults to
    `config.dtype` if a config is given, else to the stored one. Without a `mesh` all parameters are on the
    default device; with one they are split by `rules` (`djax.sharding.DEFAULT_RULES`). Each device gets its
    own part and the host holds a few tensors at a time; of a mesh of several processes each reads its own part, and
    `progress` hears of that part. The returned config's dtype is the parameters', but of those that the architecture
    keeps in float32.

    Raises CheckpointError (which names the file and the key) before anything large is allocated;
    ValueError for an unknown dtype, or a mesh that does not divide a parameter.
    """
    check_choice("dtype", dtype, DTYPES, optional=True)
    directory = resolve_source(source)
    if checkpoint.is_converted(directory):
        return checkpoint.restore(directory, config, dtype=dtype, mesh=mesh, rules=rules)
    with open_huggingface(directory, config, dtype=dtype) as opened:
        return opened.config, read_state(opened, Meter(progress, opened.reader.nbytes), mesh=mesh, rules=rules)


def read_state(
    opened: HuggingFaceCheckpoint, meter: Meter, *, mesh: Mesh | None = None, rules: Rules | None = None
) -> nnx.State:
    """The parameters of an open Hugging Face directory."""
    wanted = checkpoint.placed_params(opened.config, opened.abstract, mesh=mesh, rules=rules)
    parameters = read_parameters(opened.reader, opened.filling, wanted, meter.advance)
    return jax.tree.unflatten(jax.tree.structure(opened.abstract), [parameters[name] for name in wanted])


def describe(source: str | os.PathLike[str], config: ModelConfig | None = None) -> Description:
    """Describe which checkpoint keys fill which parameter, from the headers alone. Raises as `load_params`."""
    directory = resolve_source(source)
    if checkpoint.is_converted(directory):
        return _describe_converted(directory)
    with open_huggingface(directory, config, dtype=None) as opened:
        keys = {name: tuple(dict.fromkeys(piece.key for piece in pieces)) for name, pieces in opened.filling.items()}
        used = set().union(*keys.values())
        return Description(
            directory=directory,
            format="huggingface",
            config=opened.config,
            parameters=_parameters(opened.config, opened.abstract, keys),
            ignored=tuple(key for key in opened.reader.tensors if key not in used),
            files=tuple(path.name for path in opened.reader.files),
            bytes_per_dtype=_bytes_per_dtype(
                (FLOAT_DTYPES.get(tensor.dtype, tensor.dtype), tensor.nbytes)
                for tensor in opened.reader.tensors.values()),
        )


def _describe_converted(directory: Path) -> Description:
    manifest = checkpoint.read_manifest(directory)
    config = checkpoint.stored_config(manifest, directory)
    abstract = checkpoint.checked_params(config, manifest, directory)
    leaves = named_leaves(abstract)
    return Description(
        directory=directory,
        format="djax",
        config=config,
        parameters=_parameters(config, abstract, {name: (name,) for name in leaves}),
        ignored=(),
        files=tuple(manifest["files"]),
        bytes_per_dtype=_bytes_per_dtype((leaf.dtype.name, checkpoint.nbytes(leaf)) for leaf in leaves.values()),
    )


def _parameters(config: ModelConfig, abstract: nnx.State, keys: Mapping[str, tuple[str, ...]]) -> tuple[Parameter, ...]:
    axes = named_leaves(logical_axes(config))
    return tuple(Parameter(name=name, shape=tuple(leaf.shape), axes=axes[name], keys=keys[name])
                 for name, leaf in named_leaves(abstract).items())


def _bytes_per_dtype(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for dtype, nbytes in tensors:
        total[dtype] += nbytes
    return dict(total)
