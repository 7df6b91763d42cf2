"""A configuration to a model: abstract (nothing is allocated) or with random weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Key

from djax.contracts.ambient import without_mesh
from djax.devices.parallel import UNSPLIT, Parallel
from djax.models.config import ModelConfig
from djax.models.families import family_of
from djax.models.layers.kernels import Kernels
from djax.models.layers.trunk import Transformer


@functools.lru_cache(maxsize=32)  # seconds for a hundred layers, and a load asks several times
def _abstract(config: ModelConfig, kernels: Kernels, parallel: Parallel) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(
        lambda: Transformer(config, family_of(config), rngs=nnx.Rngs(0), kernels=kernels, parallel=parallel)))


def _own_abstract(config: ModelConfig, kernels: Kernels, parallel: Parallel) -> tuple[nnx.GraphDef, nnx.State]:
    """The graphdef and the shapes, in a tree that the caller may change."""
    family_of(config)  # what is no configuration need not be hashable
    graphdef, state = _abstract(config, kernels, parallel)
    return graphdef, jax.tree.map(lambda leaf: leaf, state)


@without_mesh()
def build(config: ModelConfig, *, kernels: Kernels = Kernels(), parallel: Parallel = UNSPLIT) -> Transformer:
    """The model with `jax.ShapeDtypeStruct` in place of every parameter.

    `nnx.split(build(config))` gives the graphdef that `ModelDenoiser` holds and the tree that a loader fills. With
    `parallel` the graphdef is one for a device's part of the parameters, inside `jax.shard_map`.

    Raises:
        ValueError: no model for this kind of configuration.
    """
    model: Transformer = nnx.merge(*_own_abstract(config, kernels, parallel))
    return model


@without_mesh()
def abstract_params(config: ModelConfig) -> nnx.State:
    """The parameters' tree with a `jax.ShapeDtypeStruct` at every leaf; a tree of its own at every call."""
    return _own_abstract(config, Kernels(), UNSPLIT)[1]


def logical_axes(config: ModelConfig) -> dict[Any, Any]:
    """Logical axis names of every parameter: a nested dict with the paths of `nnx.to_pure_dict(params)`.

    Each leaf is a tuple with one name (or None) per array axis, so `jax.tree.map` needs
    `is_leaf=lambda node: isinstance(node, tuple)`.
    """
    return unflatten_dict({path: parameter.axes for path, parameter in nnx.to_flat_state(abstract_params(config))})


@without_mesh()
def init_params(
    config: ModelConfig, key: Key[Array, ""], *, kernels: Kernels = Kernels()
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graphdef and random parameters drawn from `key`, in the config's dtype.

    Raises:
        ValueError: no model for this kind of configuration.
    """
    return nnx.split(
        Transformer(config, family_of(config), rngs=nnx.Rngs(params=key), kernels=kernels, parallel=UNSPLIT))
