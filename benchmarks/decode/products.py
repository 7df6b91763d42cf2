"""The float32 products of a checkpoint's layer, alone: how fast XLA's and PyTorch's matrix libraries are here.

A ratio between two engines says as much about the processor as about them where one library is the better on it.
Each product is timed as a chain, every factor its own weights as in a forward: nothing merges, nothing runs side by
side, and the weights are not all in a cache.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.decode.engines import Case

RUNS = 3
"""Repetitions, of which a rate is the median."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """x @ w @ w' @ ..., one layer's weights of a kind."""

    name: str
    """"attention" or "experts"."""
    span: str
    """The computed step: "window" or "refresh"."""
    rows: int
    sizes: tuple[int, ...]
    """Columns of x, and of what every factor makes."""

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * sum(inner * outer for inner, outer in zip(self.sizes, self.sizes[1:], strict=False))

    def operands(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """x and the weights, random; values stay of size one along the chain."""
        generator = np.random.Generator(np.random.PCG64(0))
        factors = [np.float32(inner**-0.5) * generator.standard_normal((inner, outer), dtype=np.float32)
                   for inner, outer in zip(self.sizes, self.sizes[1:], strict=False)]
        return generator.standard_normal((self.rows, self.sizes[0]), dtype=np.float32), factors


def of_case(case: Case, shapes: dict[str, Any]) -> tuple[Product, ...]:
    """The products of a decoder: of its windows, if it has a cache, and of a refresh.

    An expert gets an even share of the routed rows.
    """
    model, width, experts = shapes["hidden_size"], shapes["expert_intermediate_size"], shapes["num_experts"]
    spans = {"refresh": case.canvas_length}
    if case.cache != "none":
        spans = {"window": min(case.before + case.block_length + case.after, case.canvas_length)} | spans
    products = []
    for span, length in spans.items():
        rows = case.batch * length
        share = math.ceil(rows * shapes["num_experts_per_tok"] / experts)
        products += [Product(name="attention", span=span, rows=rows, sizes=(model,) * 5),  # q, k, v, o
                     Product(name="experts", span=span, rows=share, sizes=(model,) + (width, model) * experts)]
    return tuple(products)


def in_xla(product: Product) -> Callable[[], Any]:
    """The chain as one jitted program; a call waits for it."""
    import jax
    import jax.numpy as jnp

    x, weights = jax.tree.map(jnp.asarray, product.operands())

    @jax.jit
    def chain(x: Any, weights: list[Any]) -> Any:
        for weight in weights:
            x = x @ weight
        return x

    return lambda: chain(x, weights).block_until_ready()


def in_torch(product: Product) -> Callable[[], Any]:
    """The chain in eager PyTorch, on the threads that it is set to."""
    import torch

    x, weights = product.operands()
    first, factors = torch.from_numpy(x), [torch.from_numpy(weight) for weight in weights]

    @torch.inference_mode()
    def chain() -> torch.Tensor:
        result = first
        for factor in factors:
            result = result @ factor
        return result

    return chain


def gflops(multiply: Callable[[], Any], flops: int, *, runs: int = RUNS) -> float:
    """GFLOP/s of `multiply`, the median of some runs after a warm-up."""
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    return flops / float(np.median(seconds[1:])) / 1e9


class Rates:
    """Products that are made ready once and measured in turn with something else."""

    def __init__(self, library: Callable[[Product], Callable[[], Any]]) -> None:
        self._library = library
        self._ready: dict[Product, Callable[[], Any]] = {}

    def __call__(self, products: tuple[Product, ...]) -> list[float]:
        """GFLOP/s of each."""
        for product in products:
            if product not in self._ready:
                self._ready[product] = self._library(product)
        return [gflops(self._ready[product], product.flops) for product in products]
