"""The op `attention` and the choice of its implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.cudnn import attention_cudnn
from kernels_pallas.attention.reference import attention_reference
from kernels_pallas.attention.support import (
    unsupported_by_cudnn,
    unsupported_by_mosaic_gpu,
    unsupported_by_pallas_tpu,
)
from kernels_pallas.attention.xla import attention_xla
from kernels_pallas.dispatch import Implementation, resolve
from kernels_pallas.hardware import current_platform


def _any_call(platform: str, *operands: Any) -> str | None:
    """XLA compiles these everywhere."""
    del platform, operands
    return None


def _mosaic_gpu(*operands: Any) -> Array:
    # imported where it is used: Mosaic takes half a second
    from kernels_pallas.attention.pallas_mosaic_gpu import attention_mosaic_gpu

    return attention_mosaic_gpu(*operands)


def _pallas_tpu(*operands: Any) -> Array:
    from kernels_pallas.attention.pallas_tpu import attention_pallas_tpu

    return attention_pallas_tpu(*operands)


IMPLEMENTATIONS = {
    "reference": Implementation(attention_reference, _any_call),
    "xla": Implementation(attention_xla, _any_call),
    "cudnn": Implementation(attention_cudnn, unsupported_by_cudnn),
    "mosaic_gpu": Implementation(_mosaic_gpu, unsupported_by_mosaic_gpu),
    "pallas_tpu": Implementation(_pallas_tpu, unsupported_by_pallas_tpu),
}

COMPUTE_BOUND_ROWS = 192
"""Rows of one key/value head from which arithmetic takes longer than reading its keys: a key of K numbers is 4 K
bytes with its value and 4 K operations a row, and an H200 has about 190 operations for a byte (a TPU v5e 240)."""
LARGE_BIAS = 2**28
"""Bytes of mask from which cuDNN, which takes it as an array [B, 1, W, T], comes second."""


def _preference(platform: str, query: Any, key: Any) -> tuple[str, ...]:
    """Names of the implementations for these operands, best first."""
    batch, window, heads, _ = query.shape
    compute_bound = window * heads // key.shape[2] >= COMPUTE_BOUND_ROWS
    if platform == "gpu":
        wide = compute_bound and 2 * batch * window * key.shape[1] <= LARGE_BIAS
        return ("cudnn", "mosaic_gpu", "xla") if wide else ("mosaic_gpu", "cudnn", "xla")
    if platform == "tpu" and compute_bound:
        return ("pallas_tpu", "xla")
    return ("xla",)


def _check(query: Any, key: Any, value: Any, key_mask: Any, window_start: Any, block_length: int | None) -> None:
    """Raise ValueError where shapes or dtypes do not fit together."""
    if len(query.shape) != 4 or len(key.shape) != 4 or 0 in (*query.shape, *key.shape):
        raise ValueError(
            f"attention: got query {tuple(query.shape)} and key {tuple(key.shape)}; they must be [B, W, H, K] and "
            "[B, T, G, K], every axis at least 1")
    batch, window, heads, width = query.shape
    length, groups = key.shape[1:3]
    if key.shape != (batch, length, groups, width) or heads % groups:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}; with query {tuple(query.shape)} it must be ({batch}, T, G, {width}), "
            f"with G a divisor of {heads}")
    if value.shape != key.shape:
        raise ValueError(f"value: got shape {tuple(value.shape)}; it must be key's, {tuple(key.shape)}")
    if key_mask.shape not in ((batch, length), (batch, window, length)) or key_mask.dtype != jnp.bool_:
        raise ValueError(
            f"key_mask: got {key_mask.dtype} {tuple(key_mask.shape)}; it must be bool {(batch, length)}, or "
            f"{(batch, window, length)} for a mask of each query's own")
    if block_length is None and window_start is not None:
        raise ValueError("window_start: it places the window for block_length, which is None")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length: got {block_length}; it must be at least 1, or None")
    if block_length is not None and window_start is None and window != length:
        raise ValueError(
            f"window_start: block_length needs it, because the window of {window} is not the canvas of {length}")


def attention_choice(
    query: Any,
    key: Any,
    value: Any,
    *,
    key_mask: Any,
    window_start: Any = None,
    block_length: int | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """Name of the implementation that `attention` uses for these operands.

    Operands may be arrays or anything with a `shape` and a `dtype`. `platform` ("cpu", "gpu", "tpu") is the one in
    use if None.

    Raises:
        ValueError: operands do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    _check(query, key, value, key_mask, window_start, block_length)
    platform = current_platform() if platform is None else platform
    return resolve(
        "attention", IMPLEMENTATIONS, implementation=implementation,
        preference=_preference(platform, query, key), platform=platform,
        operands=(query, key, value, key_mask, block_length))


def attention(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    *,
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"],
    window_start: Int[Array, ""] | int | None = None,
    block_length: int | None = None,
    block_origin: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> Float[Array, "B W H K"]:
    """Bidirectional attention of a window's queries to a canvas: softmax(query key^T / sqrt(K)) value.

    H / G query heads share each key/value head. Scores and softmax are in float32, weights are rounded to value's
    dtype before the second product, which is accumulated in float32. A query that sees no key gives zeros.

    With `block_length` attention is causal over blocks and bidirectional inside one: query w stands at position
    window_start + w and sees key t if (t - block_origin) // block_length is at most its own block.

    Values must be finite, also outside the mask, because a weight of zero times NaN is NaN. Keys outside the mask may
    be anything, except that "cudnn" and "pallas_tpu" add the mask to the score: for these they must be finite too.

    Args:
        query: the window.
        key, value: the canvas, in the order of the cache.
        key_mask: keys that exist, for all queries or for each. Others get no weight.
        window_start: canvas position of the window's first query; the canvas' start if None. Only for block_length.
        block_length: positions of a block, or None for no causality.
        block_origin: canvas position at which a block begins.
        implementation: "reference", "xla", "cudnn", "mosaic_gpu", "pallas_tpu", or None for the best that supports
            the call on this platform (`attention_choice` says which). All are reverse-differentiable in query, key
            and value; only "reference" has a forward mode.

    Returns:
        Mixed values in value's dtype.

    Raises:
        ValueError: operands do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    name = attention_choice(
        query, key, value, key_mask=key_mask, window_start=window_start, block_length=block_length,
        implementation=implementation)
    limit = None
    if block_length is not None:
        position = jnp.arange(query.shape[1], dtype=jnp.int32) + (0 if window_start is None else window_start)
        limit = ((position - block_origin) // block_length + 1) * block_length + block_origin
    return IMPLEMENTATIONS[name].function(query, key, value, key_mask, limit)
