"""Recipes: named choices of parts, as the papers publish them; one file a paper.

A recipe is data: `recipe.replace(cache_policy=...)` swaps a part. Temperature, forbidden tokens and
stopping belong to the call, not to the recipe. `settings` reads recipes and parts from texts, for the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from djax.models.config import ModelConfig
from djax.recipes.dinfer import dinfer, dinfer_credit, dinfer_hierarchical
from djax.recipes.fast_dllm import fast_dllm
from djax.recipes.llada import llada
from djax.recipes.llada2 import llada2
from djax.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function for function in (llada, fast_dllm, dinfer, dinfer_credit, dinfer_hierarchical, llada2)}
"""The recipes by name."""


def default_for(config: ModelConfig, *, gaps: bool = False) -> Recipe:
    """The recipe of a generation for which nobody names one: `dinfer()`, or `llada2()` for models with blocks.

    With `gaps`, as in infilling, the latter is without a cache (`BlockCausal` refuses them).
    """
    return dinfer() if config.block_length is None else llada2(cache=not gaps)
