"""The op `moe` and the choice of its implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, resolve
from kernels_pallas.hardware import current_platform
from kernels_pallas.moe.pallas_mosaic_gpu import moe_mosaic_gpu, moe_quantized_mosaic_gpu
from kernels_pallas.moe.pallas_tpu import moe_pallas_tpu
from kernels_pallas.moe.quantized import DTYPES, QuantizedExperts, moe_quantized_reference, moe_quantized_xla_dense
from kernels_pallas.moe.reference import moe_reference
from kernels_pallas.moe.support import unsupported_by_mosaic_gpu, unsupported_by_pallas_tpu
from kernels_pallas.moe.xla_dense import moe_xla_dense
from kernels_pallas.moe.xla_grouped import moe_xla_grouped


def _any_call(platform: str, *operands: Any) -> str | None:
    """XLA compiles these everywhere."""
    del platform, operands
    return None


def _unsupported_quantized(platform: str, x: Any, expert_ids: Any, weights: Any, experts: Any) -> str | None:
    return unsupported_by_mosaic_gpu(platform, x, expert_ids, weights, experts.gate)


IMPLEMENTATIONS = {
    "reference": Implementation(moe_reference, _any_call),
    "xla_grouped": Implementation(moe_xla_grouped, _any_call),
    "xla_dense": Implementation(moe_xla_dense, _any_call),
    "mosaic_gpu": Implementation(moe_mosaic_gpu, unsupported_by_mosaic_gpu),
    "pallas_tpu": Implementation(moe_pallas_tpu, unsupported_by_pallas_tpu),
}
QUANTIZED_IMPLEMENTATIONS = {
    "reference": Implementation(moe_quantized_reference, _any_call),
    "xla_dense": Implementation(moe_quantized_xla_dense, _any_call),
    "mosaic_gpu": Implementation(moe_quantized_mosaic_gpu, _unsupported_quantized),
}

FEW_ROWS = 128
"""Up to it an accelerator is bound by reading the weights, whether every expert sees every row or not."""


def _preference(platform: str, num_rows: int) -> tuple[str, ...]:
    """Best first. A loop with a dynamic trip count is driven by the host of an accelerator: no "xla_grouped"."""
    if platform == "cpu":  # bound by arithmetic: only the rows that were routed
        return ("xla_grouped",)
    if platform == "gpu":
        return ("mosaic_gpu", "xla_dense")
    return ("xla_dense",) if num_rows <= FEW_ROWS else ("pallas_tpu", "xla_dense")


def _check(x: Any, expert_ids: Any, weights: Any, gate: Any, up: Any, down: Any) -> None:
    """Raise ValueError where shapes or dtypes do not fit together."""
    if len(x.shape) != 2 or len(gate.shape) != 3 or len(expert_ids.shape) != 2:
        raise ValueError(
            f"moe: got x {x.shape}, expert_ids {expert_ids.shape}, gate {gate.shape}; they must be "
            "[M, D], [M, k] and [E, F, D]: fold batch axes into M")
    num_experts, width, model = gate.shape
    expected = {
        "x": (x, (x.shape[0], model)),
        "expert_ids": (expert_ids, (x.shape[0], expert_ids.shape[1])),
        "weights": (weights, tuple(expert_ids.shape)),
        "up": (up, (num_experts, width, model)),
        "down": (down, (num_experts, model, width)),
    }
    for name, (array, shape) in expected.items():
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}; with x {tuple(x.shape)}, expert_ids "
                f"{tuple(expert_ids.shape)} and gate {tuple(gate.shape)} it must be {shape}")
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise ValueError(f"expert_ids: got dtype {expert_ids.dtype}; they are integers in [0, {num_experts})")
    if 0 in (*x.shape, *expert_ids.shape, *gate.shape):
        raise ValueError(
            f"moe: got x {tuple(x.shape)}, expert_ids {tuple(expert_ids.shape)}, gate {tuple(gate.shape)}; "
            "every axis must be at least 1")


def moe_choice(
    x: Any,
    expert_ids: Any,
    weights: Any,
    gate: Any,
    up: Any,
    down: Any,
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """Name of the implementation that `moe` uses for these operands.

    Operands may be arrays or anything with a `shape` and a `dtype`. `platform` ("cpu", "gpu", "tpu") is the
    one in use if None.

    Raises:
        ValueError: operands do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    operands = (x, expert_ids, weights, gate, up, down)
    _check(*operands)
    if not x.dtype == gate.dtype == up.dtype == down.dtype:
        raise ValueError(
            f"x: got dtypes x {x.dtype}, gate {gate.dtype}, up {up.dtype}, down {down.dtype}; they must be "
            "one dtype: cast x to the weights'")
    platform = current_platform() if platform is None else platform
    return resolve(
        "moe", IMPLEMENTATIONS, implementation=implementation,
        preference=_preference(platform, x.shape[0]), platform=platform, operands=operands)


