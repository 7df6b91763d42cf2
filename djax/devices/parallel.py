"""The part of a model that knows its arrays are split, when the whole program runs inside one `jax.shard_map`.

Every device runs the same code on its own part of the weights. The models' partial results are summed here, so that
the collectives of a forward can be read in the models; only readings of the head are joined elsewhere
(`kernels_pallas.combine_readouts`).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from djax.devices.sharding import Rules, mesh_axes
from djax.errors import ArgumentError

Axes = tuple[str, ...]
"""Names of mesh axes, from the one that changes slowest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """Over which mesh axes each logical axis is split; empty for one that every device holds whole.

    The default is a model that nothing is split of, inside or outside `jax.shard_map`.
    """

    heads: Axes = ()
    kv_heads: Axes = ()
    """The first ones of `heads`: devices that differ in the rest hold the same keys' weights and use a part of them."""
    experts: Axes = ()
    ffn: Axes = ()
    vocab: Axes = ()
    sequence: Axes = ()
    """Positions of a full forward. All of its devices hold weights and cache whole and compute windows whole."""

    def size(self, axes: Axes) -> int:
        """Product of the axis sizes: the number of parts of an array split over them."""
        return math.prod(lax.axis_size(axis) for axis in axes)

    def index(self, axes: Axes) -> Int[Array, ""]:
        """Index of this device's part."""
        return lax.axis_index(axes) if axes else jnp.int32(0)

    def sum(self, *terms: tuple[Array, Axes]) -> Array:
        """The sum of all devices' terms, in one reduction. A term is partial over its axes and whole over others."""
        union = tuple(dict.fromkeys(axis for _, axes in terms for axis in axes))
        total: Array | None = None
        for term, axes in terms:
            whole = tuple(axis for axis in union if axis not in axes)
            # of the devices that hold the same, one counts
            counted = jnp.where(self.index(whole) == 0, term, jnp.zeros_like(term)) if whole else term
            total = counted if total is None else total + counted
        if total is None:
            raise ValueError("terms: got none; give at least one")
        return lax.psum(total, union) if union else total

    def gather(self, part: Array, axes: Axes, *, axis: int) -> Array:
        """All devices' parts, side by side along an array axis."""
        return lax.all_gather(part, axes, axis=axis, tiled=True) if axes else part

    def local_kv_heads(self, weight: Float[Array, "G K D"], *, num_heads: int, ratio: int) -> Float[Array, "g K D"]:
        """The key/value heads that the device's `num_heads` query heads attend to, `ratio` query heads to each."""
        needed = max(num_heads // ratio, 1)
        if needed == weight.shape[0]:
            return weight
        first = self.index(self.heads) * num_heads // ratio - self.index(self.kv_heads) * weight.shape[0]
        return lax.dynamic_slice_in_dim(weight, first, needed)

    def look_up(self, table: Float[Array, "V D"], ids: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Rows of a table whose rows are split over `vocab`."""
        if not self.vocab:
            return table[ids]
        own = ids - self.first_id(table)
        inside = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(inside[..., None], table[jnp.where(inside, own, 0)], 0)
        return self.sum((rows, self.vocab))

    def first_id(self, table: Float[Array, "V D"]) -> Int[Array, ""]:
        """The id of the first row that this device holds."""
        return self.index(self.vocab) * table.shape[0]

    def positions(self, array: Array) -> Array:
        """The device's part of an array [B, T, ...], T rounded up to whole parts with zeros."""
        if not self.sequence:
            return array
        parts = self.size(self.sequence)
        width = -(-array.shape[1] // parts)
        padded = jnp.pad(array, [(0, 0), (0, parts * width - array.shape[1])] + [(0, 0)] * (array.ndim - 2))
        return lax.dynamic_slice_in_dim(padded, self.index(self.sequence) * width, width, axis=1)

    def all_positions(self, part: Array, length: int, *, axis: int = 1) -> Array:
        """Undo `positions`: the array that they were taken of."""
        if not self.sequence:
            return part
        return lax.slice_in_dim(self.gather(part, self.sequence, axis=axis), 0, length, axis=axis)


UNSPLIT = Parallel()
"""Nothing is split."""


def parallel_on(mesh: Mesh, rules: Rules, *, num_heads: int, num_kv_heads: int) -> Parallel:
    """The split over `mesh` by `rules` of a generating model with so many heads.

    Raises:
        ValueError: the rules split something that a generation cannot, or split two things over one mesh axis that
            must be apart; names the logical axis.
    """
    split = {name: tuple(axis for axis in mesh_axes(name, mesh, rules) if mesh.shape[axis] > 1) for name in rules}
    fields = [field.name for field in dataclasses.fields(Parallel)]
    axes = {name: split.get(name, ()) for name in (*fields, "batch")}
    for name, over in split.items():
        if over and name not in axes:
            raise ArgumentError(
                "rules", f"{name!r} split over {over}", allowed="None for it: a generation needs it whole",
                advice="map it to None (weights split for training are moved to the generation's shardings)")
    weights = {axis: name for name in ("heads", "experts", "ffn", "vocab") for axis in axes[name]}
    for name, reason in (("batch", "every row needs all weights"), ("sequence", "every position needs all weights")):
        for axis in axes[name]:
            if axis in weights:
                raise ArgumentError(
                    "rules", f"{name!r} and {weights[axis]!r}, which are both split over the mesh axis {axis!r}",
                    allowed=f"different ones: {reason}", advice="use different axes")
    for axis in axes["sequence"]:
        if axis in axes["batch"]:
            raise ArgumentError("rules", f"'sequence' and 'batch', which are both split over {axis!r}",
                                allowed="different axes", advice="use another one for one of them")
    if axes["kv_heads"] != axes["heads"][: len(axes["kv_heads"])]:
        raise ArgumentError(
            "rules", f"'kv_heads' split over {axes['kv_heads']} and 'heads' over {axes['heads']}",
            allowed="the first axes of the latter for the former",
            advice="then a query head finds its keys on its own device")
    parts = math.prod(mesh.shape[axis] for axis in axes["heads"])
    if num_kv_heads % parts and parts % num_kv_heads:
        raise ArgumentError(
            "num_kv_heads", f"{num_kv_heads} with heads split over {parts} devices",
            allowed="a multiple or a divisor of these", advice="split 'heads' over fewer")
    if num_heads % parts:
        raise ArgumentError(
            "num_heads", f"{num_heads} split over {parts} devices (mesh axes {', '.join(axes['heads'])})",
            allowed="a mesh that divides it", advice="use one")
    return Parallel(**{name: axes[name] for name in fields})
