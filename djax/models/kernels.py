"""Which kernels a model runs on."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Names of the implementations of each op of `kernels_pallas`; None picks the best for every call.

    A named one is never replaced by another: a call that it does not support raises NotImplementedError.
    """

    moe: str | None = None
    attention: str | None = None
    unembed: str | None = None


def kernels_on(mesh: Mesh | None) -> Kernels:
    """What a model on `mesh` runs on if nobody says: XLA's own operations where arrays are split over devices.

    XLA partitions those; a kernel it would have to gather everything for.
    """
    if mesh is None or mesh.size == 1 or next(iter(mesh.devices.flat)).platform == "cpu":
        return Kernels()
    return Kernels(moe="xla_dense", attention="xla", unembed="reference")
