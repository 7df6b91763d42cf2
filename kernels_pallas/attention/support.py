"""Calls that the implementations other than plain XLA support. Apart from them, so that asking imports no kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels_pallas.hardware import without_hopper

TPU_LANES = 128
"""Keys of the TPU kernel's blocks, and the width of a head, come in multiples of it."""


def unsupported_by_cudnn(
    platform: str, query: Any, key: Any, value: Any, key_mask: Any, block_length: int | None
) -> str | None:
    """The reason why cuDNN cannot compute a call, or None."""
    del key_mask, block_length
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, got {platform}"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, got {query.dtype}"
    if query.shape[3] > 128 or query.shape[3] % 8:
        return f"a head's width must be a multiple of 8 up to 128, got {query.shape[3]}"
    if query.shape[1] % 2 or key.shape[1] % 2:
        return f"with a mask its gradient takes even lengths, got {query.shape[1]} queries and {key.shape[1]} keys"
    return _missing_cudnn()


def _missing_cudnn() -> str | None:
    # JAX asks for the library's version while it lowers the call; there is no public way to ask it beforehand
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

    try:
        check_cudnn_version()
    except RuntimeError as error:
        return str(error).rstrip(".")
    return None


def unsupported_by_mosaic_gpu(
    platform: str, query: Any, key: Any, value: Any, key_mask: Any, block_length: int | None
) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    del block_length
    reason = without_hopper(platform)
    if reason is not None:
        return reason
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, got {query.dtype}"
    if query.shape[3] not in (64, 128):
        return f"a head must be 64 or 128 wide, got {query.shape[3]}"
    if len(key_mask.shape) != 2:
        return "a mask for each query is not supported: it takes key_mask [B, T]"
    return None


def unsupported_by_pallas_tpu(
    platform: str, query: Any, key: Any, value: Any, key_mask: Any, block_length: int | None
) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    if platform != "tpu":
        return f"it needs a TPU, got {platform}"
    if query.shape[2] != key.shape[2]:
        return f"grouped heads are not supported: got {query.shape[2]} query heads to {key.shape[2]} key/value heads"
    if key.shape[1] % TPU_LANES:
        return f"keys must be a multiple of {TPU_LANES}, got {key.shape[1]}"
    if query.shape[3] % TPU_LANES:
        return f"a head's width must be a multiple of {TPU_LANES}, got {query.shape[3]}"
    if not query.dtype == key.dtype == value.dtype:
        return f"it takes one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if len(key_mask.shape) != 2 or block_length is not None:
        return "a mask for each query is not supported: it takes key_mask [B, T] and no block_length"
    return None
