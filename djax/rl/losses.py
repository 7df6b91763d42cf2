"""Policy-gradient losses of masked-diffusion language models, as pure functions of log-probs.

    states = trace_states(rollout)                       # or masked_states(rollout, key, scheme=...)
    old = rollout.log_prob                               # or score(denoiser, old_params, rollout, states)
    advantages = group_advantages(rewards, num_samples)
    log_probs = score(denoiser, params, rollout, states)
    loss, report = trace_grpo_loss(log_probs, advantages, mask=rollout.is_completion, old=old)

The methods differ in which masked states the log-probs are taken at, in whether a ratio is a token's or a sequence's,
and in what the tokens of a row count for. New, old and reference policy are scored on the same states: a ratio of two
different estimates is no ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from djax.contracts import struct
from djax.errors import check_integer

LARGEST_LOG_RATIO = 20.0
"""Ratios go on linearly above exp of this: float32 overflows at 88, and squares of ratios at 44."""

Number = float | Float[Array, ""]
TokenReduce = Literal["sequence", "batch"]


@struct.dataclass
class PolicyReport:
    """Terms of a policy loss, float32 scalars."""

    loss: Float[Array, ""]
    """The minimised value: -objective + beta * kl."""
    objective: Float[Array, ""]
    """The clipped surrogate, as the loss weighs it."""
    kl: Float[Array, ""]
    """The estimated KL to the reference, as the loss weighs it; 0 without a reference."""
    clip_fraction: Float[Array, ""]
    """Share of the counted ratios whose clipping is in force, which therefore get no gradient, or that are above
    exp(`LARGEST_LOG_RATIO`), whose gradient stays at what it is there."""
    ratio: Float[Array, ""]
    """Mean of the counted ratios."""
    count: Float[Array, ""]
    """Number of ratios: tokens or, in sequence-level losses, rows."""


def k3(log_probs: Float[Array, "*n"], reference: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """p_ref / p - log(p_ref / p) - 1: unbiased for KL(p || p_ref) under samples of p, and never negative.

    DeepSeekMath (arXiv 2402.03300), equation 4. Above a ratio of exp(`LARGEST_LOG_RATIO`) it goes on linearly in
    the log-ratio.
    """
    difference = reference - log_probs
    return _exp(difference) - difference - 1.0


def k2(log_probs: Float[Array, "*n"], reference: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """(log p - log p_ref)^2 / 2: its gradient is that of KL(p || p_ref) under samples of p, without an exponential."""
    return 0.5 * (log_probs - reference) ** 2


def grpo_loss(
    log_probs: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    *,
    mask: Bool[Array, "B T"],
    old: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
    beta: Number = 0.0,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    reduce: TokenReduce = "sequence",
) -> tuple[Float[Array, ""], PolicyReport]:
    """Group relative policy optimization, one ratio a token (DeepSeekMath, arXiv 2402.03300, equation 3).

        -1/B sum_i 1/|o_i| sum_t [ min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - beta k3 ],   r = p / p_old

    What the mask leaves out has no effect at all, even if it is NaN; a row of which nothing is left counts as zero.

    Args:
        log_probs: of the policy that is trained.
        advantages: per row (`group_advantages`), or per token.
        mask: tokens that count (`Rollout.is_completion`). It follows from lengths: `tokens != pad` would drop the EOS
            that ends an answer wherever the padding id is the EOS id.
        old: log-probs of the policy that sampled, at the same masked states; None where it is the one that is trained:
            the ratio is 1 and the gradient that of A log p.
        reference: log-probs of the policy to stay close to; None for no KL.
        beta: weight of the KL.
        clip_low: how far below 1 a ratio may fall.
        clip_high: how far above 1 it may rise (more than `clip_low`: clip-higher of DAPO, arXiv 2503.14476).
        reduce: "sequence" is the mean over rows of their tokens' means, as above; "batch" the mean over all tokens
            (DAPO).

    Returns:
        The loss, and its parts.

    Raises:
        ValueError: an unknown `reduce`.
    """
    return _surrogate(log_probs, advantages, counted=mask, weights=_token_weights(mask, reduce), old=old,
                      reference=reference, beta=beta, clip_low=clip_low, clip_high=clip_high)


diffu_grpo_loss = partial(grpo_loss, beta=0.04)
"""diffu-GRPO (d1, arXiv 2504.12216): GRPO on mean-field log-probs, log p(o_t | q', all of o masked).

They are those of `masked_states(scheme="one_step")`; q' is the prompt, each token masked with the probability p_mask
(0.15 in the paper), drawn anew for each inner update. The paper's advantages are r - mean
(`group_advantages(scale="none")`).
"""

coupled_grpo_loss = partial(grpo_loss, beta=0.01)
"""Coupled-GRPO (DiffuCoder, arXiv 2506.20639): GRPO on log-probs of paired masks.

They are those of `masked_states(scheme="coupled")`, means over two masks that complement each other, so that every
token is scored once in a partly known context, and the full mask. The paper's baseline leaves the row itself out
(`group_advantages(scale="leave_one_out")`).
"""

just_grpo_loss = partial(grpo_loss, beta=0.0)
"""JustGRPO ("The Flexibility Trap", arXiv 2601.15165): plain GRPO on a left-to-right policy.

The log-probs are those of `masked_states(scheme="autoregressive")`, the exact chain rule, one forward a token;
rollouts are sampled one token at a time from left to right, so that this is the policy that sampled.
"""


def trace_grpo_loss(
    log_probs: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    *,
    mask: Bool[Array, "B T"],
    commit_step: Int[Array, "B T"] | None = None,
    shrink: int = 1,
    old: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
    beta: Number = 0.0,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
) -> tuple[Float[Array, ""], PolicyReport]:
    """GRPO on what the sampler did, step by step (TraceRL, arXiv 2509.06949, its policy objective).

        -1/B sum_i sum_s 1/|tau_i(s)| sum_(k in tau_i(s)) min(r A, clip(r) A) + beta KL

    with tau_i(s) the tokens that row i committed in step s (in `shrink` steps taken together). The log-probs are those
    of `trace_states(rollout, shrink=...)`; without shrinking and with an exact cache `rollout.log_prob` is `old`.

    Args:
        commit_step: the step that committed each token (`Rollout.commit_step`): each step counts alike, as above.
            None counts each token of a row alike, as `grpo_loss` does.
        shrink: as given to `trace_states`.

    Other arguments and result as of `grpo_loss`.

    Raises:
        ValueError: `shrink` is below 1.
    """
    check_integer("shrink", shrink, 1)
    if commit_step is None:
        weights = _token_weights(mask, "sequence")
    else:
        mask = mask & (commit_step >= 0)
        weights = _step_weights(mask, commit_step // shrink)
    return _surrogate(log_probs, advantages, counted=mask, weights=weights, old=old, reference=reference, beta=beta,
                      clip_low=clip_low, clip_high=clip_high)


def gdpo_loss(
    elbos: Float[Array, " B"],
    advantages: Float[Array, " B"],
    *,
    lengths: Int[Array, " B"],
    old: Float[Array, " B"] | None = None,
    reference: Float[Array, " B"] | None = None,
    beta: Number = 0.0,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
) -> tuple[Float[Array, ""], PolicyReport]:
    """Group diffusion policy optimization (GDPO, arXiv 2510.08554): one ratio a sequence.

        -1/B sum_i 1/|y_i| min(r_i A_i, clip(r_i) A_i) + beta KL,   r_i = exp(ELBO_i - ELBO_old,i)

    Args:
        elbos: bounds on log p(completion | prompt), from `score(..., reduce="sequence")` at
            `masked_states(scheme="gauss")`, the paper's quadrature.
        advantages: r - mean in the paper (`group_advantages(scale="none")`).
        lengths: tokens of each completion; a row of none counts as zero, whatever its other entries are.
        old: those of the policy that sampled, at the same states.
        reference: those of the policy to stay close to; the KL is estimated with k3 of the ELBOs.
        beta: weight of the KL.
        clip_low: how far below 1 a ratio may fall.
        clip_high: how far above 1 it may rise.

    Returns:
        The loss, and its parts.
    """
    counted = lengths > 0
    weights = jnp.where(counted, 1.0 / _at_least_one(lengths), 0.0) / lengths.shape[0]
    return _surrogate(elbos, advantages, counted=counted, weights=weights, old=old, reference=reference, beta=beta,
                      clip_low=clip_low, clip_high=clip_high)


def espo_loss(
    elbos: Float[Array, " B"],
    advantages: Float[Array, " B"],
    *,
    lengths: Int[Array, " B"],
    old: Float[Array, " B"] | None = None,
    reference: Float[Array, " B"] | None = None,
    beta: Number = 0.0,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
) -> tuple[Float[Array, ""], PolicyReport]:
    """ELBO-based sequence-level policy optimization (ESPO, arXiv 2512.03759).

        -1/B sum_i min(r_i A_i, clip(r_i) A_i) + beta KL,   r_i = exp((ELBO_i - ELBO_old,i) / |y_i|)

    The ratio is normalised per token, and the KL estimated with k2 of the ELBOs, which has no exponential. Arguments
    and result as of `gdpo_loss`; the ELBOs are the paper's at `masked_states(scheme="fixed_k")`.
    """
    counted = lengths > 0
    weights = counted.astype(jnp.float32) / lengths.shape[0]
    return _surrogate(elbos, advantages, counted=counted, weights=weights, old=old, reference=reference, beta=beta,
                      clip_low=clip_low, clip_high=clip_high, estimate=k2, lengths=_at_least_one(lengths))


def _token_weights(mask: Bool[Array, "B T"], reduce: str) -> Float[Array, "B T"]:
    """Weight of each token; they sum to at most 1."""
    if reduce == "sequence":
        return mask.astype(jnp.float32) / _at_least_one(mask.sum(axis=1, keepdims=True)) / mask.shape[0]
    if reduce == "batch":
        return mask.astype(jnp.float32) / _at_least_one(mask.sum())
    raise ValueError(f"reduce: got {reduce!r}; allowed sequence, batch; choose one")


def _step_weights(mask: Bool[Array, "B T"], steps: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Each step of a row counts for 1/B, shared by its tokens."""
    rows = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None]
    places = jnp.where(mask, steps, 0)
    most = mask.shape[1]  # a step commits at least one token, so there are no more steps than positions
    counts = jnp.zeros((mask.shape[0], most), jnp.int32).at[rows, places].add(mask.astype(jnp.int32))
    return mask.astype(jnp.float32) / _at_least_one(counts[rows, places]) / mask.shape[0]


