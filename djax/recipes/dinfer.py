"""dInfer's decoders."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Int

from djax.contracts.types import CachePolicy, Smoothing
from djax.errors import ArgumentError, check_integer, check_number, shown
from djax.parts.cache_policies import NoCache, Vicinity, WithWarmup
from djax.parts.schedules import Linear
from djax.parts.smoothing import HardTokens, SoftTokens
from djax.parts.strategies import Hierarchical, Threshold
from djax.parts.transforms import Credit
from djax.recipes.recipe import Number, Recipe


def dinfer(
    *, threshold: Number = 0.8, smoothing: Number | None = 0.3, before: int = 16, after: int = 16,
    warmup: int | Int[Array, ""] = 4, cache: bool = True,
) -> Recipe:
    """dInfer with a KV cache (arXiv 2510.08666, table 2): threshold, smoothing, vicinity refresh, warm-up.

    Args:
        threshold: commit what is at least this probable; under smoothing the threshold in force falls
            from 1 by 0.02 a step until it is reached.
        smoothing: largest weight of the soft tokens; None for hard tokens.
        before: positions before the block that each step recomputes.
        after: positions after it.
        warmup: full forwards at the start of the first block.
        cache: False decodes without one; `before`, `after` and `warmup` then have no effect.
    """
    check_number("threshold", threshold, 0.0, 1.0)
    limit = threshold if smoothing is None else Linear(1.0, -0.02, minimum=threshold)
    return Recipe(strategy=Threshold(limit), cache_policy=_vicinity(before, after, warmup, cache),
                  smoothing=_soft(smoothing))


def dinfer_credit(*, threshold: Number = 0.8, smoothing: Number | None = 0.3, alpha: Number = 0.7,
                  beta: Number = 0.8, gamma: Number = 0.2) -> Recipe:
    """dInfer without a cache (arXiv 2510.08666, table 2): credit decoding and smoothing.

    Args:
        threshold: as in `dinfer`.
        smoothing: as in `dinfer`.
        alpha: weight of the credit in the logits.
        beta: decay of the credit per step.
        gamma: exponent of the probability that is credited.
    """
    return dataclasses.replace(
        dinfer(threshold=threshold, smoothing=smoothing, cache=False),
        transform=Credit(alpha=alpha, beta=beta, gamma=gamma))


def dinfer_hierarchical(
    *, high: Number = 0.92, low: Number = 0.62, smoothing: Number | None = 0.3, before: int = 16, after: int = 16,
    warmup: int | Int[Array, ""] = 4, cache: bool = True,
) -> Recipe:
    """dInfer's setting for trajectory-compressed models (arXiv 2510.08666, section 5): hierarchical decoding.

    Args:
        high: commit everything above it.
        low: commit the best of each run of masks above it.
        smoothing: as in `dinfer`; the falling threshold applies to `high`.
        before: as in `dinfer`.
        after: as in `dinfer`.
        warmup: as in `dinfer`.
        cache: as in `dinfer`.
    """
    check_number("high", high, 0.0, 1.0)
    if isinstance(high, float | int) and isinstance(low, float | int):
        check_number("low", low, 0.0, high, advice="lower it or raise high")
    limit = high if smoothing is None else Linear(1.0, -0.02, minimum=high)
    return Recipe(strategy=Hierarchical(high=limit, low=low), cache_policy=_vicinity(before, after, warmup, cache),
                  smoothing=_soft(smoothing))


def _vicinity(before: int, after: int, warmup: int | Int[Array, ""], cache: bool) -> CachePolicy:
    for name, value in (("before", before), ("after", after), ("warmup", warmup)):
        check_integer(name, value)
    if not isinstance(cache, bool):
        raise ArgumentError("cache", shown(cache), allowed="True or False")
    return WithWarmup(Vicinity(before=before, after=after), steps=warmup) if cache else NoCache()


def _soft(weight: Number | None) -> Smoothing:
    check_number("smoothing", weight, 0.0, 1.0, optional=True)
    return HardTokens() if weight is None else SoftTokens(Linear(0.15, 0.02, maximum=weight))
