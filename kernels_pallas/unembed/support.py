"""Calls that the kernels support. Apart from them, so that asking imports none."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.configs import load_config
from kernels_pallas.hardware import device_kind, without_hopper
from kernels_pallas.unembed.types import Call

MOSAIC_COLUMNS = 64
"""D that the GPU kernel takes at a time: 128 bytes, the width of a swizzled row."""
MOSAIC_WARPGROUPS = 2
"""That compute; each has its own ids of a tile."""
MOSAIC_ROWS = 64
"""Rows of one wgmma."""
MOSAIC_TILE_ROWS = 8
"""Height of a swizzled tile: the head has a multiple of it, because padding would copy all of it at each call."""
TPU_LANES = 128
MAX_FORBIDDEN = 16
"""Ids that a kernel compares each id with."""


def mosaic_config(rows: int) -> dict[str, int]:
    """The GPU kernel's numbers for N rows."""
    regime = "mosaic_gpu" if rows > MOSAIC_ROWS else "mosaic_gpu_few_rows"
    return load_config("unembed", device_kind=device_kind(), regime=regime)


def any_call(platform: str, call: Call) -> str | None:
    """XLA compiles these everywhere."""
    del platform, call
    return None


def unsupported_by_mosaic_gpu(platform: str, call: Call) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    reason = without_hopper(platform)
    if reason is not None:
        return reason
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11, got {jax.__version__}"
    rows, (vocabulary, width) = call.hidden.shape[0], call.head.shape
    if call.head.dtype != jnp.bfloat16:
        return f"it takes bfloat16, got {call.head.dtype}"
    if width % MOSAIC_COLUMNS:
        return f"D must be a multiple of {MOSAIC_COLUMNS}, got {width}"
    least = MOSAIC_WARPGROUPS * mosaic_config(rows)["ids"]
    if vocabulary < least:
        return f"the vocabulary must have at least {least} ids, got {vocabulary}"
    if vocabulary % MOSAIC_TILE_ROWS:
        return f"the vocabulary must be a multiple of {MOSAIC_TILE_ROWS} ids, got {vocabulary}"
    return _unsupported_by_kernels(call)


def unsupported_by_pallas_tpu(platform: str, call: Call) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    if platform != "tpu":
        return f"it needs a TPU, got {platform}"
    if call.head.shape[1] % TPU_LANES:
        return f"D must be a multiple of {TPU_LANES}, got {call.head.shape[1]}"
    if call.head.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, got {call.head.dtype}"
    return _unsupported_by_kernels(call)


def _unsupported_by_kernels(call: Call) -> str | None:
    if call.embedding is not None:
        return "the expected embedding is not supported: its [N, D2] float32 sum has no room beside the tiles"
    if call.forbidden is not None and call.forbidden.shape[0] > MAX_FORBIDDEN:
        return f"up to {MAX_FORBIDDEN} ids may be forbidden, got {call.forbidden.shape[0]}"
    return None
