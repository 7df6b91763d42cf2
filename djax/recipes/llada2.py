"""LLaDA2's decoder."""

from __future__ import annotations

from djax.parts.cache_policies import BlockCausal, NoCache
from djax.parts.strategies import Threshold
from djax.recipes.recipe import Number, Recipe


def llada2(*, threshold: Number = 0.95, cache: bool = True) -> Recipe:
    """LLaDA2.0's decoder (arXiv 2512.15745): threshold decoding block by block, over a cache of all earlier blocks.

    For models that are causal over blocks, on canvases whose blocks are theirs (`djax.cache_policies.BlockCausal`).
    The cache changes no token: keys of earlier blocks are those of their final tokens.

    Args:
        threshold: commit what is at least this probable; 0.95 is the default of the models' own code.
        cache: False computes the whole canvas at every step.
    """
    return Recipe(strategy=Threshold(threshold), cache_policy=BlockCausal() if cache else NoCache())
