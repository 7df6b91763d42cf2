"""Fast-dLLM's decoders."""

from __future__ import annotations

from typing import Literal

from djax.contracts.types import CachePolicy, Strategy
from djax.errors import check_choice
from djax.parts.cache_policies import Dual, NoCache, Prefix
from djax.parts.strategies import Factor, Threshold
from djax.recipes.recipe import Number, Recipe


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
