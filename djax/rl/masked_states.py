"""Masked states as data: how the sampler saw a row, and the published ways to estimate its likelihood."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from djax.canvas import bucket_size
from djax.rl.types import MaskedStates, Rollout

Scheme = Literal["one_step", "coupled", "fixed_k", "stratified", "gauss", "autoregressive"]
DEFAULT_STATES: dict[str, int] = {"one_step": 1, "coupled": 3, "fixed_k": 8, "stratified": 8, "gauss": 3}
"""States per row if nobody says; `autoregressive` takes as many as it needs."""
COUPLED_RANGE = (0.2, 0.8)
"""Masking ratios of coupled-GRPO: its weights 1/t and 1/(1 - t) have no finite variance over all of (0, 1)."""


class _Draw(NamedTuple):
    """Of the completion's tokens: which are masked, and what each counts."""

    chosen: Bool[Array, "B n T"]
    weights: Float[Array, "B n T"]


def trace_states(
    rollout: Rollout, *, shrink: int = 1, num_states: int | None = None, exact: bool = True
) -> MaskedStates:
    """What the sampler saw at each of its steps: state s hides all that was not committed before step s.

    Each token counts once, at the step that committed it, so `score(..., reduce="token")` is the sampler's own
    `log_prob` (TraceRL, arXiv 2509.06949; CJ-GRPO, arXiv 2509.23924). Tokens committed behind an EOS are among them: a
    loss leaves them out with `rollout.is_completion`. Tokens that a stop rule filled in have no weight and stay
    hidden, as they were.

    Args:
        rollout: with `commit_step`.
        shrink: this many consecutive steps become one state, the first of them: fewer forwards, and no longer exact
            above 1 (TraceRL's shrinkage).
        num_states: n, at least the steps of the longest row; None takes the next size of `djax.canvas.bucket_size`, or
            the number of open columns where the rollout is traced. States that no row needs cost nothing. Under `jit`
            too few cannot be refused: tokens whose step lies beyond the states have the weight NaN instead.
        exact: refuse rollouts that are not replayable. False takes the order of commits alone, for ratios of log-probs
            that all come from `score`.

    Raises:
        ValueError: the rollout is not replayable, or a number is too small.
    """
    if exact and not rollout.replayable:
        raise ValueError(
            f"rollout: not replayable: {rollout.not_replayable_because}; sample with an exact recipe such as "
            'djax.recipes.fast_dllm(cache="none"), or pass exact=False to use the order of commits only')
    if shrink < 1:
        raise ValueError(f"shrink: got {shrink}; it must be at least 1")
    committed = jnp.asarray(rollout.commit_step) >= 0
    step = jnp.asarray(rollout.commit_step) // shrink
    needed = jnp.max(jnp.where(committed, step + 1, 0), axis=1, initial=0)
    count = _state_count("num_states", num_states, needed, rollout)
    states = jnp.arange(count)[None, :, None]
    decided = (step[:, None] < states) & committed[:, None]
    weights = ((step[:, None] == states) & committed[:, None]).astype(jnp.float32)
    return MaskedStates(
        masks=jnp.asarray(rollout.is_open)[:, None] & ~decided,
        weights=jnp.where((committed & (step >= count))[:, None], jnp.nan, weights))


