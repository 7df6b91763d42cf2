"""The least that a forward has to move and to compute on each device, and what that takes, from shapes alone.

Bytes are those of device memory with everything read once and written once: weights, the cache, rows in and out.
What an implementation moves beyond that (temporaries, padding, weights read twice) is its own loss, so a share of the
bandwidth is never flattered by waste. One multiply-add is two operations. Routing is taken to be even: as many rows to
every expert, as many read experts on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial

from djax.models.config import FeedForward, ModelConfig
from djax.models.families import family_of
from djax.plan.machines import Machine

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

    def seconds(self, machine: Machine) -> float:
        """The binding limit, memory or arithmetic, at the machine's peak."""
        return max(self.bytes / machine.bytes_per_second, self.flops / machine.flops_per_second)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of all."""
    return sum(costs, Cost(0, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """In how many parts each logical axis is."""

    heads: int = 1
    experts: int = 1
    ffn: int = 1
    vocab: int = 1
    batch: int = 1
    sequence: int = 1
    """Positions of a full forward; a window is computed whole."""

    def kv_heads(self, config: ModelConfig) -> int:
        """Key/value heads that a device keeps: at least one, where there are more devices than heads."""
        return max(config.num_kv_heads // self.heads, 1)


UNSPLIT = Split()
"""One device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective that a forward needs, `count` times."""

    kind: str
    nbytes: float
    group: int
    count: int

    def seconds(self, machine: Machine) -> float:
        """All of them, nothing else going on meanwhile."""
        return self.count * machine.exchange_seconds(self.kind, self.nbytes, self.group)


def experts_read(rows: float, *, num_experts: int, experts_per_token: int) -> float:
    """Expected number of different experts that `rows` tokens choose, if all choices are equally likely."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** rows)


def moe(
    config: ModelConfig, layer: FeedForward, rows: float, *, experts: float | None = None, weight_bytes: int = 2,
    split: Split = UNSPLIT,
) -> Cost:
    """One layer's routed experts on `rows` tokens.

    Args:
        config: shapes.
        layer: what stands behind its attention.
        rows: tokens, M.
        experts: how many different experts they chose; expected from uniform routing if None.
        weight_bytes: of an expert's weight; below 2 a float32 scale per output channel is read too.
        split: a device has its share of the experts, and of each one's width.
    """
    model, width = config.hidden_size, layer.expert_size / split.ffn
    if experts is None:
        experts = experts_read(rows, num_experts=layer.num_experts, experts_per_token=layer.experts_per_token)
    scales = 4 * (2 * width + model) if weight_bytes < 2 else 0
    weights = experts / split.experts * (3 * width * model * weight_bytes + scales)
    return Cost(bytes=weights + 2 * rows * model * ACTIVATION_BYTES,
                flops=2 * 3 * width * model * rows * layer.experts_per_token / split.experts)


def dense(config: ModelConfig, rows: float, width: int, *, split: Split = UNSPLIT) -> Cost:
    """A SwiGLU block of a width that every row goes through."""
    weights = 3 * config.hidden_size * width / split.ffn
    return Cost(bytes=(weights + 2 * rows * config.hidden_size) * ACTIVATION_BYTES, flops=2 * rows * weights)


def attention(config: ModelConfig, batch: float, window: float, context: int, *, split: Split = UNSPLIT) -> Cost:
    """One layer's attention of a window to its canvas, without the projections."""
    heads = config.num_heads / split.heads
    keys = 2 * batch * context * split.kv_heads(config) * config.head_dim
    queries = 2 * batch * window * heads * config.head_dim
    return Cost(bytes=(keys + queries) * ACTIVATION_BYTES,
                flops=4 * batch * heads * window * context * config.head_dim)


def projections(config: ModelConfig, layer: FeedForward, rows: float, *, split: Split = UNSPLIT) -> Cost:
    """One layer's query, key, value and output projections and its router: their weights, and the cache's new rows."""
    query_width = config.num_heads * config.head_dim / split.heads
    kv_width = split.kv_heads(config) * config.head_dim
    weights = config.hidden_size * (2 * query_width + 2 * kv_width + layer.num_experts)
    return Cost(bytes=(weights + 2 * rows * kv_width) * ACTIVATION_BYTES, flops=2 * rows * weights)


def unembed(config: ModelConfig, rows: float, *, expected: bool = False, split: Split = UNSPLIT) -> Cost:
    """The vocabulary head on `rows` positions and what a step reads of it (a few numbers a row).

    With `expected` the embedding is read too, and a row of it written for each position.
    """
    weights = config.vocab_size / split.vocab * config.hidden_size
    matrix = Cost(bytes=(weights + rows * config.hidden_size) * ACTIVATION_BYTES, flops=2 * rows * weights)
    return matrix * (1 + expected) + Cost(bytes=4 * 4 * rows, flops=0)


