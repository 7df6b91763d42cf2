"""A gradient for kernels that have none: that of the XLA implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from kernels_pallas.attention.xla import attention_xla


def with_xla_gradient(forward: Callable[..., Array]) -> Callable[..., Array]:
    """`forward` of query, key, value, key_mask and key_limit, differentiable in the first three, in reverse mode.

    The backward pass computes the forward pass again, as `attention_xla` does, and holds its scores.
    """
    call = jax.custom_vjp(forward)

    def keep(*operands: Any) -> tuple[Array, tuple[Any, ...]]:
        return forward(*operands), operands

    def pull_back(operands: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        query, key, value, key_mask, key_limit = operands
        _, pull = jax.vjp(lambda q, k, v: attention_xla(q, k, v, key_mask, key_limit), query, key, value)
        return *pull(cotangent), None, None

    call.defvjp(keep, pull_back)
    return call
