"""Frozen dataclasses as pytrees whose tree structure names their class.

`flax.struct.dataclass` registers with `jax.tree_util.register_dataclass`, and two classes registered so have equal
tree structures when their fields agree: `TopP` and `MinP`, `Threshold` and `Factor`. `jit` looks programs up by
tree structure, so it may run another part's program (seen on jaxlib 0.10, by chance of the hash).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")


def field(*, pytree_node: bool = True, axes: tuple[str | None, ...] | None = None, **options: Any) -> Any:
    """A dataclass field; with `pytree_node=False` it is static: part of the tree structure, not a leaf.

    `axes` are the logical axes (`djax.devices.sharding`) over which its arrays' first axes are split on a mesh.
    """
    return dataclasses.field(metadata={"pytree_node": pytree_node, "axes": axes}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass, registered as a pytree: fields are leaves unless declared static."""
    # dataclasses' own == asks for the truth of arrays' comparisons, which raises
    frozen = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(frozen)  # type: ignore[arg-type]
    leaves = tuple(f.name for f in fields if f.metadata.get("pytree_node", True))
    static = tuple(f.name for f in fields if not f.metadata.get("pytree_node", True))

    def flatten(part: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(part, name) for name in leaves), tuple(getattr(part, name) for name in static)

    def flatten_with_keys(part: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        keys = tuple(jax.tree_util.GetAttrKey(name) for name in leaves)
        return tuple(zip(keys, flatten(part)[0], strict=True)), flatten(part)[1]

    def unflatten(static_values: tuple[Any, ...], leaf_values: Any) -> T:
        part = object.__new__(frozen)
        for name, value in (*zip(static, static_values, strict=True), *zip(leaves, leaf_values, strict=True)):
            object.__setattr__(part, name, value)
        return part

    frozen.replace = dataclasses.replace  # type: ignore[attr-defined]
    frozen.__eq__ = _equal  # type: ignore[method-assign]
    frozen.__hash__ = lambda part: hash(jax.tree.structure(part))  # type: ignore[method-assign,assignment]
    jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten, flatten)
    return frozen


def same_arrays(left: Any, right: Any) -> bool:
    """Whether two leaves hold the same numbers in the same shape; NaN equals NaN."""
    if left is right:
        return True
    kinds = [getattr(leaf, "dtype", None) for leaf in (left, right)]
    if any(kind is not None and jax.dtypes.issubdtype(kind, jax.dtypes.prng_key) for kind in kinds):
        return kinds[0] == kinds[1] and same_arrays(jax.random.key_data(left), jax.random.key_data(right))
    first, second = np.asarray(left), np.asarray(right)
    return first.shape == second.shape and bool(
        ((first == second) | ((first != first) & (second != second))).all())


def same_trees(left: Any, right: Any) -> bool:
    """Whether two pytrees have the same structure and the same numbers in it."""
    return same_structure(left, right) and all(map(same_arrays, jax.tree.leaves(left), jax.tree.leaves(right)))


def same_structure(left: Any, right: Any) -> bool:
    """Whether two pytrees have the same structure, static fields included."""
    ours: Any = jax.tree.structure(left)  # PyTreeDef's stub has no ==
    return ours == jax.tree.structure(right)


def _equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    return same_trees(left, right)
