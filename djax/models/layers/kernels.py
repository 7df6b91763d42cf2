"""The kernels that a model runs on."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from djax.errors import ArgumentError, check_choice, shown
from kernels_pallas.attention import IMPLEMENTATIONS as ATTENTION
from kernels_pallas.moe import IMPLEMENTATIONS as MOE
from kernels_pallas.unembed import IMPLEMENTATIONS as UNEMBED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Names of the implementations of each op of `kernels_pallas`; None picks the best for every call.

    A named one is never replaced by another: a call that it does not support raises NotImplementedError.

    Raises:
        ValueError: an op has no implementation of that name.
    """

    moe: str | None = None
    attention: str | None = None
    unembed: str | None = None

    def __post_init__(self) -> None:
        for op, names in (("moe", MOE), ("attention", ATTENTION), ("unembed", UNEMBED)):
            check_choice(op, getattr(self, op), names, optional=True, advice="pick one of them, or None for the best")


def check_kernels(kernels: Kernels | None) -> Kernels:
    """The kernels that were asked for; those of None are picked for every call.

    Raises:
        ArgumentError: something else.
    """
    if kernels is None or isinstance(kernels, Kernels):
        return kernels or Kernels()
    raise ArgumentError("kernels", shown(kernels), allowed="djax.Kernels, or None",
                        advice="such as djax.Kernels(attention='xla')")


def kernels_on(mesh: Mesh | None) -> Kernels:
    """Kernels that XLA can partition over `mesh` without all-gathers."""
    if mesh is None or mesh.size == 1:
        return Kernels()
    return Kernels(moe="xla_dense", attention="xla", unembed="reference")
