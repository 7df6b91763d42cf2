"""Expert weights in 8 bits, and the op on them with plain XLA."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.moe.reference import moe_reference

DTYPES = ("int8", "float8_e4m3fn")


class QuantizedExperts(NamedTuple):
    """Weights in 8 bits, and the float32 factor of each output: weight = scale * value."""

    gate: Array
    """[E, F, D], int8 or float8_e4m3fn; so are the others."""
    up: Array
    """[E, F, D]"""
    down: Array
    """[E, D, F]"""
    gate_scale: Float[Array, "E F"]
    up_scale: Float[Array, "E F"]
    down_scale: Float[Array, "E D"]


def quantize_experts(
    gate: Float[Array, "E F D"], up: Float[Array, "E F D"], down: Float[Array, "E D F"], *, dtype: Any
) -> QuantizedExperts:
    """Experts in 8 bits: each output's largest weight becomes the dtype's largest number, all are rounded to nearest.

    Args:
        gate, up, down: expert weights of any float dtype.
        dtype: int8 (symmetric, -127 to 127) or float8_e4m3fn.

    Raises:
        ValueError: another dtype.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype: got {dtype.name}; it must be one of {', '.join(DTYPES)}")
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    values, scales = [], []
    for matrix in (gate, up, down):
        matrix = matrix.astype(jnp.float32)
        bound = jnp.max(jnp.abs(matrix), axis=-1)
        scale = jnp.where(bound > 0, bound / largest, 1.0)
        scaled = jnp.clip(matrix / scale[..., None], -largest, largest)
        values.append((jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype))
        scales.append(scale)
    return QuantizedExperts(*values, *scales)


def dequantize_experts(
    experts: QuantizedExperts, *, dtype: Any
) -> tuple[Float[Array, "E F D"], Float[Array, "E F D"], Float[Array, "E D F"]]:
    """Gate, up and down in a float dtype."""
    pairs = zip(experts[:3], experts[3:], strict=True)
    gate, up, down = ((values.astype(jnp.float32) * scale[..., None]).astype(dtype) for values, scale in pairs)
    return gate, up, down


def moe_quantized_reference(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: QuantizedExperts,
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe_quantized`: the experts in float32, then the reference of `moe`."""
    return moe_reference(
        x.astype(jnp.float32), expert_ids, weights, *dequantize_experts(experts, dtype=jnp.float32)).astype(x.dtype)


def moe_quantized_xla_dense(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: QuantizedExperts,
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe_quantized`. Every row through every expert; products scaled, not weights."""
    ids = jnp.arange(experts.gate.shape[0], dtype=expert_ids.dtype)
    chosen = expert_ids[None] == ids[:, None, None]  # [E, M, k]; an id out of range matches no expert
    weight = jnp.sum(jnp.where(chosen, weights.astype(jnp.float32), 0.0), axis=-1)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def project(rows: Array, matrix: Array, scale: Array, *, equation: str) -> Array:
        """8-bit numbers are exact in bfloat16, so the cast can be a part of reading them."""
        product = jnp.einsum(
            equation, rows, matrix.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        return product * scale[:, None, :]

    into = "md,efd->emf"
    hidden = jax.nn.silu(project(x, experts.gate, experts.gate_scale, equation=into))
    hidden *= project(x, experts.up, experts.up_scale, equation=into)
    # what an expert makes of a row that is not its own must not count, even where it overflows
    hidden = jnp.where(chosen.any(axis=-1)[:, :, None], hidden, 0.0).astype(x.dtype)
    outputs = project(hidden, experts.down, experts.down_scale, equation="emf,edf->emd")
    mixed = jnp.where(chosen.any(axis=-1)[:, :, None], weight[:, :, None] * outputs, 0.0)
    return jnp.sum(mixed, axis=0).astype(x.dtype)
