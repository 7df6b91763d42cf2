"""Frozen dataclasses as pytrees whose tree structure names their class.

`flax.struct.dataclass` registers with `jax.tree_util.register_dataclass`, and two classes registered so have equal
tree structures when their fields agree: `TopP` and `MinP`, `Threshold` and `Factor`. `jit` looks programs up by
tree structure, so it may run another part's program (seen on jaxlib 0.10, by chance of the hash).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(*, pytree_node: bool = True, **options: Any) -> Any:
    """A dataclass field; with `pytree_node=False` it is static: part of the tree structure, not a leaf."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass, registered as a pytree: fields are leaves unless declared static."""
    frozen = dataclasses.dataclass(frozen=True)(cls)
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
    jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten, flatten)
    return frozen
