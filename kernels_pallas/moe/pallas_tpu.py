"""The experts on a TPU: rows sorted by expert, three grouped products by the megablox kernel that ships with JAX.

It reads the weights of the experts that have rows, once for each 128 rows of theirs, and multiplies no others: worth
it where rows are many. With few, `moe_xla_dense` reads the same weights once as well, computes under them (on a v5e
for up to 240 rows) and moves no rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.configs import load_config
from kernels_pallas.gradient import with_gradient_of
from kernels_pallas.hardware import device_kind
from kernels_pallas.moe.routing import group_rows
from kernels_pallas.moe.xla_grouped import moe_xla_grouped


def moe_pallas_tpu(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
    *,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe`. Reverse mode only, through `moe_xla_grouped`; `interpret` runs it on a CPU."""
    call = with_gradient_of(moe_xla_grouped, partial(_forward, interpret=interpret))
    return call(x, expert_ids, weights, gate, up, down)


def _forward(
    x: Array, expert_ids: Array, weights: Array, gate: Array, up: Array, down: Array, *, interpret: bool
) -> Array:
    # not at the top: only a TPU needs the kernel
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    config = load_config("moe", device_kind=device_kind(), regime="pallas_tpu")
    routed, slots = expert_ids.size, expert_ids.shape[1]
    key, rank, start = group_rows(expert_ids, gate.shape[0])
    position = start[key] + rank
    rows = min(config["rows"], -(-routed // 16) * 16)
    padded = -(-routed // rows) * rows
    source = jnp.zeros(padded, jnp.int32).at[position.reshape(-1)].set(jnp.arange(routed, dtype=jnp.int32) // slots)
    sizes = start[1:] - start[:-1]

    def product(rows_in: Array, matrix: Array) -> Array:
        _, outputs, inputs = matrix.shape
        tiling = rows, min(config["inputs"], inputs), min(config["outputs"], outputs)
        # float32 operands mean float32 products, here as in the implementations by XLA
        with jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default"):
            return gmm(rows_in, matrix, sizes, jnp.float32, tiling, transpose_rhs=True, interpret=interpret)

    by_expert = x[source]
    hidden = (jax.nn.silu(product(by_expert, gate)) * product(by_expert, up)).astype(x.dtype)
    outputs = product(hidden, down)
    total = jnp.zeros(x.shape, jnp.float32)
    for slot in range(slots):  # slot by slot: no [M, k, D] array
        here = key[:, slot, None] < gate.shape[0]
        total += jnp.where(here, weights[:, slot, None].astype(jnp.float32) * outputs[position[:, slot]], 0.0)
    return total.astype(x.dtype)
