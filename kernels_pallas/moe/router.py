"""The router's choice of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, resolve
from kernels_pallas.hardware import current_platform
from kernels_pallas.moe.support import without_mosaic_gpu

MOST_EXPERTS = 256
"""A row's shares lie in the registers of four threads: more would not fit."""

Choice = tuple[Int[Array, "M k"], Float[Array, "M k"]]


def top_k_reference(logits: Float[Array, "M E"], experts_per_token: int) -> Choice:
    """See `top_k_route`: a softmax and JAX's top-k."""
    weights, expert_ids = lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    return expert_ids, weights


def top_k_xla(logits: Float[Array, "M E"], experts_per_token: int) -> Choice:
    """See `top_k_route`."""
    weights, expert_ids = top_k_short(jax.nn.softmax(logits, axis=-1), experts_per_token)
    return expert_ids, weights


def top_k_short(values: Float[Array, "M n"], k: int) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """`jax.lax.top_k`, for which XLA sorts, as a CPU does slowly: there without."""
    best: tuple[Array, Array] = lax.platform_dependent(
        values, cpu=partial(top_k_by_maxima, k=k), default=lambda values: tuple(lax.top_k(values, k)))
    return best


def top_k_by_maxima(shares: Float[Array, "M E"], *, k: int) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """`jax.lax.top_k` of short rows: k times the largest entry, the lowest index among equals."""
    index = jnp.arange(shares.shape[1], dtype=jnp.int32)[None]
    values, indices = [], []
    for _ in range(k):
        best = jnp.max(shares, axis=1)
        at = jnp.min(jnp.where(shares == best[:, None], index, shares.shape[1] - 1), axis=1)
        shares = jnp.where(index == at[:, None], -jnp.inf, shares)
        values.append(best)
        indices.append(at)
    return jnp.stack(values, axis=1), jnp.stack(indices, axis=1)


@partial(jax.jit, static_argnames=("experts_per_token", "interpret"))  # layers share one tracing
def top_k_mosaic_gpu(logits: Float[Array, "M E"], experts_per_token: int, *, interpret: bool = False) -> Choice:
    """See `top_k_route`: softmax and choice in one kernel. `interpret` runs it on a CPU."""
    # not at the top: only a GPU needs the kernels
    from kernels_pallas.moe.mosaic_gpu_routing import top_k_kernel

    @jax.custom_jvp
    def route(logits: Array) -> Choice:
        return top_k_kernel(logits, k=experts_per_token, interpret=interpret)

    @route.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Choice, tuple[Any, Array]]:
        expert_ids, weights = route(*primals)
        _, tangent = jax.jvp(partial(jax.nn.softmax, axis=-1), primals, tangents)
        no_tangent = np.zeros(expert_ids.shape, jax.dtypes.float0)
        return (expert_ids, weights), (no_tangent, jnp.take_along_axis(tangent, expert_ids, axis=1))

    return route(logits)


def _any_call(platform: str, *operands: Any) -> str | None:
    del platform, operands
    return None


def _unsupported_by_mosaic_gpu(platform: str, logits: Any, experts_per_token: int) -> str | None:
    del experts_per_token
    num_experts = logits.shape[1]
    if num_experts % 8 or num_experts > MOST_EXPERTS:
        return f"E must be a multiple of 8 up to {MOST_EXPERTS}, got {num_experts}"
    return without_mosaic_gpu(platform)


ROUTE_IMPLEMENTATIONS = {
    "reference": Implementation(top_k_reference, _any_call),
    "xla": Implementation(top_k_xla, _any_call),
    "mosaic_gpu": Implementation(top_k_mosaic_gpu, _unsupported_by_mosaic_gpu),
}


def top_k_route_choice(
    logits: Any, *, experts_per_token: int, implementation: str | None = None, platform: str | None = None
) -> str:
    """Name of the implementation that `top_k_route` uses. `platform` is the one in use if None.

    Raises:
        ValueError: k is not in [1, E], or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    num_experts = logits.shape[1]
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(
            f"experts_per_token: got {experts_per_token}; with logits {tuple(logits.shape)} it must be in "
            f"[1, {num_experts}]")
    if logits.dtype != jnp.float32:
        raise ValueError(f"logits: got dtype {logits.dtype}; the router computes in float32")
    platform = current_platform() if platform is None else platform
    return resolve(
        "top_k_route", ROUTE_IMPLEMENTATIONS, implementation=implementation,
        preference=("mosaic_gpu", "xla"), platform=platform, operands=(logits, experts_per_token))


def top_k_route(
    logits: Float[Array, "M E"], *, experts_per_token: int, implementation: str | None = None
) -> Choice:
    """Experts of each row and their weights: the largest of a softmax over all experts, largest first.

    Among equals the lower index comes first. The weights are not renormalised to sum to one: LLaDA-MoE was trained
    that way. A row with a NaN gets ids in [0, E) and weights of NaN.

    Args:
        logits: float32.
        experts_per_token: k.
        implementation: "reference", "xla", "mosaic_gpu" (Hopper), or None for the best on this platform
            (`top_k_route_choice` says which). All are differentiable.

    Returns:
        Expert ids, and weights in float32.

    Raises:
        ValueError: k is not in [1, E], logits of another dtype, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    name = top_k_route_choice(logits, experts_per_token=experts_per_token, implementation=implementation)
    choice: Choice = ROUTE_IMPLEMENTATIONS[name].function(logits, experts_per_token)
    return choice
