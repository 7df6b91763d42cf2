"""Operations that the families share: contractions, RMSNorm, a dense block and rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from djax.models.layers.parameters import normal


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Precision for contractions of `dtype`: float32 means float32 (accelerators default to fewer bits)."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def contract(
    subscripts: str, left: Array, right: Array, *, dtype: jax.typing.DTypeLike | None = None
) -> Array:
    """`einsum` of two operands accumulated in float32; the result has `dtype`, or left's if None."""
    precision = matmul_precision(jnp.result_type(left, right))
    result = jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=jnp.float32)
    return result.astype(left.dtype if dtype is None else dtype)


def to_heads(x: Float[Array, "B W D"], weight: Float[Array, "H K D"]) -> Float[Array, "B W H K"]:
    """Project to heads. As one matrix: XLA transposes a copy of a three-axis weight at every call on CPU."""
    heads, width, model = weight.shape
    projected = contract("bwd,nd->bwn", x, weight.reshape(heads * width, model))
    return projected.reshape(*x.shape[:2], heads, width)


def from_heads(x: Float[Array, "B W H K"], weight: Float[Array, "D H K"]) -> Float[Array, "B W D"]:
    """Project back from heads, as one matrix too."""
    batch, window, heads, width = x.shape
    return contract("bwn,dn->bwd", x.reshape(batch, window, heads * width), weight.reshape(-1, heads * width))


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], *, eps: float) -> Float[Array, "... D"]:
    """Root mean square norm (arXiv 1910.07467): the variance in float32, the weight applied in x's dtype."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scale = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return scale * (wide * lax.rsqrt(variance + eps)).astype(x.dtype)


class SwiGlu(nnx.Module):
    """A dense SwiGLU block of width F; over a mesh its result is partial: the sum of all `ffn` devices' is whole."""

    def __init__(self, model: int, width: int, *, rngs: nnx.Rngs, dtype: str) -> None:
        self.gate = normal(rngs, (width, model), axes=("ffn", "embed"), dtype=dtype)
        self.up = normal(rngs, (width, model), axes=("ffn", "embed"), dtype=dtype)
        self.down = normal(rngs, (model, width), axes=("embed", "ffn"), dtype=dtype)

    def __call__(self, rows: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """down (silu(gate x) * (up x)) of each row; products in float32, hidden units rounded to x's dtype."""
        gate, up = (contract("md,fd->mf", rows, weight[...], dtype=jnp.float32) for weight in (self.gate, self.up))
        return contract("mf,df->md", (jax.nn.silu(gate) * up).astype(rows.dtype), self.down[...])


Rotation = tuple[Float[Array, "B W K"], Float[Array, "B W K"]]
"""Cosines and signed sines of the rotary position embedding for both halves of a head, float32."""


def rotary_angles(positions: Int[Array, "B W"], *, head_dim: int, theta: float) -> Rotation:
    """Rotary position embedding (arXiv 2104.09864): what the pair (x[i], x[i + K/2]) is turned by at each position."""
    # float32 throughout, as the checkpoints were trained: at far positions an ulp here is a visible angle
    inverse_frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse_frequency[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: Float[Array, "B W H K"], rotation: Rotation) -> Float[Array, "B W H K"]:
    """Rotate the pairs (x[i], x[i + K/2]), half-split as in Llama, in float32."""
    cos, sin = (array[:, :, None] for array in rotation)
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([second, first], axis=-1) * sin).astype(x.dtype)
