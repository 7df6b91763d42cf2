"""Checkpoint tensors straight to device shards.

Peak host memory is this process's part of one parameter and one chunk: every byte is read once, into the buffer of the
shard that it belongs to, and the buffer is handed to the device (on CPU without a copy). Of what other processes'
devices hold nothing is read, but for the rest of a row whose own part is shorter than a page of memory (the file system
reads whole pages), and for what lies between two own parts of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.errors import TensorDtypeError
from convert.mapping import FLOAT_DTYPES, Piece
from convert.safetensors_io import SafetensorsReader

_CHUNK_BYTES = 16 * 1024 * 1024
_SHORTEST_RUN_BYTES = 4096
"""Parts of rows of at least so many bytes are read on their own."""
_ALIGNMENT = 64
"""XLA takes over host buffers on CPU without a copy if they are aligned to this many bytes."""

Box = tuple[tuple[int, int], ...]
"""(start, stop) of a shard along every axis of its parameter."""


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of one of the names bfloat16, float16, float32."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    if index is None:
        return tuple((0, size) for size in shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _columns(boxes: list[Box], shape: tuple[int, ...], itemsize: int) -> Box:
    """The part of every row of an array that is read for these boxes: the span of their second axis, or the row if that
    is too short a run to be read on its own."""
    whole = tuple((0, size) for size in shape[1:])
    if not whole:
        return whole
    span = (min(box[1][0] for box in boxes), max(box[1][1] for box in boxes))
    run = (span[1] - span[0]) * int(np.prod(shape[2:], dtype=np.int64)) * itemsize
    return whole if run < _SHORTEST_RUN_BYTES else (span, *whole[1:])


class _Filler:
    """Reads the pieces of one parameter into the buffers of its shards on this process's devices."""

    def __init__(
        self, reader: SafetensorsReader, shape: tuple[int, ...], boxes: list[Box], dtype: np.dtype,
        progress: Callable[[int], None],
    ) -> None:
        self.reader, self.shape, self.dtype, self.progress = reader, shape, dtype, progress
        self.buffers = {box: _aligned_empty(tuple(stop - start for start, stop in box), dtype) for box in boxes}

    def fill(self, piece: Piece) -> None:
        """Read one piece. Chunks never straddle the edge of a shard along the piece's first axis."""
        shape = self.shape if piece.index is None else self.shape[1:]
        targets: list[tuple[Box, np.ndarray]] = []
        for box, buffer in self.buffers.items():
            if piece.index is None:
                targets.append((box, buffer))
            elif box[0][0] <= piece.index < box[0][1]:
                targets.append((box[1:], buffer[piece.index - box[0][0]]))
        cuts = sorted({0, shape[0], *(edge for box, _ in targets for edge in box[0])})
        for start, stop in itertools.pairwise(cuts):
            inside = [(box, buffer) for box, buffer in targets if box[0][0] <= start and stop <= box[0][1]]
            if inside:
                self._fill_rows(piece, shape, start, stop, inside)

    def _fill_rows(
        self, piece: Piece, shape: tuple[int, ...], start: int, stop: int, targets: list[tuple[Box, np.ndarray]]
    ) -> None:
        stored = numpy_dtype(FLOAT_DTYPES[self.reader.tensors[piece.key].dtype])
        columns = _columns([box for box, _ in targets], shape, stored.itemsize)
        box, buffer = targets[0]
        direct = stored == self.dtype and len(targets) == 1 and box[1:] == columns
        width = tuple(stop - start for start, stop in columns)
        step = max(1, _CHUNK_BYTES // (int(np.prod(width, dtype=np.int64)) * stored.itemsize))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            own = buffer[first - box[0][0] : last - box[0][0]]
            chunk = own if direct else np.empty((last - first, *width), stored)
            self._read_rows(piece, shape, first, columns, chunk)
            self.progress(chunk.nbytes)
            for target_box, target in () if direct else targets:
                inner = tuple(slice(start - offset, stop - offset)
                              for (start, stop), (offset, _) in zip(target_box[1:], columns, strict=True))
                rows = slice(first - target_box[0][0], last - target_box[0][0])
                self._cast(piece.key, chunk[(slice(None), *inner)], target[rows])

    def _read_rows(
        self, piece: Piece, shape: tuple[int, ...], first: int, columns: Box, out: np.ndarray
    ) -> None:
        """Fill `out` with the rows from `first` on, between `columns` of their first axis."""
        row = int(np.prod(shape[1:], dtype=np.int64))
        position = piece.start + first * row
        if out.shape[1:] == shape[1:]:
            self.reader.read_into(piece.key, position, out)
            return
        skipped = columns[0][0] * int(np.prod(shape[2:], dtype=np.int64))
        for index in range(len(out)):
            self.reader.read_into(piece.key, position + index * row + skipped, out[index])

    def _cast(self, key: str, values: np.ndarray, out: np.ndarray) -> None:
        if values.dtype == self.dtype:
            out[...] = values
            return
        with np.errstate(over="ignore"):
            out[...] = values
        if np.count_nonzero(np.isfinite(out)) != np.count_nonzero(np.isfinite(values)):
            largest = float(jnp.finfo(self.dtype).max)
            raise TensorDtypeError(
                f"holds values beyond {largest:.4g}, the largest {self.dtype.name}; convert to another dtype",
                file=self.reader.tensors[key].file, key=key)


def read_parameter(
    reader: SafetensorsReader, pieces: tuple[Piece, ...], wanted: jax.ShapeDtypeStruct, progress: Callable[[int], None]
) -> jax.Array:
    """A parameter of the shape, dtype and sharding of `wanted`, filled from the checkpoint's `pieces`.

    Only what this process's devices hold is read; `progress` is told the bytes of every read. Raises
    TensorDtypeError if a finite value is not finite in `wanted.dtype`, SourceError if a file ends early.
    """
    shape, sharding = wanted.shape, wanted.sharding
    device_boxes = {
        device: _box(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()}
    filler = _Filler(reader, shape, sorted(set(device_boxes.values())), wanted.dtype, progress)
    for piece in pieces:
        filler.fill(piece)
    shards = [jax.device_put(filler.buffers[box], device) for device, box in device_boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_parameters(
    reader: SafetensorsReader, filling: Mapping[str, tuple[Piece, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct],
    progress: Callable[[int], None],
) -> dict[str, jax.Array]:
    """Every parameter of a filling, by name, as `read_parameter`. At most two are in flight to the devices."""
    parameters: dict[str, jax.Array] = {}
    previous: jax.Array | None = None
    for name, pieces in filling.items():
        parameter = read_parameter(reader, pieces, wanted[name], progress)
        if previous is not None:
            previous.block_until_ready()
        parameters[name] = previous = parameter
    return parameters
