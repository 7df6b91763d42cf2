"""Logical axes to mesh axes: which device holds which part of a parameter.

A model names the axes of its parameters; `Rules` say which mesh axis, if any, each of those names is split
over. The mesh is always an argument: an ambient one is not seen in other threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

LogicalAxes = tuple[str | None, ...]
"""One name per array axis; None is an axis that is never split."""
Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name to the mesh axis (or axes) it is split over. Names that are not in it are not split."""

DEFAULT_RULES: Rules = MappingProxyType({
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "experts": "expert",
    "ffn": "tensor",
    "vocab": "tensor",
    "batch": "data",
})
"""Tensor parallelism over "tensor", expert parallelism over "expert", batches over "data"."""


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's dotted name from its key path, such as `layers.0.attention.query`.

    The attribute through which an `nnx.Variable` shows its array is not part of the name, so a model's
    state and its pure dict give the same names.
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf name to leaf, in the tree's order. Tuples count as leaves (axis names are tuples)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {leaf_name(path): leaf for path, leaf in leaves}


def _mesh_axes(name: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    target = None if name is None else rules.get(name)
    targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    return tuple(axis for axis in targets if axis in mesh.shape)


def partition_spec(
    axes: LogicalAxes, shape: tuple[int, ...], *, mesh: Mesh, rules: Rules = DEFAULT_RULES, name: str = "array"
) -> PartitionSpec:
    """How an array with these logical axes is split over `mesh`. Rules' axes that the mesh lacks are left out.

    Raises ValueError, naming `name` and the numbers, if the axes do not match the shape, two axes of the
    array are split over the same mesh axis, or a mesh axis does not divide the array's.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: got {len(axes)} axis names {axes} for the shape {shape}; one per axis is needed")
    entries: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str | None] = {}
    for logical, size in zip(axes, shape, strict=True):
        targets = _mesh_axes(logical, mesh, rules)
        for target in targets:
            if target in taken:
                raise ValueError(
                    f"{name}: its axes {taken[target]!r} and {logical!r} are both split over the mesh axis "
                    f"{target!r}; change the rules so that one of them is not")
            taken[target] = logical
        parts = math.prod(mesh.shape[target] for target in targets)
        if size % parts:
            raise ValueError(
                f"{name}: axis {logical!r} of size {size} cannot be split evenly over {parts} devices (mesh axes "
                f"{', '.join(targets)}); use a mesh that divides it, or map {logical!r} to None in the rules")
        entries.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*entries)


def default_device() -> jax.Device:
    """The device that arrays go to when nothing says otherwise."""
    return next(iter(jnp.zeros(()).devices()))


def shardings(axes: Any, shapes: Any, *, mesh: Mesh | None = None, rules: Rules | None = None) -> Any:
    """A sharding for every leaf: a tree like `shapes`, whose leaves have a `shape`.

    `axes` is a tree with the same leaf names whose leaves are `LogicalAxes`. Without a mesh everything is
    on the default device; without rules `DEFAULT_RULES` apply.

    Raises ValueError, naming the parameter, as `partition_spec`, or if the two trees name different leaves.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [leaf_name(path) for path, _ in leaves]
    named_axes = named_leaves(axes)
    differ = sorted(set(names) ^ set(named_axes))
    if differ:
        raise ValueError(f"axes: {len(differ)} leaves are in one of axes and shapes only, the first is {differ[0]}")
    if mesh is None:
        single: Sharding = SingleDeviceSharding(default_device())
        return jax.tree.unflatten(structure, [single] * len(leaves))
    active = DEFAULT_RULES if rules is None else rules
    return jax.tree.unflatten(structure, [
        NamedSharding(mesh, partition_spec(named_axes[name], leaf.shape, mesh=mesh, rules=active, name=name))
        for name, (_, leaf) in zip(names, leaves, strict=True)])
