"""How device time is taken: many calls queued, one wait at the end, the median of several such samples.

Waiting for every call would add the host's latency to each. What runs is rotated over enough operands that the last
level of the device's cache cannot hold them (see `copies_beyond_cache`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.report import Spread

CACHE_BYTES = 64 * 2**20
"""Above the 50 MB of an H100's or H200's L2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to measure."""

    sample_seconds: float = 0.04
    """One sample queues about this much device time."""
    samples: int = 7
    max_calls: int = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call."""

    seconds: Spread
    calls: int
    """In each sample."""
    host_share: float
    """Part of the time that the host spent queueing: near 1 the host is the limit and not the device."""

    def per(self, units: int) -> dict[str, Any]:
        """Give JSON; each call is `units` executions of what is timed."""
        seconds = dataclasses.asdict(self.seconds)
        return {"seconds": {name: value / units for name, value in seconds.items()}, "calls": self.calls * units,
                "host_share": self.host_share}


def measure(queue: Callable[[int], Any], wait: Callable[[Any], Any], budget: Budget) -> Timing:
    """Time `queue(i)`, which starts the i-th call and returns something that `wait` waits for."""
    wait(queue(0))  # what only a first call does
    started = time.perf_counter()
    wait(queue(1))
    single = time.perf_counter() - started
    calls = max(2, min(budget.max_calls, math.ceil(budget.sample_seconds / max(single, 1e-6))))
    taken, queueing = [], []
    for sample in range(budget.samples + 1):
        started = time.perf_counter()
        for number in range(calls):
            last = queue(2 + sample * calls + number)
        queued = time.perf_counter() - started
        wait(last)
        if sample:  # the first warms the clocks up
            taken.append((time.perf_counter() - started) / calls)
            queueing.append(queued / calls)
    return Timing(seconds=Spread.of(taken), calls=calls, host_share=sum(queueing) / sum(taken))


def copies_beyond_cache(bytes_per_call: float, *, at_most: int = 64) -> int:
    """Operand sets to rotate over so that none is still in the device's cache when its turn comes again."""
    return max(1, min(at_most, math.ceil(4 * CACHE_BYTES / max(bytes_per_call, 1))))


def measure_ceilings(*, copy_bytes: int, matmul_size: int, budget: Budget) -> dict[str, Any]:
    """The two rates of JAX's default device that every share is taken of; see `ceilings_of`.

    The copy reads and writes an array of `copy_bytes`; the product is that of two random bfloat16 matrices.
    """
    import jax
    import jax.numpy as jnp

    add = jax.jit(lambda array: array + 1, donate_argnums=0)
    copied = Chain(add, jnp.arange(copy_bytes // 4, dtype=jnp.uint32))
    copy = measure(copied.queue, jax.block_until_ready, budget)
    copied.carry = None
    keys = jax.random.split(jax.random.key(0))
    shape = (matmul_size, matmul_size)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    # keeps the product's entries of size one, so that they stay random
    weight = draw(keys[1]) * matmul_size**-0.5
    product = Chain(jax.jit(jnp.matmul, donate_argnums=0), draw(keys[0]), weight)
    matmul = measure(product.queue, jax.block_until_ready, budget)
    return {
        "copy": copy.per(1) | {"bytes": 2 * copy_bytes,
                               "bytes_per_second": 2 * copy_bytes / copy.seconds.median},
        "matmul": matmul.per(1) | {"size": matmul_size, "flops": 2 * matmul_size**3,
                                   "flops_per_second": 2 * matmul_size**3 / matmul.seconds.median},
    }


def ceilings_of(record: dict[str, Any]) -> Ceilings:
    """The rates in what `measure_ceilings` returned."""
    return Ceilings(bytes_per_second=record["copy"]["bytes_per_second"],
                    flops_per_second=record["matmul"]["flops_per_second"])


class Chain:
    """Calls whose first operand is the last call's result: they cannot run side by side."""

    def __init__(self, function: Callable[..., Any], carry: Any, *operands: Any) -> None:
        self.function, self.carry, self.operands = function, carry, operands

    def queue(self, number: int) -> Any:
        """Start the next call."""
        del number
        self.carry = self.function(self.carry, *self.operands)
        return self.carry
