"""Reverse mode for kernels that have none of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def with_gradient_of(twin: Callable[..., Array], forward: Callable[..., Array]) -> Callable[..., Array]:
    """`forward`, differentiable in reverse mode as `twin`, which computes the same of the same operands.

    The backward pass computes `twin`'s forward pass again, and holds what that holds.
    """

    def keep(*operands: Any) -> tuple[Array, tuple[Any, ...]]:
        return forward(*operands), operands

    def pull_back(operands: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        return jax.vjp(twin, *operands)[1](cotangent)

    function = jax.custom_vjp(forward)
    function.defvjp(keep, pull_back)
    return function
