"""The conversion itself: source to a converted checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from convert import checkpoint
from convert.atomic import check_destination, require_space
from convert.errors import DestinationError
from convert.files import file_digests
from convert.load import Meter, Progress, open_huggingface, read_state
from convert.source import resolve_source
from djax.devices.distributed import processes
from djax.devices.sharding import Rules, named_leaves
from djax.errors import check_choice
from djax.models.config import DTYPES


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a Hugging Face directory, a hub id or a converted checkpoint to `dst`, and return its path.

    `dtype` (bfloat16, float16, float32) defaults to the stored one. If this is interrupted, or the disk is
    too small, `dst` is what it was before: absent, or the complete old checkpoint. `progress` is told
    (bytes done, bytes in all) of reading, digests and writing together. The parameters go through the default
    device, or through those of a `mesh`, split by `rules`; each of its processes reads and writes its own part, and
    all call.

    Raises CheckpointError, naming the file and the key; ValueError for an unknown dtype, or a mesh that does not divide
    a parameter.
    """
    check_choice("dtype", dtype, DTYPES, optional=True)
    target = Path(dst).expanduser().resolve()
    check_destination(target, overwrite=overwrite, marker=checkpoint.MANIFEST_NAME)
    directory = resolve_source(src)
    if directory == target or target in directory.parents:
        raise DestinationError("holds the source; choose another destination", file=target)
    if checkpoint.is_converted(directory):
        config, params = checkpoint.restore(directory, dtype=dtype, mesh=mesh, rules=rules)
        files: tuple[Path, ...] = (directory / checkpoint.MANIFEST_NAME,)
        meter, written, name = Meter(None, 0), 0, directory.name
    else:
        with open_huggingface(directory, None, dtype=dtype) as opened:
            config, files = opened.config, opened.files
            written = sum(checkpoint.nbytes(leaf) for leaf in named_leaves(opened.abstract).values())
            require_space(target, written)
            meter = Meter(progress, opened.reader.nbytes + sum(path.stat().st_size for path in files) + written)
            params = read_state(opened, meter, mesh=mesh, rules=rules)
        name = directory.name if Path(src).is_dir() else os.fspath(src)
    writes_manifest = mesh is None or processes(mesh.devices.flat)[0] == jax.process_index()
    result = checkpoint.save(
        target, params, config=config, overwrite=overwrite, text_files=directory,
        source={"name": name, "files": file_digests(files, directory, meter.advance)} if writes_manifest else None)
    meter.advance(written)
    return result
