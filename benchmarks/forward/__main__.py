"""A LLaDA-MoE forward of full size with random weights, and the whole generation loop around it.

    python -m benchmarks.forward                          # needs a GPU with 40 GB free
    python -m benchmarks.forward --only loop --command-buffers none
    python -m benchmarks.forward --tiny                   # toy shapes on any device, seconds

A forward is what one step of the loop computes before it decides: a window against the cache, the experts of the last
layer and the head on the block only. `djax` is what djax picks for every op; `xla` is XLA's best lowering (dense
experts, cuDNN's attention, all logits in memory).
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from benchmarks.forward import loop
from benchmarks.forward.network import VARIANTS, Network, Variant, windowed_forward
from benchmarks.harness import command
from benchmarks.harness.cases import Case, Sizes
from benchmarks.harness.ceilings import Ceilings
from benchmarks.kernels.ops import compiled
from djax.plan import roofline

GROUPS = ("forward", "loop")
COMMAND_BUFFERS = {
    "default": (),
    "while": ("--xla_gpu_enable_command_buffer=+WHILE", "--xla_gpu_graph_min_graph_size=1"),
    "none": ("--xla_gpu_enable_command_buffer=",),
}
"""XLA's flags: by default the body of a while is one CUDA graph and the host drives the loop; with "while" the loop is
one graph; with "none" every kernel is launched by itself."""


def forward_cases(network: Network, ceilings: Ceilings) -> Iterator[Case]:
    """The matrix with djax's and XLA's ops; at the targets' shape every variant and a full refresh."""
    sizes = network.sizes
    read = {window: statistics.mean(counts) for window, counts in network.experts_read(sizes.windows).items()}
    main_window, main_context, main_batch = sizes.main
    block = sizes.block(main_window)

    def case(variant: str, window: int, context: int, batch: int, head: int, priority: int) -> Case:
        return Case(
            group="forward", implementation=variant, priority=priority,
            shape={"batch": batch, "window": window, "context": context},
            prepare=lambda: _prepare(network, ceilings, VARIANTS[variant], window, context, batch, head,
                                     read.get(window) if batch == 1 else None))

    main = (main_window, main_context, main_batch, block)
    refresh = (main_context, main_context, main_batch, block)
    for variant, shape in (("djax", main), ("xla", main), ("djax.int8", main), ("djax", refresh),
                           ("djax.float8_e4m3fn", main), ("xla", refresh), ("xla.no_cudnn", main)):
        yield case(variant, *shape, 0)
    for variant in VARIANTS:
        if variant.startswith("xla.djax"):  # one op at a time
            yield case(variant, *main, 1)
    for batch in sizes.batches:
        for context in sizes.contexts:
            for window in sizes.windows:
                if (window, context, batch) != sizes.main:
                    for variant in ("djax", "xla"):
                        yield case(variant, window, context, batch, sizes.block(window),
                                   sizes.priority(window, context, batch))
        if batch != main_batch:
            for variant in ("djax.int8", "djax.float8_e4m3fn"):
                yield case(variant, main_window, main_context, batch, block, 2)


def _prepare(
    network: Network, ceilings: Ceilings, variant: Variant, window: int, context: int, batch: int, head: int,
    experts: float | None,
) -> Callable[[], dict[str, Any]]:
    sizes = network.sizes
    shapes = jax.eval_shape(lambda: (network.cache(batch, context), network.window(batch, window, context)))
    program = compiled(
        windowed_forward(network.graphdef(variant), variant, sizes, head),
        (shapes[0], network.params, network.abstract_quantized(variant.experts), *shapes[1]), donate_argnums=0)
    cost = roofline.total(roofline.forward_parts(
        sizes.config, batch=batch, window=window, context=context, head_rows=head, experts=experts,
        weight_bytes=2 if variant.experts is None else 1).values())

    def act() -> dict[str, Any]:
        operands = (network.params, network.quantized(variant.experts), *network.window(batch, window, context))
        taken = loop.timed_forward(network, program, operands, batch, context)
        return {
            **taken.per(1), **dataclasses.asdict(cost), **ceilings.shares(cost, taken.seconds.median),
            "experts_read": experts, "block": head, "forwards_per_second": 1 / taken.seconds.median,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes}

    return act


def use_command_buffers(name: str) -> None:
    """Ask XLA for them. It reads its flags when JAX first uses a device, so this comes before."""
    if COMMAND_BUFFERS[name]:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *COMMAND_BUFFERS[name]]).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.options("benchmarks.forward", __doc__.partition("\n")[0], GROUPS)
    parser.add_argument("--command-buffers", default="while", choices=list(COMMAND_BUFFERS),
                        help="how the loop becomes CUDA graphs (default while)")
    found = command.parse(parser, arguments, GROUPS)
    use_command_buffers(found.command_buffers)

    def cases(sizes: Sizes, ceilings: Ceilings, groups: Sequence[str]) -> Iterable[Case]:
        network = Network(sizes)
        if "forward" in groups:
            yield from forward_cases(network, ceilings)
        if "loop" in groups:
            yield from loop.cases(network, ceilings, found.command_buffers)

    return command.run(found, "benchmarks.forward", cases)


if __name__ == "__main__":
    sys.exit(main())
