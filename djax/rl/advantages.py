"""Rewards to advantages."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from djax.errors import check_choice

Scale = Literal["std", "none", "leave_one_out"]
SCALES: tuple[Scale, ...] = ("std", "none", "leave_one_out")


def group_advantages(
    rewards: Float[Array, " B"], group_size: int, *, scale: Scale = "std", epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """Advantage of each row over the other samples of its prompt.

    A reward that is not finite is left out of its group, and its row gets the advantage 0. So do all rows of a group
    whose finite rewards are equal, or of which at most one is finite: they say nothing about what is better.

    Args:
        rewards: one per row; the samples of a prompt are consecutive rows.
        group_size: samples per prompt.
        scale: "std" is r - mean over the group's sample standard deviation (n - 1 in its denominator) plus `epsilon`
            (GRPO, arXiv 2402.03300, section 4.1.2); "none" is r - mean (arXiv 2503.20783; GDPO, arXiv 2510.08554);
            "leave_one_out" is r - the mean of the others (RLOO, arXiv 2402.14740; DiffuCoder, arXiv 2506.20639).
        epsilon: added to the standard deviation.

    Raises:
        ValueError: `group_size` does not divide the rows, or an unknown scale.
    """
    rows = rewards.shape[0]
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size: got {group_size}; allowed a divisor of the {rows} rewards")
    check_choice("scale", scale, SCALES)
    grouped = rewards.astype(jnp.float32).reshape(-1, group_size)
    counts = jnp.isfinite(grouped)
    values = jnp.where(counts, grouped, 0.0)
    number = counts.sum(-1, keepdims=True, dtype=jnp.float32)
    mean = values.sum(-1, keepdims=True) / jnp.maximum(number, 1)
    centred = jnp.where(counts, values - mean, 0.0)
    if scale == "std":
        spread = jnp.sqrt((centred**2).sum(-1, keepdims=True) / jnp.maximum(number - 1, 1))
        centred = centred / (spread + epsilon)
    elif scale == "leave_one_out":
        centred = centred * number / jnp.maximum(number - 1, 1)
    # not "spread > 0": the mean of equal numbers may be off by rounding, which the spread then blows up
    highest = jnp.where(counts, grouped, -jnp.inf).max(-1, keepdims=True)
    lowest = jnp.where(counts, grouped, jnp.inf).min(-1, keepdims=True)
    return jnp.where(counts & (highest > lowest), centred, 0.0).reshape(rows)
