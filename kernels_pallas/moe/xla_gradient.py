"""Reverse mode for kernels that have none of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from kernels_pallas.moe.xla_grouped import moe_xla_grouped


def with_xla_gradient(forward: Callable[..., Array]) -> Callable[..., Array]:
    """`forward(x, expert_ids, weights, gate, up, down)` with the gradient of `moe_xla_grouped`, recomputed."""

    def keep(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
        return forward(*operands), operands

    def pull_back(operands: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
        return jax.vjp(moe_xla_grouped, *operands)[1](cotangent)

    function = jax.custom_vjp(forward)
    function.defvjp(keep, pull_back)
    return function
