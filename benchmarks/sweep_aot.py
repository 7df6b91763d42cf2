"""Programs of every small size compiled for hardware that is not here: what is chosen by default is also accepted.

    JAX_PLATFORMS=cpu python -m benchmarks.sweep_aot                # one H200: block lengths, prompts, logits to 65
    JAX_PLATFORMS=cpu python -m benchmarks.sweep_aot --topology v5e:1x1
    JAX_PLATFORMS=cpu python -m benchmarks.sweep_aot --largest 9    # the first sizes, minutes

A model of two layers with heads of 128 runs in bfloat16. A generation's program is compiled for every block length and
every prompt length, once where several share it (prompts are rounded up), a forward for every number of tokens. Needs
the extra `aot`. Prints a line for each program that is refused, then the counts; exits with 1 if one is. How far
it came goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax import recipes
from djax.contracts.canvas import Canvas
from djax.contracts.types import Denoiser
from djax.engine.program import Program
from djax.loop.denoise import denoise
from djax.models import abstract_params
from djax.models.config import LladaMoeConfig
from djax.plan.topology import compile_for, devices

CONFIG = LladaMoeConfig(
    vocab_size=1024, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128, num_experts=8,
    experts_per_token=2, expert_size=128, rms_norm_eps=1e-5, rope_theta=50000.0, max_positions=8192, mask_id=1000,
    eos_id=1001, pad_id=1001)
OPTIONS = {"xla_backend_optimization_level": 0}
"""A program is accepted or not whatever LLVM makes of it."""
KINDS = ("block length", "prompt", "logits")


def generation(denoiser: Denoiser, prompt: int, block_length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One row of two blocks with the default recipe, and its operands."""
    recipe = recipes.dinfer()
    canvas = Canvas.from_prompts([[1] * prompt], max_new_tokens=2 * block_length, block_length=block_length,
                                 mask_id=CONFIG.mask_id, pad_id=CONFIG.pad_id)

    def run(params: Any, canvas: Canvas, words: jax.Array) -> Any:
        return denoise(
            denoiser, params, canvas, jax.random.wrap_key_data(words), strategy=recipe.strategy,
            cache_policy=recipe.cache_policy, smoothing=recipe.smoothing, transform=recipe.transform)

    return run, (abstract_params(CONFIG), canvas, jax.ShapeDtypeStruct((2,), jnp.uint32))


def forward(program: Program, tokens: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One row's logits, and its operands."""
    shape = (1, tokens)
    ids = np.zeros(shape, np.int32)
    return (lambda params, *row: program.logits(program.denoiser, params, *row)), (
        abstract_params(CONFIG), ids, np.ones(shape, bool), ids)


def programs(largest: int) -> Iterator[tuple[str, int, Callable[..., Any], tuple[Any, ...]]]:
    """Kind, size, function and operands, in the order of KINDS."""
    program = Program(CONFIG)
    denoiser = program.denoiser
    sizes = range(1, largest + 1)
    for size in sizes:
        yield "block length", size, *generation(denoiser, 5, size)
    for size in sizes:
        yield "prompt", size, *generation(denoiser, size, 32)
    for size in sizes:
        yield "logits", size, *forward(program, size)


def shapes_of(operands: Any) -> Any:
    """Key of a compiled program: shapes, dtypes, and static fields."""
    leaves, tree = jax.tree.flatten(operands)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def sweep(topology: str, largest: int) -> tuple[dict[str, int], int, list[str]]:
    """Sizes seen by kind, programs compiled, and a line for each that was refused."""
    device = devices(topology)[0]
    seen = dict.fromkeys(KINDS, 0)
    compiled: set[Any] = set()
    refused = []
    for kind, size, function, operands in programs(largest):
        seen[kind] += 1
        key = (kind == "logits", *shapes_of(operands))
        if key in compiled:
            continue
        compiled.add(key)
        try:
            compile_for(device, function, operands, options=OPTIONS)
        except Exception as error:
            refused.append(f"{kind} {size}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            print(refused[-1], flush=True)
        if len(compiled) % 10 == 0:
            print(f"{len(compiled)} programs, at {kind} {size}", file=sys.stderr, flush=True)
    return seen, len(compiled), refused


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="h200:1", help="as `djax plan` takes it")
    parser.add_argument("--largest", type=int, default=65, help="sizes from 1 to this one")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    seen, count, refused = sweep(given.topology, given.largest)
    sizes = ", ".join(f"{number} of {kind}" for kind, number in seen.items())
    print(f"{given.topology}, jax {jax.__version__}: {sizes}; {count} programs, {count - len(refused)} compiled, "
          f"{len(refused)} refused, {time.monotonic() - started:.0f} s")
    return bool(refused)


if __name__ == "__main__":
    raise SystemExit(main())
