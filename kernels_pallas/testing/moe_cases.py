"""The cases that every implementation of `moe` runs, and a float64 NumPy loop as their oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and what is special about it."""

    name: str
    rows: int
    slots: int
    experts: int = 6
    width: int = 12
    model: int = 20
    dtype: str = "float32"
    routing: str = "top_k"


CASES = (
    Case(name="one_row", rows=1, slots=2),
    Case(name="one_row_one_slot", rows=1, slots=1),
    Case(name="fewer_rows_than_a_block", rows=3, slots=2),
    Case(name="rows_no_multiple_of_the_block", rows=37, slots=3),
    Case(name="several_blocks_to_an_expert", rows=64, slots=2, experts=4),
    Case(name="every_expert_chosen", rows=10, slots=6),
    Case(name="one_expert_in_all", rows=9, slots=1, experts=1),
    Case(name="all_rows_to_one_expert", rows=40, slots=1, routing="last"),
    Case(name="same_experts_for_all", rows=40, slots=2, routing="first_two"),
    Case(name="blocks_of_every_size", rows=130, slots=2, experts=8, routing="uneven"),
    Case(name="empty_experts", rows=16, slots=2, experts=40),
    Case(name="an_expert_twice", rows=12, slots=3, routing="twice"),
    Case(name="ids_out_of_range", rows=21, slots=3, routing="out_of_range"),
    Case(name="no_expert_at_all", rows=5, slots=2, routing="nowhere"),
    Case(name="bfloat16", rows=37, slots=3, dtype="bfloat16"),
    Case(name="bfloat16_one_row", rows=1, slots=2, dtype="bfloat16"),
    Case(name="odd_sizes", rows=11, slots=2, experts=5, width=7, model=3),
)

BLOCKS: dict[str, Any] = {"experts": 4, "width": 128, "model": 128, "dtype": "bfloat16"}
"""Cases that kernels of fixed tiles take, and an interpreter can bear."""
KERNEL_CASES = (
    Case(name="one_row", rows=1, slots=2, **BLOCKS),
    Case(name="rows_no_multiple_of_the_block", rows=21, slots=2, **BLOCKS),
    Case(name="all_rows_to_one_expert", rows=40, slots=1, routing="last", **BLOCKS),
    Case(name="overfull_and_empty_experts", rows=70, slots=2, routing="uneven", **(BLOCKS | {"experts": 9})),
    Case(name="an_expert_twice", rows=12, slots=3, routing="twice", **BLOCKS),
    Case(name="ids_out_of_range", rows=21, slots=3, routing="out_of_range", **BLOCKS),
    Case(name="no_expert_at_all", rows=5, slots=2, routing="nowhere", **BLOCKS),
    Case(name="wide", rows=9, slots=2, **(BLOCKS | {"width": 384, "model": 256})),
)


def route(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Expert ids [M, k]."""
    shape = (case.rows, case.slots)
    if case.routing == "last":
        return np.full(shape, case.experts - 1)
    if case.routing == "first_two":
        return np.broadcast_to(np.arange(2), shape).copy()
    if case.routing == "uneven":
        return np.sort(np.minimum(rng.geometric(0.35, shape) - 1, case.experts - 1), axis=0)
    if case.routing == "nowhere":
        return np.full(shape, case.experts)
    ids = np.argsort(rng.random((case.rows, case.experts)), axis=1)[:, : case.slots]
    if case.routing == "twice":
        ids[:, 1] = ids[:, 0]
    if case.routing == "out_of_range":
        ids[::2, 0] = -1
        ids[::3, 1] = case.experts
        ids[1::5, 2] = 10**6
    return ids


def operands(case: Case, seed: int) -> tuple[Any, ...]:
    """x, expert_ids, weights, gate, up, down as JAX arrays."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)  # noqa: E731
    ids = jnp.asarray(route(case, rng), jnp.int32)
    weights = jnp.asarray(rng.random(ids.shape), jnp.float32)
    return (
        normal(case.rows, case.model), ids, weights, normal(case.experts, case.width, case.model),
        normal(case.experts, case.width, case.model), normal(case.experts, case.model, case.width))


def oracle(x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any) -> np.ndarray:
    """The op as a loop over rows and slots in float64."""
    x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
    out = np.zeros_like(x)
    for row, experts in enumerate(np.asarray(ids)):
        for slot, expert in enumerate(experts):
            if 0 <= expert < gate.shape[0]:
                before = gate[expert] @ x[row]
                hidden = before / (1 + np.exp(-before)) * (up[expert] @ x[row])
                out[row] += weights[row, slot] * (down[expert] @ hidden)
    return out
