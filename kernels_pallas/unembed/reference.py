"""The op with its logits in memory: oracle and fallback."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.unembed.noise import gumbel_noise
from kernels_pallas.unembed.running import LARGEST_ID, finite
from kernels_pallas.unembed.types import NO_ID, Call, Readout


def matmul(a: Array, b: Array, *, contract: tuple[int, int]) -> Float[Array, "..."]:
    """Product of two matrices over the axes `contract`, accumulated in float32.

    float32 operands keep all their bits, which accelerators would drop by default.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def allowed_ids(call: Call, ids: Int[Array, " V"]) -> Bool[Array, " V"]:
    """Ids that are below the limit and not forbidden."""
    forbidden = (ids[:, None] == call.forbidden[None]).any(axis=1)
    return (ids < call.vocab_limit) & ~forbidden


def lowest_id(holds: Bool[Array, "N V"], ids: Int[Array, " V"]) -> Int[Array, " N"]:
    """The lowest id of each row for which `holds`; NO_ID where there is none."""
    lowest = jnp.min(jnp.where(holds, ids[None], LARGEST_ID), axis=1)
    return jnp.where(lowest == LARGEST_ID, NO_ID, lowest)


def unembed_reference(call: Call) -> Readout:
    """Implement `kernels_pallas.unembed.unembed`."""
    logits = matmul(call.hidden, call.head, contract=(1, 1))
    ids = call.first_id + jnp.arange(call.head.shape[0], dtype=jnp.int32)
    allowed = allowed_ids(call, ids)[None]
    clean = jnp.where(allowed & (logits > -jnp.inf), logits, -jnp.inf)  # a NaN compares false
    kept = jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)  # a NaN goes through every sum of these
    best_logit = jnp.max(clean, axis=1)
    best = lowest_id(allowed & (clean == best_logit[:, None]), ids)
    shift = finite(best_logit)
    log_sum = jnp.log(jnp.sum(jnp.exp(kept - shift[:, None]), axis=1))
    log_total = shift + log_sum
    drawn, drawn_logit, drawn_score, tempered = _draw(call, kept, clean, allowed, ids, (best, best_logit, log_sum))
    second = jnp.max(jnp.where(ids[None] == best[:, None], -jnp.inf, clean), axis=1) if call.second else None
    expected, log_total_all = (None, None) if call.embedding is None else _expected(logits, call.embedding)
    return Readout(
        best=best, best_logit=best_logit, drawn=drawn, drawn_logit=drawn_logit, drawn_score=drawn_score,
        log_total=log_total, log_sum_tempered=tempered, at=_at(call, logits, ids), second_logit=second,
        entropy=_entropy(kept, log_total) if call.entropy else None, expected=expected, log_total_all=log_total_all)


def _draw(
    call: Call, kept: Array, clean: Array, allowed: Array, ids: Array, greedy: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    """The drawn id, its logit, its score, and the tempered sum; what `greedy` says without a temperature."""
    best, best_logit, log_sum = greedy
    if call.temperature is None or call.noise_keys is None:
        return best, best_logit, best_logit, log_sum
    temperature, keys = call.temperature, call.noise_keys

    def noisy() -> tuple[Array, Array, Array, Array]:
        scores = clean + temperature * gumbel_noise(keys[:, None], ids[None])
        score = jnp.max(scores, axis=1)
        drawn = lowest_id(allowed & (scores == score[:, None]), ids)
        logit = jnp.max(jnp.where(ids[None] == drawn[:, None], clean, -jnp.inf), axis=1)
        shift = finite(best_logit)
        total = jnp.sum(jnp.exp((kept - shift[:, None]) / temperature), axis=1)
        return drawn, logit, score, jnp.log(total)

    return lax.cond(temperature > 0, noisy, lambda: (best, best_logit, best_logit, log_sum))


def _at(call: Call, logits: Array, ids: Array) -> Float[Array, "N A"]:
    place = call.at - call.first_id
    inside = (place >= 0) & (place < len(ids)) & readable(call)
    values = jnp.take_along_axis(logits, jnp.clip(place, 0, len(ids) - 1), axis=1)
    return jnp.where(inside, values, -jnp.inf)


def readable(call: Call) -> Bool[Array, "N A"]:
    """The ids in `call.at` that are allowed."""
    return allowed_ids(call, call.at.reshape(-1)).reshape(call.at.shape)


def _entropy(kept: Array, log_total: Array) -> Float[Array, " N"]:
    log_probs = kept - log_total[:, None]
    terms = jnp.where(kept == -jnp.inf, 0.0, jnp.exp(log_probs) * log_probs)
    return jnp.where(jnp.abs(log_total) < jnp.inf, -jnp.sum(terms, axis=1), jnp.nan)


def _expected(logits: Array, embedding: Array) -> tuple[Array, Array]:
    """softmax(logits) @ embedding, its weights rounded to the embedding's dtype, and the log-sum-exp."""
    weights = jax.nn.softmax(logits, axis=1).astype(embedding.dtype)
    expected = matmul(weights, embedding, contract=(1, 0)).astype(embedding.dtype)
    return expected, jax.nn.logsumexp(logits, axis=1)
