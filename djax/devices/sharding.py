"""Logical axes to mesh axes: which device holds which part of a parameter.

A model names the axes of its parameters; `Rules` say which mesh axis, if any, each of those names is split
over. The mesh is always an argument: an ambient one is not seen in other threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from djax.errors import ArgumentError, check_choice, shown

LogicalAxes = tuple[str | None, ...]
"""One name per array axis; None is an axis that is never split."""
Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name to the mesh axis (or axes) it is split over. Names that are not in it are not split."""

_EXTRA = ("expert", "fsdp")
_ALL = ("tensor", "tp", *_EXTRA)
DEFAULT_RULES: Rules = MappingProxyType({
    "embed": None,
    "heads": _ALL,
    "kv_heads": _ALL,
    "head_dim": None,
    "experts": _EXTRA,
    "ffn": ("tensor", "tp"),
    "vocab": _ALL,
    "batch": ("data", "dp"),
    "sequence": ("sequence", "context"),
})
"""Experts' widths over "tensor", experts over "expert", heads and vocabulary over both; rows over "data", the
positions of a full forward over "sequence". With the names that Tunix ("fsdp", "tp") and MaxText ("data", "fsdp",
"tensor", "expert", "context") give to their meshes: an axis that weights were split over for training holds experts."""

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "single": (), "tp": ("tensor",), "ep": ("expert",), "tp_ep": ("tensor", "expert"), "dp": ("data",),
    "dp_tp": ("data", "tensor"), "dp_ep": ("data", "expert"), "dp_tp_ep": ("data", "tensor", "expert"),
    "sp_tp": ("sequence", "tensor"), "sp_ep": ("sequence", "expert"), "sp_tp_ep": ("sequence", "tensor", "expert")})
"""Named meshes: tensor (tp), expert (ep), data (dp) and sequence (sp) parallelism and what can be made of them."""


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


def preset_sizes(preset: str, devices: int) -> dict[str, int]:
    """Axis sizes of a preset on so many devices, split as evenly as they can be, the later axes the larger ones.

    Raises:
        ValueError: an unknown preset, or "single" for more than one device.
    """
    axes = PRESETS[check_choice("preset", preset, PRESETS)]
    if not axes and devices != 1:
        raise ArgumentError("preset", f"'single' for {devices} devices", allowed="one device there",
                            advice="use another one, such as 'tp'")
    sizes = dict.fromkeys(axes, 1)
    for factor in sorted(_prime_factors(devices), reverse=True):
        smallest = min(reversed(axes), key=lambda axis: sizes[axis])
        sizes[smallest] *= factor
    return dict(zip(axes, sorted(sizes.values()), strict=True))


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def parse_mesh(text: str, *, devices: int) -> dict[str, int]:
    """Axis sizes from "tensor=4,expert=2", or from a preset's name for so many devices.

    Raises:
        ValueError: not of this form, an axis that no default rule uses, or one that comes twice.
    """
    if "=" not in text:
        if text not in PRESETS or (not PRESETS[text] and devices != 1):
            raise ArgumentError(
                "mesh", f"{shown(text)} for {devices} devices", allowed=f"{', '.join(PRESETS)} (single for one device "
                "only), or sizes such as tensor=4,expert=2", advice="pick one of them")
        return preset_sizes(text, devices)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        name = name.strip()
        if not size.strip().isdecimal() or int(size) < 1 or name in sizes:
            raise ArgumentError(
                "mesh", shown(text), allowed="a list of different axes with their sizes, such as tensor=4,expert=2, or "
                f"one of {', '.join(PRESETS)}", advice="correct it")
        sizes[name] = int(size)
    known = sorted({axis for target in DEFAULT_RULES.values() for axis in _targets(target)})
    for name in sizes:
        if name not in known:
            raise ArgumentError("mesh", f"an axis {shown(name)}", allowed=", ".join(known), advice="pick one of them")
    return sizes


