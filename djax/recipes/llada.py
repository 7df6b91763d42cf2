"""LLaDA's own sampler."""

from __future__ import annotations

from jaxtyping import Array, Int

from djax.errors import check_integer
from djax.parts.strategies import Quota
from djax.recipes.recipe import Recipe


def llada(*, steps_per_block: int | Int[Array, ""] | None = None) -> Recipe:
    """LLaDA's own sampler (arXiv 2502.09992, algorithm 5): fixed steps, most confident first, no cache.

    Args:
        steps_per_block: denoising steps per block; None is one token per step, the reference quality.
    """
    check_integer("steps_per_block", steps_per_block, 1, optional=True)
    return Recipe(strategy=Quota() if steps_per_block is None else Quota(steps_per_block))
