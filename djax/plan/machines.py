"""Limits of machines: memory, rates and links of a device, as data with their sources.

A device is what JAX calls one: half a chip of a TPU v4 or 7x. These are peaks from data sheets, not measurements; the
latencies of collectives are assumptions, and said to be so.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from djax.errors import ArgumentError, shown

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A link between devices, up to a number of them."""

    devices: int | None
    """At most so many devices in one group; None is any number."""
    bytes_per_second: float
    """Out of one device, in one direction; of a torus along one of its axes, both ways."""
    seconds: float
    """Latency of a whole exchange through a switch, or of a hop in a torus."""
    torus: int | None = None
    """Dimensions of the torus; None is a switch."""

    def steps(self, group: int) -> float:
        """Latencies, one after the other, of a sum over `group` devices.

        Through a switch one; in a torus of equal sides, rings in both directions: n ** (1 / d) - 1 hops for each of d
        dimensions (half of the ring there, half of it back).
        """
        return 1.0 if self.torus is None else self.torus * (group ** (1 / self.torus) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks of one device."""

    name: str
    memory_bytes: float
    """Bytes that a program may use."""
    bytes_per_second: float
    """In the device's memory."""
    flops_per_second: float
    """Dense bfloat16 products, accumulated in float32."""
    links: tuple[Link, ...]
    """From the fastest; the first that is wide enough counts."""
    vector_memory_bytes: int | None
    """VMEM of a TPU's core; None for a GPU."""
    source: str

    def exchange_seconds(self, kind: str, nbytes: float, group: int) -> float:
        """One collective of `nbytes` (`djax.plan.hlo.Collective`) over `group` devices: latency and time on the link.

        A ring sends 2 (n - 1) / n of the array for a sum, half of that to gather or to scatter; none is faster
        where links are one direction's bound.
        """
        if group <= 1:
            return 0.0
        link = next(link for link in self.links if link.devices is None or group <= link.devices)
        share = 1.0 if kind in ("collective-permute", "collective-broadcast") else (group - 1) / group
        rounds = 2 if kind == "all-reduce" else 1
        return link.steps(group) * link.seconds + rounds * share * nbytes / link.bytes_per_second


_TORUS_HOP = 1e-6
_XLA_LIMIT = "memory: what libtpu's compiler allows a program"


def _tpu(
    name: str, *, memory: float, vector_memory: int, bandwidth: float, flops: float, links: float, torus: int,
    devices_per_chip: int = 1,
) -> Machine:
    """Per chip but for the memories, in GiB and MiB; `links` are those of one axis."""
    return Machine(
        name=name, memory_bytes=memory * GIB, bytes_per_second=bandwidth / devices_per_chip,
        flops_per_second=flops / devices_per_chip, vector_memory_bytes=vector_memory * 2**20,
        links=(Link(devices=None, bytes_per_second=links / devices_per_chip, seconds=_TORUS_HOP, torus=torus),),
        source=f"cloud.google.com/tpu/docs/{name}; {_XLA_LIMIT}; vector memory: "
               "jax.experimental.pallas.tpu.get_tpu_info; 1 us a hop: jax-ml.github.io/scaling-book")


MACHINES = MappingProxyType({machine.name: machine for machine in (
    Machine(
        name="h200", memory_bytes=0.75 * 151397597184, bytes_per_second=4.8e12, flops_per_second=989e12,
        vector_memory_bytes=None,
        links=(Link(devices=8, bytes_per_second=450e9, seconds=10e-6),
               Link(devices=None, bytes_per_second=50e9, seconds=30e-6)),
        source="NVIDIA H200 data sheet (SXM; NVLink 900 GB/s both ways, 400 Gb/s InfiniBand a GPU between nodes); "
               "memory: the 75 % that JAX allocates by default; 10 and 30 us a collective are assumed"),
    _tpu("v4", memory=15.25, vector_memory=16, bandwidth=1.2e12, flops=275e12, links=100e9, torus=3,
         devices_per_chip=2),
    _tpu("v5e", memory=15.75, vector_memory=128, bandwidth=819e9, flops=197e12, links=100e9, torus=2),
    _tpu("v5p", memory=95.73, vector_memory=64, bandwidth=2.765e12, flops=459e12, links=200e9, torus=3),
    _tpu("v6e", memory=31.24, vector_memory=128, bandwidth=1.638e12, flops=918e12, links=200e9, torus=2),
    _tpu("tpu7x", memory=94.74, vector_memory=64, bandwidth=7.38e12, flops=2307e12, links=200e9, torus=3,
         devices_per_chip=2),
)})
"""By the kind of a topology's name, see `djax.plan.topology`."""


def machine(topology: str) -> Machine:
    """The device of a topology such as "v5e:2x4".

    Raises:
        ValueError: its kind is not in `MACHINES`.
    """
    kind = topology.split(":")[0]
    if kind not in MACHINES:
        raise ArgumentError("topology", shown(topology), allowed=f"KIND:SIZE with one of {', '.join(MACHINES)}",
                            advice="such as h200:8 or v5e:2x4")
    return MACHINES[kind]