def make_mesh(
    sizes: Mapping[str, int], *, devices: Sequence[Any] | None = None, axis_type: AxisType = AxisType.Auto
) -> Mesh:
    """A mesh of the first devices, neighbours in it as near to each other as the hardware has them.

    Args:
        sizes: axis name to size, the slowest axis first. Empty is one device.
        devices: to choose from; None is all of `jax.devices()`.
        axis_type: Auto or Explicit; djax runs on both.

    Raises:
        ValueError: there are not so many devices.
    """
    given = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(given) or needed < 1:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ArgumentError("mesh", f"{wanted}, {needed} devices", allowed=f"1 to {len(given)}, the devices here",
                            advice="use a smaller mesh")
    shape = tuple(sizes.values()) or (1,)
    chosen = given[:needed]
    if needed == len(given) and given[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    else:
        array = np.array(chosen).reshape(shape)
    names = tuple(sizes) or ("data",)
    return Mesh(array, names, axis_types=(axis_type,) * len(names))


def _targets(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if target is None else (target,) if isinstance(target, str) else tuple(target)


def mesh_axes(name: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The axes of `mesh` that a logical axis is split over; those that it lacks are left out."""
    return () if name is None else tuple(axis for axis in _targets(rules.get(name)) if axis in mesh.shape)


def check_rules(mesh: Mesh, rules: Rules) -> None:
    """Raise ValueError for a rule of an axis that no model has, or a mesh axis that no rule uses."""
    for name in rules:
        if name not in DEFAULT_RULES:
            raise ArgumentError("rules", f"a rule for {shown(name)}", allowed=", ".join(DEFAULT_RULES),
                                advice="correct or drop it")
    used = {axis for name in rules for axis in mesh_axes(name, mesh, rules)}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            known = sorted({target for targets in rules.values() for target in _targets(targets)})
            raise ArgumentError(
                "mesh", f"an axis {axis!r} of {size} devices that no rule uses", allowed=", ".join(known),
                advice="rename the axis, or give rules that split something over it")


def rules_for(axes: Any, shapes: Any, mesh: Mesh) -> Rules:
    """`DEFAULT_RULES` as far as they divide a model's parameters.

    Heads and vocabulary are split over "expert" and "fsdp" only where these divide them, and key/value heads, which may
    be fewer than the devices, over the first axes of the heads that divide them. All others are kept: if they do not
    divide, placing the parameters says so.
    """
    named_axes, named_shapes = named_leaves(axes), named_leaves(shapes)
    rules = dict(DEFAULT_RULES) | {name: mesh_axes(name, mesh, DEFAULT_RULES) or None for name in ("experts", "ffn")}
    for name in ("heads", "kv_heads", "vocab"):
        sizes = [size for leaf, names in named_axes.items()
                 for logical, size in zip(names, named_shapes[leaf].shape, strict=True) if logical == name]
        targets = mesh_axes(name, mesh, DEFAULT_RULES)
        if name == "kv_heads":
            targets = tuple(axis for axis in targets if axis in _targets(rules["heads"]))
        while targets and (name == "kv_heads" or targets[-1] in _EXTRA) and any(
                size % math.prod(mesh.shape[axis] for axis in targets) for size in sizes):
            targets = targets[:-1]
        rules[name] = targets or None
    return MappingProxyType(rules)


def partition_spec(
    axes: LogicalAxes, shape: tuple[int, ...], *, mesh: Mesh, rules: Rules = DEFAULT_RULES, name: str = "array"
) -> PartitionSpec:
    """The split over `mesh` of an array with these logical axes. Mesh axes that are not there are left out.

    Raises ValueError, naming `name` and the numbers, if the axes do not match the shape, two axes of the
    array are split over the same mesh axis, or a mesh axis does not divide the array's.
    """
    if len(axes) != len(shape):
        raise ArgumentError(name, f"{len(axes)} axis names {axes} for the shape {shape}", allowed="one per axis")
    entries: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str | None] = {}
    for logical, size in zip(axes, shape, strict=True):
        targets = mesh_axes(logical, mesh, rules)
        for target in targets:
            if target in taken:
                raise ArgumentError(
                    name, f"axes {taken[target]!r} and {logical!r} that are both split over the mesh axis {target!r}",
                    allowed="one of them", advice="change the rules so that one of them is not")
            taken[target] = logical
        parts = math.prod(mesh.shape[target] for target in targets)
        if size % parts:
            raise ArgumentError(
                name, f"axis {logical!r} of size {size}, which cannot be split evenly over {parts} devices (mesh axes "
                f"{', '.join(targets)})", allowed="a mesh that divides it",
                advice=f"use one, or map {logical!r} to None in the rules")
        entries.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*entries)


def default_device() -> jax.Device:
    """The device that arrays go to when nothing says otherwise."""
    # an explicit placement: an array that is merely made lies on all devices of the caller's `jax.set_mesh`
    return next(iter(jax.device_put(np.zeros((), np.int32)).devices()))


def shardings(axes: Any, shapes: Any, *, mesh: Mesh | None = None, rules: Rules | None = None) -> Any:
    """A sharding for every leaf: a tree like `shapes`, whose leaves have a `shape`.

    `axes` is a tree with the same leaf names whose leaves are `LogicalAxes`. Without a mesh everything is
    on the default device; without rules those of `rules_for` apply.

    Raises ValueError, naming the parameter, as `partition_spec`, as `check_rules`, or if the two trees name different
    leaves.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [leaf_name(path) for path, _ in leaves]
    named_axes = named_leaves(axes)
    differ = sorted(set(names) ^ set(named_axes))
    if differ:
        raise ArgumentError("axes", f"{len(differ)} leaves that are in one of axes and shapes only, first {differ[0]}",
                            allowed="the same leaves in both")
    if mesh is None:
        single: Sharding = SingleDeviceSharding(default_device())
        return jax.tree.unflatten(structure, [single] * len(leaves))
    active = rules_for(axes, shapes, mesh) if rules is None else rules
    check_rules(mesh, active)
    return jax.tree.unflatten(structure, [
        NamedSharding(mesh, partition_spec(named_axes[name], leaf.shape, mesh=mesh, rules=active, name=name))
        for name, (_, leaf) in zip(names, leaves, strict=True)])
