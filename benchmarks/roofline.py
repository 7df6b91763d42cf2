"""The least that an op has to move and to compute, from its shapes alone.

Bytes are those of device memory with everything read once and written once: weights, the cache, rows in and out.
What an implementation moves beyond that (temporaries, padding, weights read twice) is its own loss, so a share of the
bandwidth is never flattered by waste. One multiply-add is two operations.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from djax.config import LladaMoeConfig

ACTIVATION_BYTES = 2
"""bfloat16."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.bytes * times, self.flops * times)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach, in the process that the share is about."""

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


def experts_read(rows: float, *, num_experts: int, experts_per_token: int) -> float:
    """Expected number of different experts that `rows` tokens choose, if all choices are equally likely."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** rows)


def moe(
    config: LladaMoeConfig, rows: int, *, experts: float | None = None, weight_bytes: int = 2
) -> Cost:
    """One layer's routed experts on `rows` tokens.

    Args:
        config: shapes.
        rows: tokens, M.
        experts: how many different experts they chose; expected from uniform routing if None.
        weight_bytes: of an expert's weight; below 2 a float32 scale per output channel is read too.
    """
    model, width = config.hidden_size, config.expert_size
    if experts is None:
        experts = experts_read(rows, num_experts=config.num_experts, experts_per_token=config.experts_per_token)
    scales = 4 * (2 * width + model) if weight_bytes < 2 else 0
    weights = experts * (3 * width * model * weight_bytes + scales)
    return Cost(bytes=weights + 2 * rows * model * ACTIVATION_BYTES,
                flops=2 * 3 * width * model * rows * config.experts_per_token)


def attention(config: LladaMoeConfig, batch: int, window: int, context: int) -> Cost:
    """One layer's attention of a window to its canvas, without the projections."""
    keys = 2 * batch * context * config.num_kv_heads * config.head_dim
    queries = 2 * batch * window * config.num_heads * config.head_dim
    return Cost(bytes=(keys + queries) * ACTIVATION_BYTES,
                flops=4 * batch * config.num_heads * window * context * config.head_dim)


def projections(config: LladaMoeConfig, rows: int) -> Cost:
    """One layer's query, key, value and output projections and its router: their weights, and the cache's new rows."""
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * query_width + 2 * kv_width + config.num_experts)
    return Cost(bytes=(weights + 2 * rows * kv_width) * ACTIVATION_BYTES, flops=2 * rows * weights)


def unembed(
    config: LladaMoeConfig, rows: int, *, logits_in_memory: bool = False, expected: bool = False
) -> Cost:
    """The vocabulary head on `rows` positions and what a step reads of it (a few numbers a row).

    With `logits_in_memory` float32 logits are written and read once more. With `expected` the embedding is read too,
    and a row of it written for each position.
    """
    weights = config.vocab_size * config.hidden_size
    logits = 2 * 4 * rows * config.vocab_size if logits_in_memory else 0
    if expected:
        plain = unembed(config, rows, logits_in_memory=logits_in_memory)
        return plain + Cost(bytes=(weights + rows * config.hidden_size) * ACTIVATION_BYTES, flops=2 * rows * weights)
    return Cost(bytes=(weights + rows * config.hidden_size) * ACTIVATION_BYTES + logits + 4 * 4 * rows,
                flops=2 * rows * weights)


def forward(
    config: LladaMoeConfig, *, batch: int, window: int, context: int, head_rows: int,
    experts: float | None = None, weight_bytes: int = 2, logits_in_memory: bool = False,
) -> Cost:
    """A windowed forward with the head on `head_rows` positions of each row.

    The last layer's experts are needed only where the head is. `experts` is the mean number of different experts that
    a layer reads, expected from uniform routing if None.
    """
    rows, last = batch * window, batch * head_rows
    layers = config.num_layers
    routed = partial(moe, config, experts=experts, weight_bytes=weight_bytes)
    per_layer = attention(config, batch, window, context) + projections(config, rows)
    embedded = Cost(bytes=rows * config.hidden_size * ACTIVATION_BYTES, flops=0)
    return (per_layer * layers + routed(rows) * (layers - 1) + routed(last)
            + unembed(config, last, logits_in_memory=logits_in_memory) + embedded)