def forward_parts(
    config: ModelConfig, *, batch: float, window: int, context: int, head_rows: int,
    experts: float | None = None, weight_bytes: int = 2, expected: bool = False, split: Split = UNSPLIT,
) -> dict[str, Cost]:
    """A forward of `window` positions, by its parts, with the head on `head_rows` positions of each row.

    The last layer's experts are needed only where the head is. `experts` is the mean number of different experts that
    a layer reads, expected from uniform routing if None. With `expected` the head gives smoothing's embeddings too.
    Where the window is the whole context, positions are split too, if `split` says so.
    """
    own = batch / split.batch
    sequence = split.sequence if window == context else 1
    rows, last = own * window / sequence, own * head_rows
    layers = family_of(config).feed_forwards(config)
    behind = list(zip(layers, [rows] * (len(layers) - 1) + [last], strict=True))
    return {
        "attention": attention(config, own, window / sequence, context, split=split) * len(layers),
        "projections": total(projections(config, layer, rows, split=split) for layer in layers),
        "experts": total(moe(config, layer, some, experts=experts, weight_bytes=weight_bytes, split=split)
                         for layer, some in behind if layer.num_experts),
        "dense": total(dense(config, some, layer.dense_size, split=split)
                       for layer, some in behind if layer.dense_size),
        "head": unembed(config, last, expected=expected, split=split),
        "embed": Cost(bytes=own * window * config.hidden_size * ACTIVATION_BYTES, flops=0)}


def forward_exchanges(
    config: ModelConfig, *, batch: float, window: int, context: int, head_rows: int, split: Split,
    expected: bool = False,
) -> tuple[Exchange, ...]:
    """The collectives of such a forward: two sums in a layer, one of the embeddings, one reading of the head.

    With `expected` smoothing's embeddings are summed too, in float32. Where positions are split, a layer gathers keys
    and values, and the hidden states are gathered at the end.
    """
    own = batch / split.batch
    sequence = split.sequence if window == context else 1
    row = config.hidden_size * ACTIVATION_BYTES
    rows, last = own * window / sequence, own * head_rows
    kv = 2 * own * window * split.kv_heads(config) * config.head_dim * ACTIVATION_BYTES
    experts = split.experts * split.ffn
    summed = partial(Exchange, kind="all-reduce")
    planned = (
        summed(nbytes=rows * row, group=split.heads, count=config.num_layers),
        summed(nbytes=rows * row, group=experts, count=config.num_layers - 1),
        summed(nbytes=last * row, group=experts, count=1),
        summed(nbytes=own * window * row, group=split.vocab, count=1),
        summed(nbytes=last * config.hidden_size * 4, group=split.vocab, count=int(expected)),
        Exchange(kind="all-gather", nbytes=36 * last * split.vocab, group=split.vocab, count=1),
        Exchange(kind="all-gather", nbytes=kv, group=sequence, count=config.num_layers),
        Exchange(kind="all-gather", nbytes=own * window * row, group=sequence, count=1))
    return tuple(exchange for exchange in planned if exchange.group > 1 and exchange.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one forward at the machine's peaks: no implementation is much faster."""

    parts: Mapping[str, Cost]
    """On one device."""
    compute_seconds: float
    """Each part by whatever binds it, one after the other."""
    exchange_seconds: float
    """Collectives, none of them hidden behind anything."""

    @property
    def seconds(self) -> float:
        """Total over the whole forward."""
        return self.compute_seconds + self.exchange_seconds

    @property
    def cost(self) -> Cost:
        """Total of one device, all parts."""
        return total(self.parts.values())


def estimate_forward(
    config: ModelConfig, machine: Machine, *, batch: int, window: int, context: int, head_rows: int,
    expected: bool = False, split: Split = UNSPLIT,
) -> Estimate:
    """Seconds of a forward at best on `machine`s that hold their part each; arguments as in `forward_parts`."""
    parts = forward_parts(config, batch=batch, window=window, context=context, head_rows=head_rows,
                          expected=expected, split=split)
    exchanges = forward_exchanges(config, batch=batch, window=window, context=context, head_rows=head_rows,
                                  expected=expected, split=split)
    return Estimate(
        parts=parts, compute_seconds=sum(part.seconds(machine) for part in parts.values()),
        exchange_seconds=math.fsum(exchange.seconds(machine) for exchange in exchanges))
