"""Parameters: an `nnx.Param` whose metadata `axes` names its logical axes.

`axes` is our own metadata and not flax's partitioning annotation, which would need a mesh at construction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

INITIAL_STD = 0.02

LogicalAxes = tuple[str | None, ...]


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, axes: LogicalAxes, dtype: jax.typing.DTypeLike
) -> nnx.Param:
    """A weight drawn from a normal distribution of standard deviation 0.02."""
    value = INITIAL_STD * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def ones(shape: tuple[int, ...], *, axes: LogicalAxes, dtype: jax.typing.DTypeLike) -> nnx.Param:
    """A norm's weight, all ones."""
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def zeros(shape: tuple[int, ...], *, axes: LogicalAxes, dtype: jax.typing.DTypeLike) -> nnx.Param:
    """A bias, all zeros."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
