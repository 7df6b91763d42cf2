"""The readout in one TPU kernel: logits live in VMEM only (Pallas).

The grid goes through the vocabulary in tiles, one after the other, and running values stay in VMEM scratch. Reading
the head is the cost, 644 MB of bfloat16 for LLaDA-MoE: the pipeline fetches a tile while the one before is worked on.
Up to 256 rows are taken at once, so that the head is read once for them; more rows go through it again, which at 256
rows is near the ridge of a v5e (240 FLOP a byte) and above that of a v5p.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.configs import load_config
from kernels_pallas.hardware import device_kind
from kernels_pallas.unembed.reference import matmul, readable
from kernels_pallas.unembed.running import (
    Drawn,
    Greedy,
    Tile,
    add_drawn,
    add_greedy,
    finish,
    logits_at,
    start_drawn,
    start_greedy,
)
from kernels_pallas.unembed.types import Call, Readout

_SUBLANES = 16
"""Rows come in multiples of it: the height of a bfloat16 tile."""


def _kernel(
    numbers_ref: Any, temperature_ref: Any, hidden_ref: Any, head_ref: Any, *refs: Any,
    vocabulary: int, num_forbidden: int, draw: bool, second: bool, entropy: bool,
) -> None:
    """One tile of the vocabulary for one tile of rows. `numbers_ref`: limit, first id, forbidden ids."""
    words_ref, refs = (refs[0], refs[1:]) if draw else (None, refs)
    greedy_out, drawn_out = Greedy(*refs[:5]), Drawn(*refs[5:9]) if draw else None
    step, rows, columns = pl.program_id(1), hidden_ref.shape[0], head_ref.shape[0]
    # The outputs' blocks stay in VMEM while the vocabulary goes by: they are the running values.
    read = lambda state: type(state)(*(ref[...] for ref in state))  # noqa: E731

    def write(state: Any, values: Any) -> None:
        for ref, value in zip(state, values, strict=True):
            ref[...] = value

    @pl.when(step == 0)
    def _start() -> None:
        write(greedy_out, start_greedy(rows))
        if drawn_out is not None:
            write(drawn_out, start_drawn(rows))

    logits = matmul(hidden_ref[...], head_ref[...], contract=(1, 1))
    place = lax.broadcasted_iota(jnp.int32, (rows, columns), 1) + step * columns
    fresh = place < vocabulary
    ids = place + numbers_ref[1]
    allowed = fresh & (ids < numbers_ref[0])
    for index in range(num_forbidden):
        allowed &= ids != numbers_ref[2 + index]
    # past the vocabulary's end a block holds anything, a NaN too
    tile = Tile(jnp.where(fresh, logits, 0.0), ids, fresh, allowed)
    before = read(greedy_out)
    after = add_greedy(before, tile, second=second, entropy=entropy)
    write(greedy_out, after)
    if drawn_out is not None and words_ref is not None:
        temperature = temperature_ref[0]

        @pl.when(temperature > 0)
        def _draw() -> None:
            write(drawn_out, add_drawn(
                read(drawn_out), tile, (before.best_logit, after.best_logit), temperature=temperature,
                key_words=(words_ref[:, :1], words_ref[:, 1:])))


def unembed_pallas_tpu(
    call: Call, *, rows: int | None = None, ids: int | None = None, interpret: bool = False
) -> Readout:
    """See `kernels_pallas.unembed.unembed`. `rows` and `ids` of a tile are the configured ones if None."""
    config = load_config("unembed", device_kind=device_kind(), regime="pallas_tpu")
    count, width = call.hidden.shape
    vocabulary = call.head.shape[0]
    rows = min(rows or config["rows"], pl.cdiv(count, _SUBLANES) * _SUBLANES)
    padded, ids = pl.cdiv(count, rows) * rows, ids or config["ids"]
    pad = lambda array: jnp.pad(array, ((0, padded - count), (0, 0)))  # noqa: E731
    draw = call.temperature is not None and call.noise_keys is not None
    numbers = jnp.concatenate([jnp.stack([call.vocab_limit, call.first_id]), call.forbidden])
    temperature = jnp.zeros((), jnp.float32) if call.temperature is None else call.temperature
    column = pl.BlockSpec((rows, 1), lambda row, step: (row, 0))
    fields = [*start_greedy(padded), *(start_drawn(padded) if draw else ())]
    shapes = [jax.ShapeDtypeStruct(field.shape, field.dtype) for field in fields]
    operands = [numbers, temperature[None], pad(call.hidden), call.head]
    if call.noise_keys is not None and draw:
        operands.append(pad(call.noise_keys))
    values = pl.pallas_call(
        functools.partial(
            _kernel, vocabulary=vocabulary, num_forbidden=call.forbidden.shape[0], draw=draw, second=call.second,
            entropy=call.entropy),
        out_shape=shapes,
        grid=(padded // rows, pl.cdiv(vocabulary, ids)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, width), lambda row, step: (row, 0)),
            pl.BlockSpec((ids, width), lambda row, step: (step, 0)),
            *([pl.BlockSpec((rows, 2), lambda row, step: (row, 0))] if draw else [])],
        out_specs=[column] * len(shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=config["vmem"]),
        interpret=interpret)(*operands)
    states = [value[:count] for value in values]
    return finish(
        call, Greedy(*states[:5]), Drawn(*states[5:]) if draw else None, at=logits_at(call, readable(call)))
