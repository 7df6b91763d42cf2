"""How near an op comes to what a device was seen to reach: the least that it needs is in `djax.plan.roofline`."""

from __future__ import annotations

import dataclasses
from typing import Any

from djax.models.config import ModelConfig
from djax.models.families import family_of
from djax.plan import roofline
from djax.plan.roofline import Cost


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates that the device was seen to reach, in the process that the share is about."""

    bytes_per_second: float
    """A copy: bytes read plus bytes written."""
    flops_per_second: float
    """A large bfloat16 matrix product."""

    def floor_seconds(self, cost: Cost) -> float:
        """No implementation is much faster than this."""
        return max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second)

    def shares(self, cost: Cost, seconds: float) -> dict[str, float | str]:
        """Shares of both ceilings, and which of the two binds."""
        bandwidth = cost.bytes / seconds / self.bytes_per_second
        arithmetic = cost.flops / seconds / self.flops_per_second
        return {"share_of_copy_bandwidth": bandwidth, "share_of_matmul_rate": arithmetic,
                "bound": "memory" if bandwidth >= arithmetic else "arithmetic",
                "share_of_floor": max(bandwidth, arithmetic)}


def moe_cost(config: ModelConfig, rows: float, **options: Any) -> Cost:
    """The experts of the last layer, and so of any that has some; options as of `djax.plan.roofline.moe`."""
    return roofline.moe(config, family_of(config).feed_forwards(config)[-1], rows, **options)
