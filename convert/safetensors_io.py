"""safetensors files: headers checked before a byte of data is read, then plain reads into one's own buffer.

The data is read with `pread` and not through the library's memory map: mapped pages count as resident
memory until the kernel takes them back, and every slice of a map is copied once more. The checks are
stricter than the library's and come with the file's and the tensor's name.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import HeaderError, IndexFileError, SourceError, first_few
from convert.files import lfs_advice, open_regular, parse_json_object, read_json
from djax.errors import shown

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Cap on a header. The format allows 100 MB; 16 MiB describe 100,000 tensors and bound the memory of parsing it."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}
"""Bytes per element of the dtypes that a header may name."""
_LARGEST_READ = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a checkpoint: where it is and what it is. `offset` counts bytes from the file's start."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_raw_header(descriptor: int, file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, the offset of the data, and the file's size."""
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 64, 0)
    advice = lfs_advice(start)
    if advice is not None:
        raise HeaderError(advice, file=file)
    if size < 8 or len(start) < 8:
        raise HeaderError(f"has {size} bytes; a safetensors file has at least 8: the download is incomplete", file=file)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"announces a header of {length} bytes (at most {MAX_HEADER_BYTES}): not a safetensors file", file=file)
    if 8 + length > size:
        raise HeaderError(
            f"has {size} bytes and announces a header of {length}: truncated, download it again", file=file)
    data = os.pread(descriptor, length, 8)
    if len(data) != length:
        raise HeaderError(f"ended after {len(data)} of {length} bytes of header", file=file)
    if not data.startswith(b"{"):
        raise HeaderError("has a header that does not begin with '{': not a safetensors file", file=file)
    return parse_json_object(data, file=file, error=HeaderError), 8 + length, size


def _check_entry(key: str, entry: Any, *, file: Path, data_start: int, file_size: int) -> TensorInfo:
    """One header entry as a TensorInfo; HeaderError names what is wrong with it."""
    def wrong(message: str) -> HeaderError:
        return HeaderError(message, file=file, key=key)

    if not isinstance(entry, dict):
        raise wrong(f"its header entry is {shown(entry)}; it must be an object")
    missing = [name for name in ("dtype", "shape", "data_offsets") if name not in entry]
    if missing:
        raise wrong(f"its header entry has no {missing[0]!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"dtype: got {shown(dtype)}; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise wrong(f"shape: got {shown(shape)}; it must be a list of integers that are not negative")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise wrong(f"data_offsets: got {shown(offsets)}; it must be two integers that are not negative")
    begin, end = offsets
    if end > file_size - data_start:
        raise wrong(
            f"ends at byte {shown(end)} of the data, the file has {file_size - data_start}: truncated, "
            "download it again")
    nbytes = 0 if 0 in shape else DTYPE_BYTES[dtype]
    for size in shape:
        nbytes *= size
        if nbytes > file_size:
            raise wrong(f"shape: {shown(shape)} of {dtype} is larger than the whole file ({file_size} bytes)")
    if begin > end or end - begin != nbytes:
        raise wrong(f"data_offsets: {shown(offsets)} do not span the {nbytes} bytes of {shown(shape)} {dtype}")
    return TensorInfo(key=key, file=file, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=nbytes)


def _check_metadata(entry: Any, file: Path) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise HeaderError("must map strings to strings", file=file, key="__metadata__")


def parse_header(descriptor: int, file: Path) -> dict[str, TensorInfo]:
    """The tensors of an open safetensors file, in the order of their data.

    Raises HeaderError, naming `file` and the tensor, unless the tensors cover the data exactly: no
    overlap, no hole, no trailing byte.
    """
    header, data_start, size = _read_raw_header(descriptor, file)
    if "__metadata__" in header:
        _check_metadata(header.pop("__metadata__"), file)
    tensors = [
        _check_entry(key, entry, file=file, data_start=data_start, file_size=size) for key, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise HeaderError(
                f"data_offsets: starts at {tensor.offset - data_start} and {problem}, which ends at "
                f"{position - data_start}", file=file, key=tensor.key)
        position += tensor.nbytes
    if position != size:
        last = tensors[-1].key if tensors else None
        raise HeaderError(f"has {size - position} bytes after the last tensor", file=file, key=last)
    return {tensor.key: tensor for tensor in tensors}


def read_index(path: Path) -> dict[str, str]:
    """`weight_map` of a shard index: tensor key to file name.

    Raises IndexFileError for a name that is not a plain `*.safetensors` name: a path could lead out of
    the directory.
    """
    weight_map = read_json(path, error=IndexFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"got {shown(weight_map)}; it must map keys to files", file=path, key="weight_map")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable()
        if not plain or any(part in name for part in ("/", "\\", ":", "..")):
            raise IndexFileError(
                f"is in {shown(name)}; it must be the plain name of a .safetensors file beside the index",
                file=path, key=key)
    return weight_map


def find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and the index's weight map if there is one.

    Raises SourceError if there are none, or if it is not clear which belong to the checkpoint.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if index.exists():
        if single.exists():
            raise SourceError(f"holds both {INDEX_NAME} and {SINGLE_NAME}; remove the stale one", file=directory)
        weight_map = read_index(index)
        return [directory / name for name in sorted(set(weight_map.values()))], weight_map
    if single.exists():
        return [single], None
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise SourceError(
            f"holds {len(found)} .safetensors files ({first_few([path.name for path in found])}) and no "
            f"{INDEX_NAME} that says which belong together", file=directory)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise SourceError(
            f"holds no .safetensors file; {first_few(pickles)} may hold code and is never read: save the "
            "model as safetensors first", file=directory)
    raise SourceError("holds no .safetensors file", file=directory)


class SafetensorsReader:
    """The tensors of a directory's safetensors files, all headers checked, files open for reading.

    `tensors` maps keys to `TensorInfo`. Use it as a context manager: it closes the files.

    Raises SourceError, HeaderError or IndexFileError when constructed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        try:
            self.files, weight_map = find_shards(directory)
            for path in self.files:
                self._add(path)
            if weight_map is not None:
                self._check_index(weight_map)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        descriptor = open_regular(path)
        self._descriptors[path] = descriptor
        for key, tensor in parse_header(descriptor, path).items():
            if key in self.tensors:
                raise IndexFileError(
                    f"is in two shards, {self.tensors[key].file.name} and {path.name}", file=path, key=key)
            self.tensors[key] = tensor

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        index = self.directory / INDEX_NAME
        for key, name in weight_map.items():
            if key not in self.tensors:
                raise IndexFileError(f"is said to be in {name}, which does not hold it", file=index, key=key)
            if self.tensors[key].file.name != name:
                raise IndexFileError(
                    f"is said to be in {name}, but is in {self.tensors[key].file.name}", file=index, key=key)
        for key, tensor in self.tensors.items():
            if key not in weight_map:
                raise IndexFileError(f"is in {tensor.file.name} and not in the index", file=index, key=key)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read_into(self, key: str, start: int, out: np.ndarray) -> None:
        """Fill the C-contiguous `out` with the tensor's elements from flat index `start` on, as stored.

        Raises SourceError if the file has become shorter since its header was checked.
        """
        tensor = self.tensors[key]
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        position = tensor.offset + start * out.dtype.itemsize
        descriptor = self._descriptors[tensor.file]
        while buffer:
            count = os.preadv(descriptor, [buffer[:_LARGEST_READ]], position)
            if count == 0:
                raise SourceError("the file ended while this tensor was read", file=tensor.file, key=key)
            buffer, position = buffer[count:], position + count

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
