"""Masked states as data: how the sampler saw a row, and the published ways to estimate its likelihood."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts.ambient import is_traced, on_device, without_mesh
from djax.contracts.keys import as_key
from djax.errors import check_choice, check_integer, check_number
from djax.rollouts.types import MaskedStates, Rollout

Scheme = Literal["one_step", "coupled", "fixed_k", "stratified", "gauss", "autoregressive"]
DEFAULT_STATES: dict[str, int] = {"one_step": 1, "coupled": 3, "fixed_k": 8, "stratified": 8, "gauss": 3}
"""States per row if nobody says; `autoregressive` takes as many as it needs."""
COUPLED_RANGE = (0.2, 0.8)
"""Masking ratios of coupled-GRPO: its weights 1/t and 1/(1 - t) have no finite variance over all of (0, 1)."""


class _Draw(NamedTuple):
    """Mask and weight of each completion token."""

    chosen: Bool[Array, "n T"]
    weights: Float[Array, "n T"]


@without_mesh()
def trace_states(
    rollout: Rollout, *, shrink: int = 1, num_states: int | None = None, exact: bool = True
) -> MaskedStates:
    """The sampler's view at each of its steps: state s hides all that was not committed before step s.

    Each token counts once, at the step that committed it, so `score(..., reduce="token")` is the sampler's own
    `log_prob` (TraceRL, arXiv 2509.06949; CJ-GRPO, arXiv 2509.23924). Tokens committed behind an EOS are among them: a
    loss leaves them out with `rollout.is_completion`. Tokens that a stop rule filled in have no weight and stay
    hidden, as they were.

    Args:
        rollout: with `commit_step`.
        shrink: this many consecutive steps become one state, the first of them: fewer forwards, and no longer exact
            above 1 (TraceRL's shrinkage).
        num_states: n, at least the steps of the longest row. None is what any rollout of this shape needs,
            `rollout.max_steps`, so that a jitted step is not compiled again for the next one. `score` runs no forward
            for states that no row needs, but the arrays hold them, 5 bytes for each row, state and position: a bound
            of your own makes them smaller. Under `jit` too few cannot be refused: tokens whose step lies beyond the
            states have the weight NaN instead.
        exact: refuse rollouts that are not replayable. False takes the order of commits alone, for ratios of log-probs
            that all come from `score`.

    Raises:
        ValueError: the rollout is not replayable, or a number is too small.
    """
    if exact and not rollout.replayable:
        raise ValueError(
            f"rollout: not replayable: {rollout.not_replayable_because}; sample with an exact recipe such as "
            'djax.recipes.fast_dllm(cache="none"), or pass exact=False to use the order of commits only')
    check_integer("shrink", shrink, 1)
    if num_states is None:
        count = max(-(-rollout.max_steps // shrink), 1)
    else:
        committed = rollout.commit_step if is_traced(rollout.commit_step) else jax.device_get(rollout.commit_step)
        count = _enough("num_states", num_states, committed.max(initial=-1) // shrink + 1)
    return _trace_states(*on_device((rollout.is_open, rollout.commit_step)), shrink=shrink, count=count)


@partial(jax.jit, static_argnames=("shrink", "count"))
def _trace_states(
    is_open: Bool[Array, "B T"], commit_step: Int[Array, "B T"], *, shrink: int, count: int
) -> MaskedStates:
    committed, step = commit_step >= 0, commit_step // shrink
    states = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    decided = (step[:, None] < states) & committed[:, None]
    weights = ((step[:, None] == states) & committed[:, None]).astype(jnp.float32)
    return MaskedStates(
        masks=is_open[:, None] & ~decided,
        weights=jnp.where((committed & (step >= count))[:, None], jnp.nan, weights))


@without_mesh()
def masked_states(
    rollout: Rollout, key: int | Key[Array, ""], *, scheme: Scheme, n: int | None = None,
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
        key: seed or `jax.random` key of all random numbers; fixed schemes ignore it. What a row gets depends on it and
            on the row's `rollout.row_ids` only, also when the rollout is cut.
        scheme: see above.
        n: states per row, over which all but coupled and autoregressive average; None is `DEFAULT_STATES`, and for
            autoregressive the rollout's columns from the first block on. Under `jit` too few for autoregressive cannot
            be refused: tokens beyond the states have the weight NaN instead.
        prompt_mask_probability: in "one_step", each given token is hidden with this probability too (d1: 0.15).

    Raises:
        ValueError: names the argument, what came and what is allowed.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_number("prompt_mask_probability", prompt_mask_probability, 0.0, 1.0)
    if prompt_mask_probability and scheme != "one_step":
        raise ValueError(f'prompt_mask_probability: got {prompt_mask_probability} with scheme={scheme!r}; only '
                         '"one_step" masks prompts; leave it at 0')
    completion = rollout.is_completion
    if scheme != "autoregressive":
        count = DEFAULT_STATES[scheme] if n is None else n
    elif n is None:
        count = max(rollout.length - rollout.first_block, 1)
    else:
        count = _enough("n", n, completion.sum(axis=1, dtype=np.int32).max(initial=0))
    if count < 1 or (scheme == "coupled" and (count < 3 or count % 2 == 0)):
        raise ValueError(f"n: got {count}; " + (
            "coupled states are one and pairs: an odd number, at least 3" if scheme == "coupled" else
            "it must be at least 1"))
    hidden = np.float32(prompt_mask_probability) if prompt_mask_probability else None
    return _masked_states(
        as_key(key), *on_device((rollout.row_ids, completion, rollout.is_open, rollout.valid, hidden)),
        scheme=scheme, count=count)


@partial(jax.jit, static_argnames=("scheme", "count"))
def _masked_states(
    key: Key[Array, ""], row_ids: Int[Array, " B"], completion: Bool[Array, "B T"], is_open: Bool[Array, "B T"],
    valid: Bool[Array, "B T"], prompt_mask_probability: Float[Array, ""] | None, *, scheme: Scheme, count: int,
) -> MaskedStates:
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)))(row_ids)
    draw = jax.vmap(partial(_SCHEMES[scheme], count=count))(keys[:, 0], completion)
    masks = draw.chosen | (is_open & ~completion)[:, None]
    if prompt_mask_probability is not None:
        number = jax.vmap(lambda key: jax.random.uniform(key, masks.shape[1:], jnp.float32))(keys[:, 1])
        masks |= (valid & ~is_open)[:, None] & (number < prompt_mask_probability)
    return MaskedStates(masks=masks, weights=draw.weights)


def _one_step(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    chosen = jnp.repeat(completion[None], count, axis=0)
    return _Draw(chosen, chosen.astype(jnp.float32) / count)


def _coupled(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    pairs = (count - 1) // 2
    ratio_key, mask_key = jax.random.split(key)
    low, high = COUPLED_RANGE
    ratio = jax.random.uniform(ratio_key, (pairs, 1), jnp.float32, minval=low, maxval=high)
    everything = completion[None]
    first = everything & (jax.random.uniform(mask_key, (pairs, completion.size), jnp.float32) < ratio)
    second = everything & ~first
    chosen = jnp.concatenate([everything, first, second])
    weight = jnp.concatenate([jnp.ones((1, 1), jnp.float32), 1.0 / ratio, 1.0 / (1.0 - ratio)])
    return _Draw(chosen, jnp.where(chosen, weight, 0.0) / (pairs + 1))


def _fixed_k(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    size_key, mask_key = jax.random.split(key)
    return _of_sizes(mask_key, completion, jax.random.uniform(size_key, (count,), jnp.float32))


def _stratified(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    size_key, mask_key = jax.random.split(key)
    within = jax.random.uniform(size_key, (count,), jnp.float32)
    return _of_sizes(mask_key, completion, (jnp.arange(count, dtype=jnp.float32) + within) / count)


def _of_sizes(key: Key[Array, ""], completion: Bool[Array, " T"], place: Float[Array, " n"]) -> _Draw:
    """Random sets of the sizes at `place` in 1..L, each size an equal part of [0, 1); weight L/size, divided by n."""
    length = completion.sum(dtype=jnp.int32)
    size = jnp.minimum((place * length.astype(jnp.float32)).astype(jnp.int32), length - 1) + 1
    chosen = _random_sets(key, completion, size)
    weight = length.astype(jnp.float32) / (jnp.maximum(size, 1).astype(jnp.float32) * place.size)
    return _Draw(chosen, jnp.where(chosen, weight[:, None], 0.0))


def _gauss(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    nodes, node_weights = np.polynomial.legendre.leggauss(count)
    time, share = (nodes + 1.0) / 2.0, node_weights / 2.0
    length = completion.sum(dtype=jnp.int32)
    size = jnp.round(jnp.asarray(time, jnp.float32) * length.astype(jnp.float32)).astype(jnp.int32)
    chosen = _random_sets(key, completion, jnp.clip(size, 1, length))
    return _Draw(chosen, jnp.where(chosen, jnp.asarray(share / time, jnp.float32)[:, None], 0.0))


def _autoregressive(key: Key[Array, ""], completion: Bool[Array, " T"], count: int) -> _Draw:
    place = (jnp.cumsum(completion, dtype=jnp.int32) - 1)[None]
    states = jnp.arange(count, dtype=jnp.int32)[:, None]
    everything = completion[None]
    weights = (everything & (place == states)).astype(jnp.float32)
    return _Draw(everything & (place >= states), jnp.where(everything & (place >= count), jnp.nan, weights))


_SCHEMES = {"one_step": _one_step, "coupled": _coupled, "fixed_k": _fixed_k, "stratified": _stratified,
            "gauss": _gauss, "autoregressive": _autoregressive}


def _random_sets(key: Key[Array, ""], completion: Bool[Array, " T"], size: Int[Array, " n"]) -> Bool[Array, "n T"]:
    """Uniformly random sets of `size` of the completion's positions."""
    number = jax.random.uniform(key, (size.size, completion.size), jnp.float32)
    number = jnp.where(completion[None], number, 2.0)
    rank = jnp.argsort(jnp.argsort(number, axis=-1), axis=-1).astype(jnp.int32)
    return completion[None] & (rank < size[:, None])


def _enough(name: str, given: int, needed: Any) -> int:
    """A number of states that holds what the longest row needs; what is traced cannot be looked at."""
    least = 1 if is_traced(needed) else max(int(jax.device_get(needed)), 1)
    if given < least:
        raise ValueError(f"{name}: got {given}; the longest row needs {least}; give at least that, or None")
    return given
