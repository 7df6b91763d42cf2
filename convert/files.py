"""Reading small files that may be hostile: bounded size, strict JSON, digests."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError, SourceError
from djax.errors import shown

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Cap on config.json, the shard index and a manifest. Indices of published checkpoints take 100 bytes a tensor."""
_CHUNK_BYTES = 8 * 1024 * 1024
_LFS_PREFIX = b"version https://git-lfs"


def open_regular(path: Path) -> int:
    """A read-only file descriptor of a regular file (links are followed; a pipe or device is refused).

    Raises SourceError if there is no such file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"cannot be opened: {error.strerror}", file=path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("is not a regular file", file=path)
    return descriptor


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes; SourceError otherwise."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SourceError(f"is larger than the {limit} bytes that are read of such a file", file=path)
    return data


def lfs_advice(start: bytes) -> str | None:
    """The complaint about `start`, a file's first bytes, if it is a git-lfs pointer; None if it is not."""
    if start.startswith(_LFS_PREFIX):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull` or download the file again"
    return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(name)} appears twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def parse_json_object(data: bytes, *, file: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """A JSON object, parsed strictly: UTF-8 with or without a BOM, no repeated keys, no NaN or infinity.

    Raises `error`, naming `file`, for anything else.
    """
    advice = lfs_advice(data)
    if advice is not None:
        raise error(advice, file=file)
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
            parse_float=_finite)
    except RecursionError:
        raise error("is not valid JSON: nested too deeply", file=file) from None
    except ValueError as problem:
        raise error(f"is not valid JSON: {str(problem)[:200]}", file=file) from None
    if not isinstance(value, dict):
        raise error(f"holds a JSON {type(value).__name__}; it must be an object", file=file)
    return value


def read_json(path: Path, *, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_JSON_BYTES`; `error` or SourceError otherwise."""
    return parse_json_object(read_bounded(path, MAX_JSON_BYTES), file=path, error=error)


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file; `progress` is given the number of bytes of each part read."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def file_digests(
    files: Iterable[Path], directory: Path, progress: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and digest of files by their names in `directory`, as manifests list them; `progress` as of `sha256`."""
    return {path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path, progress)}
            for path in files}
