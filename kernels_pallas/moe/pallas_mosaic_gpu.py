"""The experts on a Hopper GPU: rows spread to blocks of one expert, two kernels of products, a weighted gather.

The first product projects to gate and up and applies SwiGLU, the second projects down. Each chosen expert's weights
are read once, expert by expert, and what pads a block is neither read nor written. An expert's output is rounded to
x's dtype before the router's weight is applied to it in float32.

Why the block sizes of `configs.json`: a wgmma with up to 32 rows takes as long as reading 64 x 16 weights from shared
memory does, so that blocks of 32 rows cost what blocks of 16 do, and at 96 rows of 8 experts out of 64 (12 rows an
expert) hardly an expert needs two. 128 outputs to a program keep the rows' traffic at an eighth of the weights'. Two
programs fit a multiprocessor with 108 KB each, of which at least 72 KB are on their way: at 4.3 TB/s and a
microsecond's latency 33 KB a multiprocessor would do. Refreshing has a hundred rows an expert and more, and is bound
by tensor cores: 128 rows by 2 x 128 outputs, two warpgroups multiplying, one copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.configs import load_config
from kernels_pallas.gradient import with_gradient_of
from kernels_pallas.hardware import device_kind
from kernels_pallas.moe.quantized import QuantizedExperts
from kernels_pallas.moe.routing import group_rows, num_blocks, place_in_blocks
from kernels_pallas.moe.xla_grouped import moe_xla_grouped

MOST_PAIRS = 16384
"""Up to this many routed rows one kernel makes the plan by comparing all pairs; XLA makes it for more."""


def regime(num_rows: int, slots: int, num_experts: int) -> str:
    """The block sizes of `configs.json` for M rows of k experts each, by an expert's expected share.

    Of a shard of the experts most ids select none: where k is a large part of E, an eighth of the rows is expected.
    """
    share = num_rows * min(slots / num_experts, 1 / 8)
    return next((name for limit, name in ((4, "few_rows"), (20, "decode"), (48, "batch")) if share <= limit), "refresh")


@partial(jax.jit, static_argnames="interpret")  # so that a model's layers share one tracing
def moe_mosaic_gpu(
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

    def forward(x: Array, expert_ids: Array, weights: Array, gate: Array, up: Array, down: Array) -> Array:
        return _experts(x, expert_ids, weights, (gate, up), (down,), (), (), bits="", interpret=interpret)

    return with_gradient_of(moe_xla_grouped, forward)(x, expert_ids, weights, gate, up, down)


@partial(jax.jit, static_argnames="interpret")
def moe_quantized_mosaic_gpu(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    experts: QuantizedExperts,
    *,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe_quantized`: weights are cast in registers, products scaled. No gradient."""
    return _experts(
        x, expert_ids, weights, (experts.gate, experts.up), (experts.down,),
        (experts.gate_scale, experts.up_scale), (experts.down_scale,), bits="_8_bits", interpret=interpret)


def _experts(
    x: Array, expert_ids: Array, weights: Array, pair: Sequence[Array], single: Sequence[Array],
    pair_scales: Sequence[Array], single_scales: Sequence[Array], *, bits: str, interpret: bool,
) -> Array:
    # not at the top: the module is imported on machines whose JAX has no Mosaic GPU
    from kernels_pallas.moe.mosaic_gpu_kernels import fitting_tile, grouped_product, mix_rows, spread_rows

    num_experts, width, model = pair[0].shape
    routed, slots = expert_ids.size, expert_ids.shape[1]
    config = load_config("moe", device_kind=device_kind(), regime=regime(len(x), slots, num_experts) + bits)
    rows, blocks = config["rows"], num_blocks(routed, num_experts, rows=config["rows"])
    place, expert = _plan(expert_ids, num_experts, rows=rows, interpret=interpret)
    product = partial(grouped_product, expert, blocks=blocks, interpret=interpret)
    spread = spread_rows(x, place, slots=slots, num_places=rows * blocks, interpret=interpret)
    hidden = product(spread, pair, pair_scales, tile=fitting_tile(config, "gate_up", outputs=width, inputs=model))
    outputs = product(hidden, single, single_scales, tile=fitting_tile(config, "down", outputs=model, inputs=width))
    return mix_rows(outputs, place, weights.astype(jnp.float32), interpret=interpret)


def _plan(
    expert_ids: Int[Array, "M k"], num_experts: int, *, rows: int, interpret: bool
) -> tuple[Int[Array, " places"], Int[Array, " entries"]]:
    """The flat place of every routed row and the expert of every block, each possibly with more behind."""
    if expert_ids.size <= MOST_PAIRS:
        from kernels_pallas.moe.mosaic_gpu_routing import plan_kernel

        return plan_kernel(expert_ids, num_experts, rows=rows, interpret=interpret)
    blocks = place_in_blocks(group_rows(expert_ids, num_experts), rows=rows)
    return blocks.place.reshape(-1), blocks.expert
