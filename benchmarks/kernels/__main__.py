"""Every op's implementations, on the shapes of LLaDA-MoE's forwards, against what bounds them.

    python -m benchmarks.kernels                     # needs a GPU: all ops and the checks
    python -m benchmarks.kernels --only moe,unembed --priorities 0
    python -m benchmarks.kernels --tiny              # toy shapes on any device, seconds

Baselines run beside the kernels: XLA's dense lowering, `lax.ragged_dot`, cuDNN's attention, the head with all logits
in memory, and tokamax if it is installed. What an implementation does not support is listed with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from benchmarks.harness import command
from benchmarks.harness.cases import Case, Sizes
from benchmarks.harness.ceilings import Ceilings
from benchmarks.kernels import baselines, checks
from benchmarks.kernels.ops import (
    QUANTIZED_DTYPES,
    Drawn,
    Op,
    attention_op,
    candidates,
    chained,
    moe_op,
    quantized_op,
    smoothing_op,
    unembed_op,
)
from kernels_pallas import attention, moe, moe_quantized, unembed
from kernels_pallas.attention import IMPLEMENTATIONS as ATTENTION
from kernels_pallas.moe import IMPLEMENTATIONS as MOE
from kernels_pallas.moe import QUANTIZED_IMPLEMENTATIONS
from kernels_pallas.unembed import IMPLEMENTATIONS as UNEMBED

GROUPS = ("check", "moe", "attention", "unembed", "tokamax")


def attention_ops(drawn: Drawn) -> Iterator[Op]:
    """The matrix, and a full refresh of the targets' canvas."""
    sizes = drawn.sizes
    _, context, batch = sizes.main
    yield attention_op(drawn, context, context, batch, 1)
    for batch in sizes.batches:
        for context in sizes.contexts:
            for window in sizes.windows:
                yield attention_op(drawn, window, context, batch, sizes.priority(window, context, batch))


def row_counts(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Rows of all windows and batches without repetition, and each count's priority; a full refresh's too."""
    _, context, batch = sizes.main
    found = {batch * context: 1}
    for some in sizes.batches:
        for positions in sizes.windows:
            priority = sizes.priority(positions, context, some)
            rows = some * positions
            found[rows] = min(priority, found.get(rows, priority))
    return iter(sorted(found.items()))


def op_cases(sizes: Sizes, ceilings: Ceilings, groups: Sequence[str]) -> Iterable[Case]:
    """The cases of the groups asked for."""
    drawn = Drawn(sizes)
    if "check" in groups:
        yield from checks.cases(drawn)
    for rows, priority in row_counts(sizes) if {"moe", "tokamax"} & set(groups) else ():
        op = moe_op(drawn, rows, priority)
        if "moe" in groups:
            for name in candidates(MOE):
                yield op.case(name, partial(moe, implementation=name), sizes, ceilings)
            yield op.case("lax.ragged_dot", baselines.moe_ragged_dot, sizes, ceilings)
            for dtype in QUANTIZED_DTYPES:
                quantized = quantized_op(drawn, rows, priority, dtype)
                for name in candidates(QUANTIZED_IMPLEMENTATIONS):
                    yield quantized.case(name, partial(moe_quantized, implementation=name), sizes, ceilings)
        if "tokamax" in groups:
            yield from baselines.tokamax_moe(op, sizes, ceilings)
    for op in attention_ops(drawn) if {"attention", "tokamax"} & set(groups) else ():
        if "attention" in groups:
            for name in candidates(ATTENTION):
                attend = lambda q, k, v, mask, name=name: attention(  # noqa: E731
                    q, k, v, key_mask=mask, implementation=name)
                yield op.case(name, chained(attend), sizes, ceilings)
        if "tokamax" in groups:
            yield from baselines.tokamax_attention(op, sizes, ceilings)
    window, _, batch = sizes.main
    for rows in sizes.head_rows() if "unembed" in groups else ():
        op = unembed_op(drawn, rows, 0 if rows == batch * sizes.block(window) else 1 if rows <= 128 else 2)
        for name in ("reference", *candidates(UNEMBED)):  # the reference is the plain head, all logits in memory
            read = lambda hidden, head, at, forbidden, limit, name=name: unembed(  # noqa: E731
                hidden, head, at=at, forbidden=forbidden, vocab_limit=limit, implementation=name)
            yield op.case(name, read, sizes, ceilings)
    for rows in (window,) if "unembed" in groups else ():
        op = smoothing_op(drawn, rows, 0)
        for name in ("reference", *candidates(UNEMBED)):
            read = lambda hidden, head, at, forbidden, limit, embedding, name=name: unembed(  # noqa: E731
                hidden, head, at=at, forbidden=forbidden, vocab_limit=limit, embedding=embedding, implementation=name)
            yield op.case(name, read, sizes, ceilings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.options("benchmarks.kernels", __doc__.partition("\n")[0], GROUPS)
    return command.run(command.parse(parser, arguments, GROUPS), "benchmarks.kernels", op_cases)


if __name__ == "__main__":
    sys.exit(main())