def _at_least_one(counts: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Counts to divide by."""
    return jnp.maximum(counts.astype(jnp.float32), 1.0)


def _surrogate(
    log_probs: Array, advantages: Array, *, counted: Array, weights: Array, old: Array | None, reference: Array | None,
    beta: Number, clip_low: Number, clip_high: Number, estimate: Callable[[Array, Array], Array] = k3,
    lengths: Array | float = 1.0,
) -> tuple[Float[Array, ""], PolicyReport]:
    """Loss and report from log-probs of tokens or of sequences.

    `weights` are zero where nothing is counted, `estimate` is that of the KL, and log-ratios are divided by `lengths`.
    """
    # what is not counted must not reach exp: a NaN there would come back through the gradient of `where`
    log_probs = jnp.where(counted, log_probs, 0.0)
    old = jax.lax.stop_gradient(log_probs if old is None else jnp.where(counted, old, 0.0))
    kl = None if reference is None else estimate(
        log_probs, jax.lax.stop_gradient(jnp.where(counted, reference, 0.0)))
    if advantages.ndim < counted.ndim:
        advantages = jnp.broadcast_to(advantages[:, None], counted.shape)
    log_ratio = (log_probs - old) / lengths
    ratio = _exp(log_ratio)
    advantages = jax.lax.stop_gradient(jnp.where(counted, advantages, 0.0))
    free, clipped = ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = jnp.sum(weights * jnp.minimum(free, clipped))
    divergence = jnp.float32(0.0) if kl is None else jnp.sum(weights * kl)
    loss = -objective + beta * divergence
    cut = (clipped < free) | (log_ratio > LARGEST_LOG_RATIO)
    number = counted.sum(dtype=jnp.float32)
    mean = lambda values: jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(number, 1.0)  # noqa: E731
    return loss, PolicyReport(
        loss=loss, objective=objective, kl=divergence, clip_fraction=mean(cut.astype(jnp.float32)), ratio=mean(ratio),
        count=number)


def _exp(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """exp up to the largest log-ratio, its tangent there above it: finite, and with a gradient everywhere."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO)) * (1.0 + jnp.maximum(log_ratio - LARGEST_LOG_RATIO, 0.0))
