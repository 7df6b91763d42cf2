"""Checkpoint tensors straight to device shards.

Peak host memory is one parameter and one chunk: every byte is read once, into the buffer of the shard that
it belongs to, and the buffer is handed to the device (on CPU without a copy).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from convert.errors import TensorDtypeError
from convert.mapping import FLOAT_DTYPES, Piece
from convert.safetensors_io import SafetensorsReader

_CHUNK_BYTES = 16 * 1024 * 1024
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
        tensor = self.reader.tensors[piece.key]
        stored = numpy_dtype(FLOAT_DTYPES[tensor.dtype])
        row = int(np.prod(shape[1:], dtype=np.int64))
        step = max(1, _CHUNK_BYTES // (row * stored.itemsize))
        box, buffer = targets[0]
        whole_rows = len(targets) == 1 and box[1:] == tuple((0, size) for size in shape[1:])
        for first in range(start, stop, step):
            last = min(stop, first + step)
            position = piece.start + first * row
            if whole_rows and stored == self.dtype:
                self.reader.read_into(piece.key, position, buffer[first - box[0][0] : last - box[0][0]])
            else:
                chunk = np.empty((last - first, *shape[1:]), stored)
                self.reader.read_into(piece.key, position, chunk)
                for target_box, target in targets:
                    inner = tuple(slice(*edges) for edges in target_box[1:])
                    rows = slice(first - target_box[0][0], last - target_box[0][0])
                    self._cast(piece.key, chunk[(slice(None), *inner)], target[rows])
            self.progress((last - first) * row * stored.itemsize)

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
    reader: SafetensorsReader,
    pieces: tuple[Piece, ...],
    *,
    shape: tuple[int, ...],
    dtype: str,
    sharding: Sharding,
    progress: Callable[[int], None],
) -> jax.Array:
    """A parameter of `shape` and `dtype` under `sharding`, filled from the checkpoint's `pieces`.

    Only what this process's devices hold is read; `progress` is told the bytes of every read. Raises
    TensorDtypeError if a finite value is not finite in `dtype`, SourceError if a file ends early.
    """
    device_boxes = {
        device: _box(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()}
    filler = _Filler(reader, shape, sorted(set(device_boxes.values())), numpy_dtype(dtype), progress)
    for piece in pieces:
        filler.fill(piece)
    shards = [jax.device_put(filler.buffers[box], device) for device, box in device_boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_parameters(
    reader: SafetensorsReader,
    plan: Mapping[str, tuple[Piece, ...]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    shardings: Mapping[str, Sharding],
    progress: Callable[[int], None],
) -> dict[str, jax.Array]:
    """Every parameter of a plan, by name. At most two parameters are in flight to the devices."""
    parameters: dict[str, jax.Array] = {}
    previous: jax.Array | None = None
    for name, pieces in plan.items():
        parameter = read_parameter(
            reader, pieces, shape=shapes[name], dtype=dtype, sharding=shardings[name], progress=progress)
        if previous is not None:
            previous.block_until_ready()
        parameters[name] = previous = parameter
    return parameters
