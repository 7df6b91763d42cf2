"""Expert products with their weights on the right (x . W^T) against on the left (W . x^T), in turn, on CPU.

    python -m benchmarks.moe_sides           # a minute or two
    python -m benchmarks.moe_sides --tiny    # seconds; says nothing about speed

A pair is one pass through a few layers' experts by each side of `kernels_pallas.moe.xla_grouped`, alternating who
goes first; every layer has weights of its own, more than caches hold, as in a forward. Every pair gives the ratio
right / left of their times: above 1 the left is faster. The last column is how far the two sides' results are
apart, relative to the largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from benchmarks.harness import checkpoint, report

if TYPE_CHECKING:
    import jax

SIDES = {"right": False, "left": True}
COLUMNS = ("pass, batch, dtype", "rows", "ms right", "ms left", "right / left", "apart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    dtype: str
    batch: int
    """Rows of the batch, each with a window of positions."""
    gradient: bool


def matrices(shapes: dict[str, Any]) -> list[list[np.ndarray]]:
    """gate, up and down of every layer, random, float32."""
    model, width, experts = shapes["hidden_size"], shapes["expert_intermediate_size"], shapes["num_experts"]
    generator, wide = np.random.Generator(np.random.PCG64(0)), (experts, width, model)
    return [[np.float32(shape[2] ** -0.5) * generator.standard_normal(shape, dtype=np.float32)
             for shape in (wide, wide, (experts, model, width))] for _ in range(shapes["num_hidden_layers"])]


def operands(weights: list[list[np.ndarray]], *, rows: int, chosen: int, dtype: str) -> tuple[Any, list[Any]]:
    """x, and for every layer its routed experts, their weights and its matrices, as JAX arrays."""
    import jax.numpy as jnp

    generator = np.random.Generator(np.random.PCG64(1))
    experts, _, model = weights[0][0].shape
    layers = []
    for layer in weights:
        ids = generator.random((rows, experts)).argsort(axis=1)[:, :chosen]
        scores = generator.dirichlet(np.ones(chosen), rows)
        layers.append((jnp.asarray(ids, jnp.int32), jnp.asarray(scores, jnp.float32),
                       *(jnp.asarray(matrix, dtype) for matrix in layer)))
    return jnp.asarray(generator.standard_normal((rows, model)), dtype), layers


def passes(first: Any, held: list[Any], *, gradient: bool) -> dict[str, Callable[[], Any]]:
    """For each side what runs the pass and waits for it; both have run once."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.moe.xla_grouped import moe_xla_grouped

    def forward(one: Callable[..., Any]) -> Any:
        x = first
        for layer in held:
            x = one(x, *layer)
        return jax.block_until_ready(x)

    def backward(one: Callable[..., Any]) -> Any:
        grads: list[Any] = [(first,)]
        for layer in held:
            grads.append(one(grads[-1][0], *layer))  # a layer's gradient in x is the next one's x: they run in turn
        return jax.block_until_ready(grads)

    def loss(side: bool, x: jax.Array, ids: jax.Array, *rest: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(moe_xla_grouped(x, ids, *rest, weights_left=side).astype(jnp.float32) ** 2)

    found: dict[str, Callable[[], Any]] = {}
    for name, left in SIDES.items():
        grad = jax.grad(partial(loss, left), argnums=(0, 2, 3, 4, 5))
        found[name] = partial(backward, jax.jit(grad)) if gradient else partial(
            forward, jax.jit(partial(moe_xla_grouped, weights_left=left)))
        found[name]()
    return found


def apart(first: Any, second: Any) -> float:
    """Largest difference relative to the largest value of its array."""
    import jax

    worst = 0.0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        ours, theirs = np.asarray(a, np.float32), np.asarray(b, np.float32)
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    return worst


def measure(
    case: Case, weights: list[list[np.ndarray]], *, window: int, chosen: int, pairs: int
) -> dict[str, Any]:
    """Run the pairs of one case."""
    rows = case.batch * window
    x, layers = operands(weights, rows=rows, chosen=chosen, dtype=case.dtype)
    sides = passes(x, layers, gradient=case.gradient)
    difference = apart(sides["right"](), sides["left"]())
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(pairs):
        for name in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    ratios = [right / left for right, left in zip(seconds["right"], seconds["left"], strict=True)]
    spreads = {name: dataclasses.asdict(report.Spread.of(taken)) for name, taken in seconds.items()}
    return {"case": dataclasses.asdict(case), "rows": rows, "seconds": spreads,
            "ratio": dataclasses.asdict(report.Spread.of(ratios)), "apart": difference}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table."""
    cells = []
    for row in rows:
        case, seconds = row["case"], row["seconds"]
        name = f"{'gradient' if case['gradient'] else 'forward'}, {case['batch']}, {case['dtype']}"
        cells.append((name, str(row["rows"]), *(f"{1e3 * seconds[side]['median']:.2f}" for side in SIDES),
                      report.Spread(**row["ratio"]).show(), f"{row['apart']:.1e}"))
    console.print(report.table(f"Experts of a window, {report.machine()}", COLUMNS, cells))
    console.print("right / left: pair by pair, median (lowest to highest); above 1 the left is faster.",
                  highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_sides", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="pairs per row (default 9)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--window", type=int, default=32, help="positions of a row (default 32)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: seconds, no figures worth quoting")
    parser.add_argument("--out", type=Path, help="JSON file (default: none is written)")
    options = parser.parse_args(arguments)
    for name, values in (("--pairs", [options.pairs]), ("--batches", options.batches), ("--window", [options.window])):
        if min(values) < 1:
            parser.error(f"{name}: got {min(values)}; it must be at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"  # elsewhere another implementation runs
    shapes = checkpoint.TINY if options.tiny else checkpoint.MID_SIZE
    weights, chosen = matrices(shapes), shapes["num_experts_per_tok"]
    rows = [measure(Case(dtype=dtype, batch=batch, gradient=gradient), weights, window=options.window, chosen=chosen,
                    pairs=options.pairs)
            for gradient in (False, True) for dtype in options.dtypes for batch in options.batches]
    console = Console()
    show(rows, console if console.is_terminal else Console(width=max(console.width, 120)))
    if options.out is not None:
        settings = {"pairs": options.pairs, "window": options.window, "tiny": options.tiny, "model": shapes}
        report.save(options.out, {"benchmark": "moe_sides", **report.provenance("benchmarks.moe_sides"),
                                  "machine": report.machine(), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
