"""New weights for a model that is generating: checked before anything is touched, then cast and placed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from djax.contracts.types import Params
from djax.devices.sharding import leaf_name
from djax.errors import ArgumentError


def accept(
    current: Params, new: Params, *, filter_types: Sequence[type[nnx.Variable[Any]]] | None = None,
    copy: bool = False,
) -> Params:
    """`new` in the place of `current`: the same tree, dtypes and shardings, so that nothing has to be compiled again.

    Neither tree is changed: who holds `current`, a generation in progress say, goes on with it. Each leaf moves from
    its devices to those of the current one, also where these belong to another mesh (disaggregated); what is there
    already in the right dtype and layout is shared and not copied (colocated). A training step that donates its
    parameters would then delete them here too: hand over the new ones after each step, or copy. NumPy arrays are always
    copied: they may be written to later.

    Args:
        current: an `nnx.State` or a pure dict (`nnx.to_pure_dict`) of arrays.
        new: either of them; leaves go by their paths.
        filter_types: variable types, such as `(nnx.LoRAParam,)`: only leaves of these types are replaced, and `new`
            need not hold others (those that it holds are not read). `current` then has to be an `nnx.State`.
        copy: never share memory with `new`.

    Raises:
        ValueError: leaves that are missing or unknown, another shape, a cast that is not from float to float, a
            deleted array, or `filter_types` that choose nothing; names the leaf. Nothing has happened then.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(current)
    names = [leaf_name(path) for path, _ in leaves]
    chosen = set(names) if filter_types is None else _of_types(current, filter_types)
    given = _named(new)
    missing, unknown = sorted(chosen - given.keys()), sorted(given.keys() - set(names))
    if missing or unknown:
        said = [f"{len(group)} {kind}, the first is {group[0]}"
                for kind, group in (("missing", missing), ("unknown", unknown)) if group]
        raise ValueError(f"params: {'; '.join(said)}; they must have the leaves of the model's own "
                         f"({len(chosen)} arrays)")
    for name, (_, old) in zip(names, leaves, strict=True):
        if name in chosen:
            _check(name, old, given[name])
    return jax.tree.unflatten(structure, [
        _move(old, given[name], copy=copy) if name in chosen else old
        for name, (_, old) in zip(names, leaves, strict=True)])


def check_alive(params: Params) -> Params:
    """`params`, if none of its arrays was donated to a jitted function.

    Raises:
        ArgumentError: one was; names the leaf. On a mesh a program that gets it would crash the process.
    """
    if any(map(_is_deleted, jax.tree.leaves(params))):
        name = next(leaf_name(path) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
                    if _is_deleted(leaf))
        raise ArgumentError(
            "params", f"{name}, an array that has been deleted (donated to a jitted function, a training step say)",
            allowed="arrays that still exist",
            advice="hand over what that function returned, with lm.update_params(new_params)")
    return params


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _named(params: Params) -> dict[str, Any]:
    """Leaf name to array.

    Raises:
        ValueError: it is no tree of arrays.
    """
    if not isinstance(params, nnx.State | dict):
        raise ValueError(f"params: got a {type(params).__name__}; allowed an nnx.State (nnx.state(model)) or a pure "
                         "dict of arrays")
    found = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for name, leaf in found.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"params: {name}: got a {type(leaf).__name__}; allowed a jax or NumPy array")
    return found


def _of_types(current: Params, filter_types: Sequence[type[nnx.Variable[Any]]]) -> set[str]:
    """Names of the leaves whose variables are of these types."""
    if not isinstance(current, nnx.State):
        raise ValueError("filter_types: the model's weights are a pure dict, which knows no variable types; load it "
                         "with an nnx.State, or leave filter_types out")
    wanted = nnx.filterlib.to_predicate(tuple(filter_types))
    found = {".".join(map(str, path)) for path, variable in nnx.to_flat_state(current) if wanted(path, variable)}
    if not found:
        kinds = ", ".join(kind.__name__ for kind in filter_types)
        raise ValueError(f"filter_types: got {kinds}; the model has no parameter of these types")
    return found


def _check(name: str, old: Any, new: Any) -> None:
    if new.shape != old.shape:
        raise ValueError(f"params: {name}: got the shape {new.shape}; the model's is {old.shape}")
    floats = jnp.issubdtype(new.dtype, jnp.floating) and jnp.issubdtype(old.dtype, jnp.floating)
    if new.dtype != old.dtype and not floats:
        raise ValueError(f"params: {name}: got {new.dtype}; the model's is {old.dtype}, and only a floating point type "
                         "is cast to another")
    if isinstance(new, jax.Array) and new.is_deleted():
        raise ValueError(f"params: {name}: its array has been deleted; was it donated to a jitted function? Give what "
                         "that function returned")


def _move(old: Any, new: Any, *, copy: bool) -> Array:
    """The new leaf where and as the old one is; cast on the side where it is smaller."""
    shrinks = new.dtype.itemsize > old.dtype.itemsize
    if shrinks:
        new = new.astype(old.dtype)
    elif isinstance(new, np.ndarray):
        new = new.copy()  # CPU devices use aligned NumPy memory in place, even with may_alias=False
    # an array that is not bound to its device has to stay so: otherwise a jitted function is compiled again
    elsewhere = isinstance(new, jax.Array) and new.sharding != getattr(old, "sharding", new.sharding)
    place = old.sharding if isinstance(old, jax.Array) and (old.committed or elsewhere) else None
    moved = jax.device_put(new, place, may_alias=False if copy else None)
    return moved if shrinks else moved.astype(old.dtype)
