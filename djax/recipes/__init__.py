"""Recipes: named choices of parts, as the papers publish them.

A recipe is data: `recipe.replace(cache_policy=...)` swaps a part. Temperature, forbidden tokens and
stopping belong to the call, not to the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float, Int

from djax.contracts.types import CachePolicy, Smoothing, Strategy
from djax.errors import ArgumentError, check_choice, check_integer, check_number, shown
from djax.loop.state import Parts
from djax.models.config import ModelConfig
from djax.parts.cache_policies import BlockCausal, Dual, NoCache, Prefix, Vicinity, WithWarmup
from djax.parts.schedules import Linear
from djax.parts.smoothing import HardTokens, SoftTokens
from djax.parts.strategies import Factor, Hierarchical, Quota, Threshold
from djax.parts.transforms import Credit

Number = float | Float[Array, ""]


Recipe = Parts
"""A recipe is a choice of parts, some of them left at their defaults."""


def llada(*, steps_per_block: int | Int[Array, ""] | None = None) -> Recipe:
    """LLaDA's own sampler (arXiv 2502.09992, algorithm 5): fixed steps, most confident first, no cache.

    Args:
        steps_per_block: denoising steps per block; None is one token per step, the reference quality.
    """
    if steps_per_block is not None:
        check_integer("steps_per_block", steps_per_block, 1)
    return Recipe(strategy=Quota() if steps_per_block is None else Quota(steps_per_block))


def fast_dllm(
    *, threshold: Number = 0.9, factor: Number | None = None, cache: Literal["none", "prefix", "dual"] = "dual"
) -> Recipe:
    """Fast-dLLM (arXiv 2505.22618): threshold decoding, or its factor rule, with the prefix or dual cache.

    Args:
        threshold: commit what is at least this probable.
        factor: use the factor rule with this factor instead of the threshold.
        cache: which positions each step recomputes.

    Raises:
        ValueError: an unknown cache.
    """
    policies: dict[str, CachePolicy] = {"none": NoCache(), "prefix": Prefix(), "dual": Dual()}
    check_choice("cache", cache, policies)
    strategy: Strategy = Threshold(threshold) if factor is None else Factor(factor)
    return Recipe(strategy=strategy, cache_policy=policies[cache])


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


def llada2(*, threshold: Number = 0.95, cache: bool = True) -> Recipe:
    """LLaDA2.0's decoder (arXiv 2512.15745): threshold decoding block by block, over a cache of all earlier blocks.

    For models that are causal over blocks, on canvases whose blocks are theirs (`djax.cache_policies.BlockCausal`).
    The cache changes no token: keys of earlier blocks are those of their final tokens.

    Args:
        threshold: commit what is at least this probable; 0.95 is the default of the models' own code.
        cache: False computes the whole canvas at every step.
    """
    return Recipe(strategy=Threshold(threshold), cache_policy=BlockCausal() if cache else NoCache())


RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function for function in (llada, fast_dllm, dinfer, dinfer_credit, dinfer_hierarchical, llada2)}
"""The recipes by name."""


def default_for(config: ModelConfig, *, gaps: bool = False) -> Recipe:
    """The recipe of a generation for which nobody names one: `dinfer()`, or `llada2()` for models with blocks.

    With `gaps`, as in infilling, the latter is without a cache (`BlockCausal` refuses them).
    """
    return dinfer() if config.block_length is None else llada2(cache=not gaps)


def _vicinity(before: int, after: int, warmup: int | Int[Array, ""], cache: bool) -> CachePolicy:
    for name, value in (("before", before), ("after", after), ("warmup", warmup)):
        check_integer(name, value)
    if not isinstance(cache, bool):
        raise ArgumentError("cache", shown(cache), allowed="True or False")
    return WithWarmup(Vicinity(before=before, after=after), steps=warmup) if cache else NoCache()


def _soft(weight: Number | None) -> Smoothing:
    if weight is not None:
        check_number("smoothing", weight, 0.0, 1.0)
    return HardTokens() if weight is None else SoftTokens(Linear(0.15, 0.02, maximum=weight))
