"""The program of a mesh's first device, alone: what it computes is wrong, what it costs is that device's share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jaxtyping import Array, Int

from djax import denoise
from djax.contracts.part_shapes import AXES
from djax.devices.parallel import Axes, Parallel
from djax.engine.program import Program
from djax.models import ModelDenoiser, build
from djax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoneShard(Parallel):
    """Takes the device's own terms and parts for those of the mesh, which is not there: no collectives."""

    sizes: tuple[tuple[str, int], ...]
    """Sizes of the mesh's axes."""

    def size(self, axes: Axes) -> int:
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    def index(self, axes: Axes) -> Int[Array, ""]:
        return jnp.int32(0)

    def sum(self, *terms: tuple[Array, Axes]) -> Array:
        total, *others = (term for term, _ in terms)
        return sum(others, total)

    def gather(self, part: Array, axes: Axes, *, axis: int) -> Array:
        return jnp.concatenate([part] * self.size(axes), axis=axis)


def lone_shard(config: ModelConfig, mesh: AbstractMesh) -> tuple[Any, Any]:
    """A jitted (params, canvas, key, parts, row ids) to a result, and the shapes of the device's parameters.

    The device's rows of the vocabulary are taken for all of it, so that readings are joined with no others.
    """
    whole = Program(config, mesh=mesh)
    split = {field.name: getattr(whole.parallel, field.name) for field in dataclasses.fields(Parallel)}
    parallel = LoneShard(**split | {"vocab": ()}, sizes=tuple(mesh.shape.items()))
    denoiser = ModelDenoiser(nnx.split(build(config, parallel=parallel))[0])

    @jax.jit
    def run(params: Any, canvas: Any, key: Any, parts: Any, rows: Any) -> Any:
        return denoise(denoiser, params, canvas, key, row_ids=rows, **{axis: getattr(parts, axis) for axis in AXES})

    return run, whole.local_params
