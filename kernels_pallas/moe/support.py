"""Calls that the implementations other than plain XLA support. Apart from them, so that asking imports no kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.hardware import without_hopper

MODEL_MULTIPLE, WIDTH_MULTIPLE = 128, 64
"""Granularity of D and F on a Hopper GPU: a row is moved by 128 threads, a product has 64 outputs and more."""
TPU_LANES = 128
"""D and F on a TPU are multiples of it."""


def unsupported_by_mosaic_gpu(platform: str, x: Any, expert_ids: Any, weights: Any, gate: Any, *_: Any) -> str | None:
    """The reason why the Mosaic GPU kernels cannot compute a call of `moe`, or None."""
    del expert_ids, weights
    reason = without_mosaic_gpu(platform)
    if reason is not None:
        return reason
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16, got {x.dtype}"
    _, width, model = gate.shape
    if model % MODEL_MULTIPLE or width % WIDTH_MULTIPLE:
        return f"D must be a multiple of {MODEL_MULTIPLE} and F of {WIDTH_MULTIPLE}, got D {model}, F {width}"
    return None


def without_mosaic_gpu(platform: str) -> str | None:
    """The reason why the Mosaic GPU kernels of the experts cannot run at all, or None."""
    if platform == "gpu" and jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11, got {jax.__version__}"
    return without_hopper(platform)


def unsupported_by_pallas_tpu(platform: str, x: Any, expert_ids: Any, weights: Any, gate: Any, *_: Any) -> str | None:
    """The reason why the TPU kernel cannot compute a call of `moe`, or None."""
    del expert_ids, weights
    if platform != "tpu":
        return f"it needs a TPU, got {platform}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, got {x.dtype}"
    _, width, model = gate.shape
    if model % TPU_LANES or width % TPU_LANES:
        return f"D and F must be multiples of {TPU_LANES}, got D {model}, F {width}"
    return None
