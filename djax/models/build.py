"""A configuration to a model: abstract (nothing is allocated) or with random weights."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Key

from djax.config import LladaMoeConfig, ModelConfig
from djax.models.llada_moe import LladaMoe

_ARCHITECTURES: dict[type, type[LladaMoe]] = {LladaMoeConfig: LladaMoe}


def _construct(config: ModelConfig, rngs: nnx.Rngs, moe_implementation: str | None) -> LladaMoe:
    if type(config) not in _ARCHITECTURES:
        raise ValueError(
            f"config: got a {type(config).__name__}; there are models for "
            f"{', '.join(kind.__name__ for kind in _ARCHITECTURES)}")
    return _ARCHITECTURES[type(config)](config, rngs=rngs, moe_implementation=moe_implementation)


def build(config: ModelConfig, *, moe_implementation: str | None = None) -> LladaMoe:
    """The model with `jax.ShapeDtypeStruct` in place of every parameter.

    `nnx.split(build(config))` gives the graphdef that `ModelDenoiser` holds and the tree that a loader fills.

    Raises:
        ValueError: no model for this kind of configuration.
    """
    return nnx.eval_shape(lambda: _construct(config, nnx.Rngs(0), moe_implementation))


def abstract_params(config: ModelConfig) -> nnx.State:
    """The parameters' tree with a `jax.ShapeDtypeStruct` at every leaf."""
    return nnx.split(build(config))[1]


def logical_axes(config: ModelConfig) -> dict[Any, Any]:
    """Logical axis names of every parameter: a nested dict with the paths of `nnx.to_pure_dict(params)`.

    Each leaf is a tuple with one name (or None) per array axis, so `jax.tree.map` needs
    `is_leaf=lambda node: isinstance(node, tuple)`.
    """
    tree: dict[Any, Any] = {}
    for path, parameter in nnx.to_flat_state(abstract_params(config)):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = parameter.axes
    return tree


def init_params(
    config: ModelConfig, key: Key[Array, ""], *, moe_implementation: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graphdef and random parameters drawn from `key`, in the config's dtype.

    Raises:
        ValueError: no model for this kind of configuration.
    """
    return nnx.split(_construct(config, nnx.Rngs(params=key), moe_implementation))