def moe(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Each row's weighted sum over its experts: sum_j weights[m, j] * down_e(silu(gate_e x_m) * (up_e x_m)).

    Here e = expert_ids[m, j], and the three projections are matrices in the checkpoint's order (rows are
    outputs), so that nothing is transposed. Products are accumulated in float32, hidden units rounded to
    x's dtype between the projections, the sum over experts taken in float32. ("mosaic_gpu" also rounds what each
    expert gives to x's dtype before it is weighted.)

    An expert id outside [0, E) selects no expert and contributes zero (a shard of the experts can be given
    ids relative to its first one); an id that occurs twice in a row counts twice. Rows do not touch each
    other: a NaN stays in its row.

    XLA's implementations are split over devices like any other operation. The kernels are not: there, call `moe` inside
    `jax.shard_map(..., check_vma=False)` on a device's own experts, or on its own part of F, and sum the results.

    Args:
        x: rows, in the weights' dtype.
        expert_ids: integers.
        weights: router weights, used as they are (no normalisation).
        gate, up, down: expert weights.
        implementation: "reference", "xla_grouped", "xla_dense", "mosaic_gpu" (Hopper, bfloat16), "pallas_tpu", or
            None for the best on this platform (`moe_choice` says which). All are reverse-differentiable in
            everything but `expert_ids`; only "reference" and "xla_dense" have a forward mode.

    Returns:
        Rows in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    name = moe_choice(x, expert_ids, weights, gate, up, down, implementation=implementation)
    return IMPLEMENTATIONS[name].function(x, expert_ids, weights, gate, up, down)


def moe_quantized_choice(
    x: Any,
    expert_ids: Any,
    weights: Any,
    experts: QuantizedExperts,
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """Name of the implementation that `moe_quantized` uses for these operands; see `moe_choice`.

    Raises:
        ValueError: operands do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    _check(x, expert_ids, weights, *experts[:3])
    names = [str(jnp.dtype(matrix.dtype)) for matrix in experts[:3]]
    if names[0] not in DTYPES or len(set(names)) > 1:
        raise ValueError(
            f"experts: got dtypes {', '.join(names)}; they must be one of {', '.join(DTYPES)}, all the same")
    for name, matrix, scale in zip(QuantizedExperts._fields[3:], experts[:3], experts[3:], strict=True):
        if tuple(scale.shape) != tuple(matrix.shape[:2]) or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name}: got {scale.dtype} {tuple(scale.shape)}; it must be float32 {tuple(matrix.shape[:2])}")
    platform = current_platform() if platform is None else platform
    return resolve(
        "moe_quantized", QUANTIZED_IMPLEMENTATIONS, implementation=implementation,
        preference=("mosaic_gpu", "xla_dense"), platform=platform, operands=(x, expert_ids, weights, experts))


def moe_quantized(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: QuantizedExperts,
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """`moe` with expert weights in 8 bits, which halves what decoding reads.

    Weights are cast to x's dtype, which loses nothing, and the products multiplied by the scale of their output in
    float32. All else is as in `moe`; there is no gradient in the experts.

    Args:
        x: rows of a float dtype.
        expert_ids, weights: as in `moe`.
        experts: from `quantize_experts`.
        implementation: "reference", "xla_dense", "mosaic_gpu" (Hopper, bfloat16 rows), or None for the best on this
            platform (`moe_quantized_choice` says which).

    Returns:
        Rows in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    name = moe_quantized_choice(x, expert_ids, weights, experts, implementation=implementation)
    return QUANTIZED_IMPLEMENTATIONS[name].function(x, expert_ids, weights, experts)
