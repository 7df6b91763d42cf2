"""The whole generation: what a forward costs inside the jitted loop, against the same forward called back to back.

A strategy that commits a fixed share of the block in every step makes the number of forwards known. Two such numbers
of steps give two times, and from them the two kinds of step: every block is one full refresh and then window steps, so

    seconds(steps) = blocks * (refresh + (steps - 1) * window).

The number of steps is data: both run the same program.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.forward.network import VARIANTS, Network, windowed_forward
from benchmarks.harness import timing
from benchmarks.harness.cases import Case, Sizes
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.report import Spread
from benchmarks.kernels.ops import compiled
from djax import Canvas, cache_policies, denoise, strategies, transforms
from djax.contracts.types import CachePolicy
from djax.models import ModelDenoiser
from djax.plan import roofline

TOKENS_PER_FORWARD = (3.87, 5.67)
"""dInfer's, with its cache and on the compressed checkpoint (arXiv 2510.08666)."""
REPEATS = 3


def split(seconds: tuple[float, float], steps: tuple[int, int], blocks: int) -> tuple[float, float]:
    """Seconds of a refresh and of a window step from the times of two generations."""
    window = (seconds[1] - seconds[0]) / (blocks * (steps[1] - steps[0]))
    return seconds[0] / blocks - (steps[0] - 1) * window, window


def tokens_per_second(
    refresh: float, window: float, *, block: int, tokens_per_forward: float, batch: int = 1
) -> float:
    """The rate of blocks that take block / tokens_per_forward steps, the first of which is a full refresh."""
    return batch * block / (refresh + (block / tokens_per_forward - 1) * window)