def masked_states(
    rollout: Rollout, key: Key[Array, ""], *, scheme: Scheme, n: int | None = None,
    prompt_mask_probability: float = 0.0,
) -> MaskedStates:
    """Random (or fixed) masked states of the completions, whose weighted log-probs sum to an estimate.

    L is a row's completion length, `rollout.lengths`. What lies behind it (an EOS fill, say) stays hidden in every
    state, as it was when the sampler decided, and counts nothing; pinned tokens are always shown. ELBO is the
    lower bound of log p(completion | prompt) in LLaDA's eq. 6 (arXiv 2502.09992).

    - one_step: everything masked, weight 1 (d1, arXiv 2504.12216). The mean-field log-prob, not a bound.
    - coupled: everything masked, weight 1; and (n - 1)/2 pairs: each token with probability t ~ U(0.2, 0.8), weight
      1/t, and all the others, weight 1/(1 - t); the sum divided by the pairs + 1 (DiffuCoder, arXiv 2506.20639). A
      proxy: with one pair half of one_step plus about the ELBO.
    - fixed_k: k ~ U{1..L} tokens, weight L/k (LLaDA, eq. 6; VRPO, arXiv 2505.19223). The ELBO, unbiased.
    - stratified: the same with k spread evenly over 1..L. The ELBO, unbiased.
    - gauss: round(t L) tokens at the Gauss-Legendre nodes t of (0, 1), weight w/t (GDPO, arXiv 2510.08554). The ELBO
      up to quadrature and rounding: for completions that are long against n.
    - autoregressive: state i masks all tokens from the i-th on, weight 1 on the i-th (JustGRPO). The log-prob of
      writing the completion from left to right, exactly.

    Score policies that are compared at the same states: the noise that they share cancels in the difference.

    Args:
        rollout: whose completions are masked.
        key: of all random numbers; fixed schemes ignore it.
        scheme: see above.
        n: states per row, over which all but coupled and autoregressive average; None is `DEFAULT_STATES`, and for
            autoregressive enough for the longest completion. Under `jit` too few for autoregressive cannot be refused:
            tokens beyond the states have the weight NaN instead.
        prompt_mask_probability: in "one_step", each given token is hidden with this probability too (d1: 0.15).

    Raises:
        ValueError: names the argument, what came and what is allowed.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme: got {scheme!r}; allowed: {', '.join(get_args(Scheme))}")
    if not 0.0 <= prompt_mask_probability <= 1.0:
        raise ValueError(f"prompt_mask_probability: got {prompt_mask_probability}; allowed 0 to 1")
    if prompt_mask_probability and scheme != "one_step":
        raise ValueError(f'prompt_mask_probability: got {prompt_mask_probability} with scheme={scheme!r}; only '
                         '"one_step" masks prompts; leave it at 0')
    completion = rollout.is_completion
    if scheme == "autoregressive":
        count = _state_count("n", n, completion.sum(axis=1), rollout)
    else:
        count = DEFAULT_STATES[scheme] if n is None else n
    if count < 1 or (scheme == "coupled" and (count < 3 or count % 2 == 0)):
        raise ValueError(f"n: got {count}; " + (
            "coupled states are one and pairs: an odd number, at least 3" if scheme == "coupled" else
            "it must be at least 1"))
    draw_key, prompt_key = jax.random.split(key)
    draw = _SCHEMES[scheme](draw_key, completion, count)
    masks = draw.chosen | (jnp.asarray(rollout.is_open) & ~completion)[:, None]
    if prompt_mask_probability:
        given = jnp.asarray(rollout.valid) & ~jnp.asarray(rollout.is_open)
        masks |= given[:, None] & (jax.random.uniform(prompt_key, masks.shape) < prompt_mask_probability)
    return MaskedStates(masks=masks, weights=draw.weights)


def _one_step(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    chosen = jnp.repeat(completion[:, None], count, axis=1)
    return _Draw(chosen, chosen / jnp.float32(count))


def _coupled(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    pairs, (rows, length) = (count - 1) // 2, completion.shape
    ratio_key, mask_key = jax.random.split(key)
    low, high = COUPLED_RANGE
    ratio = jax.random.uniform(ratio_key, (rows, pairs, 1), minval=low, maxval=high)
    everything = completion[:, None]
    first = everything & (jax.random.uniform(mask_key, (rows, pairs, length)) < ratio)
    second = everything & ~first
    chosen = jnp.concatenate([everything, first, second], axis=1)
    weights = jnp.concatenate([everything.astype(jnp.float32), first / ratio, second / (1.0 - ratio)], axis=1)
    return _Draw(chosen, weights / (pairs + 1))


def _fixed_k(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    size_key, mask_key = jax.random.split(key)
    return _of_sizes(mask_key, completion, jax.random.uniform(size_key, (completion.shape[0], count)))


def _stratified(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    size_key, mask_key = jax.random.split(key)
    within = jax.random.uniform(size_key, (completion.shape[0], count))
    return _of_sizes(mask_key, completion, (jnp.arange(count) + within) / count)


def _of_sizes(key: Key[Array, ""], completion: Bool[Array, "B T"], place: Float[Array, "B n"]) -> _Draw:
    """Random sets of the sizes at `place` in 1..L, each size an equal part of [0, 1); weight L/size, divided by n."""
    length = completion.sum(axis=1, dtype=jnp.int32)[:, None]
    size = jnp.minimum((place * length).astype(jnp.int32), length - 1) + 1
    chosen = _random_sets(key, completion, size)
    weight = length / (jnp.maximum(size, 1) * place.shape[1])
    return _Draw(chosen, jnp.where(chosen, weight[..., None], 0.0).astype(jnp.float32))


def _gauss(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    nodes, node_weights = np.polynomial.legendre.leggauss(count)
    time, share = (nodes + 1.0) / 2.0, node_weights / 2.0
    length = completion.sum(axis=1, dtype=jnp.int32)[:, None]
    size = jnp.clip(jnp.round(jnp.asarray(time, jnp.float32) * length).astype(jnp.int32), 1, length)
    chosen = _random_sets(key, completion, size)
    return _Draw(chosen, jnp.where(chosen, jnp.asarray(share / time, jnp.float32)[None, :, None], 0.0))


def _autoregressive(key: Key[Array, ""], completion: Bool[Array, "B T"], count: int) -> _Draw:
    place = (jnp.cumsum(completion, axis=1, dtype=jnp.int32) - 1)[:, None]
    states = jnp.arange(count)[None, :, None]
    everything = completion[:, None]
    weights = (everything & (place == states)).astype(jnp.float32)
    return _Draw(everything & (place >= states), jnp.where(everything & (place >= count), jnp.nan, weights))


_SCHEMES = {"one_step": _one_step, "coupled": _coupled, "fixed_k": _fixed_k, "stratified": _stratified,
            "gauss": _gauss, "autoregressive": _autoregressive}


def _random_sets(
    key: Key[Array, ""], completion: Bool[Array, "B T"], size: Int[Array, "B n"]
) -> Bool[Array, "B n T"]:
    """Uniformly random sets of `size` of the completion's positions."""
    rows, length = completion.shape
    number = jax.random.uniform(key, (rows, size.shape[1], length))
    number = jnp.where(completion[:, None], number, 2.0)
    rank = jnp.argsort(jnp.argsort(number, axis=-1), axis=-1)
    return completion[:, None] & (rank < size[..., None])


def _state_count(name: str, given: int | None, needed: Any, rollout: Rollout) -> int:
    """How many states hold `needed` [B] of every row; a static number."""
    traced = isinstance(needed, jax.core.Tracer)
    most = 0 if traced else int(np.max(np.asarray(needed), initial=0))
    if given is None:
        return max(rollout.length - rollout.first_block, 1) if traced else bucket_size(most, minimum=1)
    if given < max(most, 1):
        raise ValueError(f"{name}: got {given}; the longest row needs {max(most, 1)}; give at least that, or None")
    return given
