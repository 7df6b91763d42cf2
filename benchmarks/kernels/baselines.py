"""Baselines of the kernels beside XLA's lowerings that ship with them: `lax.ragged_dot` and tokamax.

tokamax (google's kernels for JAX) is not a dependency; where it is not installed its cases say so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.harness.cases import Case, Sizes, Unsupported
from benchmarks.harness.ceilings import Ceilings
from benchmarks.kernels.ops import Op, chained

RaggedDot = Callable[..., Float[Array, "S N"]]
TOKAMAX = ("mosaic", "triton", "xla")
"""Its implementations that a GPU may have."""


def moe_ragged_dot(
    x: Float[Array, "M D"], expert_ids: Int[Array, "M k"], weights: Float[Array, "M k"], gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"], down: Float[Array, "E D F"],
) -> Float[Array, "M D"]:
    """The op `moe` by `lax.ragged_dot` on sorted rows; the transposes of the weights are views for XLA to use."""
    return _moe_by_groups(x, expert_ids, weights, *(matrix.swapaxes(1, 2) for matrix in (gate, up, down)),
                          ragged_dot=jax.lax.ragged_dot)


def _moe_by_groups(
    x: Float[Array, "M D"], expert_ids: Int[Array, "M k"], weights: Float[Array, "M k"], gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"], down: Float[Array, "E F D"], *, ragged_dot: RaggedDot,
) -> Float[Array, "M D"]:
    """Rows sorted by expert, three products in groups, and each row's weighted sum."""
    rows, slots = expert_ids.shape
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.sum(flat[:, None] == jnp.arange(gate.shape[0]), axis=0, dtype=jnp.int32)
    spread = x[order // slots]
    hidden = jax.nn.silu(ragged_dot(spread, gate, sizes).astype(jnp.float32))
    hidden = (hidden * ragged_dot(spread, up, sizes).astype(jnp.float32)).astype(x.dtype)
    mixed = ragged_dot(hidden, down, sizes)[jnp.argsort(order)].reshape(rows, slots, -1)
    return jnp.sum(mixed.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype)


def missing_tokamax() -> str | None:
    """Why tokamax cannot be measured, or None."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    try:
        import tokamax  # noqa: F401
    except Exception as error:
        return f"tokamax {importlib.metadata.version('tokamax')} does not import: {error}"
    return None


def tokamax_case(op: Op, name: str, function: Callable[..., Any], sizes: Sizes, ceilings: Ceilings) -> Case:
    """A case that is unsupported where tokamax is missing."""
    case = op.case(f"tokamax.{name}", function, sizes, ceilings)

    def prepare() -> Callable[[], dict[str, Any]]:
        reason = missing_tokamax()
        if reason is not None:
            raise Unsupported(reason)
        return case.prepare()

    return dataclasses.replace(case, prepare=prepare)


def tokamax_moe(op: Op, sizes: Sizes, ceilings: Ceilings) -> Iterator[Case]:
    """The op `moe` by its grouped product, which wants [E, D, F]: the transposed copies are made beforehand."""
    gate, up, down = (jax.ShapeDtypeStruct((matrix.shape[0], *matrix.shape[:0:-1]), matrix.dtype)
                      for matrix in op.operands[3:])

    def draw() -> list[tuple[Any, ...]]:
        (sets,) = op.draw()
        return [(*sets[:3], *(matrix.swapaxes(1, 2).copy() for matrix in sets[3:]))]

    turned = dataclasses.replace(op, operands=(*op.operands[:3], gate, up, down), draw=draw)
    for name in TOKAMAX:
        def function(*operands: Any, name: str = name) -> Any:
            import tokamax

            return _moe_by_groups(*operands, ragged_dot=partial(tokamax.ragged_dot, implementation=name))

        yield tokamax_case(turned, name, function, sizes, ceilings)


def tokamax_attention(op: Op, sizes: Sizes, ceilings: Ceilings) -> Iterator[Case]:
    """The op `attention`, with the mask of keys that it takes."""
    for name in TOKAMAX:
        def attend(query: Any, key: Any, value: Any, mask: Any, name: str = name) -> Any:
            import tokamax

            return tokamax.dot_product_attention(query, key, value, mask=mask[:, None, None], implementation=name)

        yield tokamax_case(op, name, chained(attend), sizes, ceilings)