def cases(network: Network, ceilings: Ceilings, command_buffers: str) -> list[Case]:
    """Vicinity and dual cache, djax's kernels and XLA's."""
    sizes = network.sizes
    window, _, batch = sizes.main
    block, around = sizes.block(window), sizes.around
    vicinity = cache_policies.Vicinity(before=around // 2, after=around // 2)
    table = [
        ("djax", vicinity, "vicinity", block, batch, 0),
        ("djax", cache_policies.Dual(), "dual", block // 2, batch, 1),
        ("djax", vicinity, "vicinity", block, sizes.batches[len(sizes.batches) // 2], 1),
        ("xla", vicinity, "vicinity", block, batch, 2)]
    return [
        Case(group="loop", implementation=variant, priority=priority,
             shape={"batch": rows, "block": length, "cache": name, "command_buffers": command_buffers},
             prepare=lambda variant=variant, policy=policy, length=length, rows=rows: _prepare(
                 network, ceilings, variant, policy, length, rows))
        for variant, policy, name, length, rows, priority in table]


def canvas_of(sizes: Sizes, block: int, batch: int) -> Canvas:
    """Random prompts and the open positions behind them."""
    config = sizes.config
    prompts = np.random.default_rng(11).integers(0, config.vocab_size, (batch, sizes.prompt))
    return Canvas.from_prompts(
        prompts.tolist(), max_new_tokens=sizes.generated, block_length=block, mask_id=config.mask_id,
        pad_id=config.pad_id, bucket=False)


def _prepare(
    network: Network, ceilings: Ceilings, variant: str, policy: CachePolicy, block: int, batch: int
) -> Callable[[], dict[str, Any]]:
    sizes = network.sizes
    graphdef, canvas = network.graphdef(VARIANTS[variant]), canvas_of(sizes, block, batch)
    forbid = transforms.ForbidTokens(jnp.array([sizes.config.mask_id], jnp.int32))

    def generate(params: Any, canvas: Canvas, steps: Any) -> Any:
        return denoise(
            ModelDenoiser(graphdef), params, canvas, jax.random.key(0), strategy=strategies.Quota(steps=steps),
            cache_policy=policy, transform=forbid)

    width = policy.window_length(canvas.length, canvas.first_block, block)
    assert width is not None, "the policies here have a window"
    operands = network.window(batch, width, canvas.length)
    cache = jax.eval_shape(lambda: network.cache(batch, canvas.length))
    with ThreadPoolExecutor(2) as pool:
        loop = pool.submit(compiled, generate, (network.params, canvas, jnp.int32(1)))
        forward = pool.submit(
            compiled, windowed_forward(graphdef, VARIANTS[variant], sizes, block),
            (cache, network.params, None, *operands), donate_argnums=0)
    programs = loop.result(), forward.result()
    return lambda: _act(network, ceilings, *programs, canvas, width)


def _act(
    network: Network, ceilings: Ceilings, loop: Any, forward: Any, canvas: Canvas, width: int
) -> dict[str, Any]:
    sizes, blocks, block, batch = network.sizes, canvas.num_blocks, canvas.block_length, canvas.batch
    spreads = []
    for steps in sizes.steps_per_block:
        wrong, seconds = _generate(loop, network.params, canvas, steps)
        if wrong:
            return {"status": "wrong", "reason": wrong}
        spreads.append(seconds)
    refresh, window = split((spreads[0].median, spreads[1].median), sizes.steps_per_block, blocks)
    alone = back_to_back(network, forward, batch, width, canvas.length)
    cost = roofline.total(roofline.forward_parts(
        sizes.config, batch=batch, window=width, context=canvas.length, head_rows=block).values())
    forwards = blocks * sizes.steps_per_block[1]
    return {
        "generations": [
            {"steps_per_block": steps, "forwards": blocks * steps, "refreshes": blocks,
             "seconds": dataclasses.asdict(spread), "forwards_per_second": blocks * steps / spread.median,
             "tokens_per_second": batch * sizes.generated / spread.median}
            for steps, spread in zip(sizes.steps_per_block, spreads, strict=True)],
        "refresh_seconds": refresh, "window_seconds": window, "back_to_back": alone.per(1),
        "loop_overhead": window / alone.seconds.median - 1, "window": width, "context": canvas.length,
        **dataclasses.asdict(cost), **(ceilings.shares(cost, window) if window > 0 else {}),
        "tokens_per_second": {
            str(rate): tokens_per_second(refresh, window, block=block, tokens_per_forward=rate, batch=batch)
            for rate in TOKENS_PER_FORWARD},
        "temporary_bytes": loop.memory_analysis().temp_size_in_bytes,
        "note": f"{forwards / spreads[1].median:.0f} forwards/s; window {1e3 * window:.3f} ms, back to back "
                f"{1e3 * alone.seconds.median:.3f}; refresh {1e3 * refresh:.2f}"}


def _generate(loop: Any, params: Any, canvas: Canvas, steps: int) -> tuple[str | None, Spread]:
    """Seconds of a generation of `steps` steps a block, and what is wrong with its counters, if anything."""
    taken = []
    result = jax.block_until_ready(loop(params, canvas, jnp.int32(steps)))
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = jax.block_until_ready(loop(params, canvas, jnp.int32(steps)))
        taken.append(time.perf_counter() - started)
    nfe, refreshes = np.asarray(result.nfe), np.asarray(result.refreshes)
    wanted = canvas.num_blocks * steps
    wrong = None if (nfe == wanted).all() and (refreshes == canvas.num_blocks).all() else (
        f"got {nfe.tolist()} forwards and {refreshes.tolist()} refreshes; {wanted} and {canvas.num_blocks} were asked "
        f"for (stop reasons {np.asarray(result.stop_reason).tolist()})")
    return wrong, Spread.of(taken)


def back_to_back(network: Network, forward: Any, batch: int, window: int, context: int) -> timing.Timing:
    """Time a compiled `windowed_forward`: each call takes the cache that the last one wrote."""
    operands = (network.params, None, *network.window(batch, window, context))
    return timed_forward(network, forward, operands, batch, context)


def timed_forward(
    network: Network, forward: Any, operands: tuple[Any, ...], batch: int, context: int
) -> timing.Timing:
    """Time a compiled forward whose first operand and result is the cache."""
    cache = network.cache(batch, context)

    def queue(number: int) -> Any:
        nonlocal cache
        del number
        cache, found = forward(cache, *operands)
        return found

    return timing.measure(queue, jax.block_until_ready, network.sizes.budget)
