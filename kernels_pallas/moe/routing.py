"""The order that brings the rows of one expert together, and blocks of it.

It is counted, not sorted: who comes before whom within an expert is one comparison and one sum. A row's place is a
gather away from that, and nothing is scattered.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

ALL_PAIRS = 2048
"""Up to this many routed rows each is compared with each; more are compared within chunks."""
CHUNK = 128


class Grouping(NamedTuple):
    """The S = M * k routed rows by expert; those of one expert keep their order."""

    key: Int[Array, "M k"]
    """The expert of each; E where the id selects none. These form a group behind all experts."""
    rank: Int[Array, "M k"]
    """Number of earlier rows with the same key."""
    start: Int[Array, " E+1"]
    """Number of rows with a smaller key: the positions at which groups start if they lie without gaps."""


def group_rows(expert_ids: Int[Array, "M k"], num_experts: int) -> Grouping:
    """The grouping of routed rows. Ids outside [0, E) select no expert; an id may occur twice in a row."""
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    key = jnp.where(valid, expert_ids, num_experts).astype(jnp.int32)
    flat = key.reshape(-1)
    start = jnp.sum(flat[None] < jnp.arange(num_experts + 1, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    rank = _rank_within(flat[None]) if len(flat) <= ALL_PAIRS else _rank_by_chunks(flat, num_experts)
    return Grouping(key=key, rank=rank.reshape(key.shape), start=start)


def _rank_within(keys: Int[Array, "chunks C"]) -> Int[Array, "chunks C"]:
    """Number of equal keys before each in its chunk."""
    index = jnp.arange(keys.shape[1], dtype=jnp.int32)
    before = (keys[:, :, None] == keys[:, None, :]) & (index[:, None] > index[None])[None]
    return jnp.sum(before, axis=2, dtype=jnp.int32)


def _rank_by_chunks(key: Int[Array, " S"], num_experts: int) -> Int[Array, " S"]:
    """Counted within chunks and between them: S * (C + E) comparisons instead of S * S."""
    chunks = -(-len(key) // CHUNK)
    keys = jnp.pad(key, (0, chunks * CHUNK - len(key)), constant_values=num_experts).reshape(chunks, CHUNK)
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    counts = jnp.sum(keys[:, :, None] == experts[None, None], axis=1, dtype=jnp.int32)  # [chunks, E + 1]
    earlier = jnp.arange(chunks, dtype=jnp.int32)[:, None] > jnp.arange(chunks, dtype=jnp.int32)[None]
    before = jnp.sum(jnp.where(earlier[:, :, None], counts, 0), axis=1, dtype=jnp.int32)
    return (jnp.take_along_axis(before, keys, axis=1) + _rank_within(keys)).reshape(-1)[: len(key)]


class Blocks(NamedTuple):
    """Places for routed rows in blocks of R rows, each of one expert.

    An expert's first block is start // R + e: never before the previous expert's last one, so that no sum over
    experts is needed, and S // R + E blocks are enough for any routing. Some of them stay empty.
    """

    place: Int[Array, "M k"]
    """Block * R + row within it; out of range where no expert is selected."""
    expert: Int[Array, " blocks"]
    """The expert of each block; E for an empty one."""


def num_blocks(routed: int, num_experts: int, *, rows: int) -> int:
    """Blocks of `rows` rows that hold `routed` rows whatever the routing."""
    return routed // rows + num_experts


def place_in_blocks(grouping: Grouping, *, rows: int) -> Blocks:
    """Places in blocks of `rows` rows."""
    key, rank, start = grouping
    num_experts = len(start) - 1
    total = num_blocks(key.size, num_experts, rows=rows)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    first = start[:-1] // rows + experts
    used = (start[1:] - start[:-1] + rows - 1) // rows
    place = (start[key] // rows + key) * rows + rank
    block = jnp.arange(total, dtype=jnp.int32)[:, None]
    mine = (block >= first[None]) & (block < (first + used)[None])
    expert = num_experts + jnp.sum(jnp.where(mine, (experts - num_experts)[None], 0), axis=1, dtype=jnp.int32)
    return Blocks(place=jnp.where(key < num_experts, place, total * rows), expert=expert)
