"""The op `moe` and the choice of its implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, current_platform, resolve
from kernels_pallas.moe.reference import moe_reference
from kernels_pallas.moe.xla_dense import moe_xla_dense
from kernels_pallas.moe.xla_grouped import moe_xla_grouped


def _any_call(platform: str, *operands: Any) -> str | None:
    """XLA compiles these everywhere."""
    del platform, operands
    return None


IMPLEMENTATIONS = {
    "reference": Implementation(moe_reference, _any_call),
    "xla_grouped": Implementation(moe_xla_grouped, _any_call),
    "xla_dense": Implementation(moe_xla_dense, _any_call),
}

_PREFERENCE = {
    # a CPU is bound by arithmetic: only the rows that were routed
    "cpu": ("xla_grouped", "reference"),
}
# an accelerator is bound by reading the weights, and a loop with a dynamic trip count is driven by the host
_ACCELERATOR = ("xla_dense", "reference")


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
    if not x.dtype == gate.dtype == up.dtype == down.dtype:
        raise ValueError(
            f"x: got dtypes x {x.dtype}, gate {gate.dtype}, up {up.dtype}, down {down.dtype}; they must be "
            "one dtype: cast x to the weights'")
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
    platform = current_platform() if platform is None else platform
    return resolve(
        "moe", IMPLEMENTATIONS, implementation=implementation,
        preference=_PREFERENCE.get(platform, _ACCELERATOR), platform=platform, operands=operands)


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
    x's dtype between the projections, the sum over experts taken in float32.

    An expert id outside [0, E) selects no expert and contributes zero (a shard of the experts can be given
    ids relative to its first one); an id that occurs twice in a row counts twice. Rows do not touch each
    other: a NaN stays in its row.

    Args:
        x: rows, in the weights' dtype.
        expert_ids: integers.
        weights: router weights, used as they are (no normalisation).
        gate, up, down: expert weights.
        implementation: "reference", "xla_grouped", "xla_dense", or None for the best on this platform
            (`moe_choice` says which). All are reverse-differentiable in everything but `expert_ids`;
            "xla_grouped" has no forward mode.

    Returns:
        Rows in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    name = moe_choice(x, expert_ids, weights, gate, up, down, implementation=implementation)
    return IMPLEMENTATIONS[name].function(x, expert_ids, weights, gate, up, down)
