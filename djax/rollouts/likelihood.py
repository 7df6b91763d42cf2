"""Log-likelihoods of given targets, with a standard error: for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from djax.contracts.ambient import on_device, without_mesh
from djax.contracts.keys import as_key
from djax.contracts.types import Denoiser, Forbidden, Params
from djax.engine.options import Sampling, resolve_ids
from djax.engine.prompts import Prompt, check_ids, encode_prompts
from djax.errors import check_choice, check_integer
from djax.rollouts.masked_states import masked_states
from djax.rollouts.rollout import as_rollout
from djax.rollouts.score import score
from djax.rollouts.types import MaskedStates, Rollout

if TYPE_CHECKING:
    from djax.api import DiffusionLM

Estimator = Literal["stratified", "fixed_k", "gauss", "autoregressive"]


@without_mesh()
def log_likelihood(
    lm: DiffusionLM,
    prompts: Prompt | Sequence[Prompt],
    targets: Sequence[str] | Sequence[Sequence[int]],
    *,
    key: int | Key[Array, ""],
    n: int = 32,
    scheme: Estimator = "stratified",
    micro_batch: int | None = None,
    mask_id: int | None = None,
    vocab_chunk: int = 8192,
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """Estimates of log p(target | prompt) in nats, and their standard errors.

    "stratified" and "fixed_k" are unbiased for a lower bound (LLaDA, arXiv 2502.09992, eq. 6). "gauss" has that bound's
    quadrature and rounding error, which the standard error does not count: it may lie on either side. "autoregressive"
    is the log-prob of writing the target from left to right, exactly, in as many forwards as it has tokens. The
    target's length is given: nothing is open behind it. The mask id and the vocabulary's padding are outside of the
    distribution, as in generation, and refused in targets.

    The n states are n/2 draws done twice, independently: what two states of the same kind differ by is the noise, so
    the standard error does not count what a scheme's own spread of states takes out of it.

    Args:
        lm: whose weights score.
        prompts: texts, conversations or token ids.
        targets: texts or token ids, one for each prompt.
        key: seed or `jax.random` key.
        n: masked states, forwards, per target; even. "autoregressive" does not read it.
        scheme: see `masked_states`.
        micro_batch: rows scored at a time; None is all of them.
        mask_id: overrides the model's mask id.
        vocab_chunk: columns of the vocabulary whose logits are held at once.

    Returns:
        Means and standard errors, [B] each.

    Raises:
        ValueError: names the argument, what came and what is allowed.
    """
    check_choice("scheme", scheme, get_args(Estimator))
    if n < 2 or n % 2:
        raise ValueError(f"n: got {n}; it must be even and at least 2: every state is drawn twice")
    check_integer("micro_batch", micro_batch, 1, optional=True)
    given = _given(lm, prompts, targets, mask_id)
    random_key = as_key(key)
    if scheme == "autoregressive":
        states = masked_states(given, random_key, scheme=scheme)
    else:
        first, second = (jax.device_get(masked_states(given, half, scheme=scheme, n=n // 2))
                         for half in _halves(random_key))
        states = MaskedStates(masks=np.concatenate([first.masks, second.masks], axis=1),  # type: ignore[arg-type]
                              weights=np.concatenate([first.weights, second.weights], axis=1) / 2)  # type: ignore[arg-type]
    states = jax.device_get(states)
    size = given.batch if micro_batch is None else min(micro_batch, given.batch)
    values = []
    for start in range(0, given.batch, size):
        rows = np.minimum(np.arange(start, start + size), given.batch - 1)  # a last cut has the others' shape
        cut = on_device((given.take(rows), states.take(rows)))
        values.append(jax.device_get(_per_state(lm.denoiser, lm.params, *cut, vocab_chunk=vocab_chunk)))
    found = np.concatenate(values)[: given.batch].astype(np.float64)
    if scheme == "autoregressive":
        return found.sum(axis=1), np.zeros(given.batch)
    one, other = np.split(found, 2, axis=1)
    return found.sum(axis=1), np.sqrt(np.sum((one - other) ** 2, axis=1))


@jax.jit
def _halves(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    first, second = jax.random.split(key)
    return first, second


@partial(jax.jit, static_argnames="vocab_chunk")
def _per_state(
    denoiser: Denoiser, params: Params, rollout: Rollout, states: MaskedStates, *, vocab_chunk: int
) -> Float[Array, "B n"]:
    """Contribution of each state to the estimate."""
    return score(denoiser, params, rollout, states, vocab_chunk=vocab_chunk, reduce="none").sum(axis=-1)


def _given(lm: DiffusionLM, prompts: Any, targets: Any, mask_id: int | None) -> Rollout:
    rows = encode_prompts(prompts, tokenizer=lm.tokenizer, vocab_size=lm.config.vocab_size)
    if isinstance(targets, str) or len(targets) != len(rows):
        raise ValueError(f"targets: got {1 if isinstance(targets, str) else len(targets)}, as "
                         f"{type(targets).__name__}, for {len(rows)} prompts; give a list with one for each")
    wanted = []
    for index, target in enumerate(targets):
        name = f"targets[{index}]"
        if isinstance(target, str):
            if lm.tokenizer is None:
                raise ValueError(f"{name}: got text, but this checkpoint has no tokenizer; give token ids")
            target = lm.tokenizer.encode(target)
        wanted.append(check_ids(target, name=name, vocab_size=lm.config.vocab_size))
    mask_token, _ = resolve_ids(Sampling(mask_id=mask_id), lm.config)
    for index, (row, target) in enumerate(zip(rows, wanted, strict=True)):
        _check_target(lm, row, target, mask_token, name=f"targets[{index}]")
    forbidden = Forbidden(ids=np.asarray([mask_token], np.int32), limit=np.int32(lm.vocab_limit))  # type: ignore[arg-type]
    return as_rollout(rows, wanted, mask_id=mask_token, pad_id=lm.config.pad_id, forbidden=forbidden)


def _check_target(
    lm: DiffusionLM, prompt: Sequence[int], target: Sequence[int], mask_token: int, *, name: str
) -> None:
    """Refuse what has the probability 0 or is longer than the model's positions."""
    wrong = [token for token in target if token == mask_token or token >= lm.vocab_limit]
    if wrong:
        raise ValueError(f"{name}: got the token {wrong[0]}, which the model cannot generate; allowed ids below "
                         f"{lm.vocab_limit} other than the mask id {mask_token}")
    length = len(prompt) + len(target)
    if length > lm.config.max_positions:
        raise ValueError(f"{name}: got {len(target)} tokens, {length} with the prompt; allowed "
                         f"{lm.config.max_positions} in all; shorten it or its prompt")
