"""The vocabulary head asked for a reading: the op `unembed` on positions of a batch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from djax.contracts.types import HeadQuery, Reading
from djax.devices.parallel import UNSPLIT, Parallel
from kernels_pallas import combine_readouts, gumbel_noise, unembed


def read_head(
    hidden: Float[Array, "B L D"], head: Float[Array, "V D"], query: HeadQuery, *,
    embed: Float[Array, "V D"] | None = None, implementation: str | None = None, parallel: Parallel = UNSPLIT,
) -> tuple[Reading, Float[Array, "B L D"] | None]:
    """The reading of `hidden @ head.T`, and with `embed` the expected embeddings over the whole vocabulary.

    `implementation` names one of `kernels_pallas.unembed`. Where `parallel` says that the vocabulary is split, `head`
    and `embed` are this device's rows.
    """
    shape = hidden.shape[:2]
    rows = lambda array: array.reshape(-1, *array.shape[2:])  # noqa: E731
    noise = query.noise
    got = unembed(
        rows(hidden), head, at=rows(query.ids), forbidden=query.forbidden.ids, vocab_limit=query.forbidden.limit,
        temperature=None if noise is None else noise.temperature,
        noise_keys=None if noise is None else rows(noise.keys), embedding=embed,
        first_id=parallel.first_id(head), implementation=implementation)
    if parallel.vocab:
        got = combine_readouts(
            got, axis_name=parallel.vocab, temperature=None if noise is None else noise.temperature)
    fields = {name: getattr(got, name).reshape(shape) for name in (
        "best", "best_logit", "drawn", "drawn_logit", "log_total", "log_sum_tempered")}
    expected = None if got.expected is None else got.expected.reshape(*shape, -1)
    zeros = jnp.zeros(shape, jnp.float32)
    if noise is None:
        drawn = best = zeros
        asked = jnp.zeros(query.ids.shape, jnp.float32)
    else:
        best, drawn = (gumbel_noise(noise.keys, fields[name]) for name in ("best", "drawn"))
        asked = gumbel_noise(noise.keys[..., None, :], query.ids)
    return Reading(
        **fields, ids=query.ids, logits=got.at.reshape(query.ids.shape), noise=asked, best_noise=best,
        drawn_noise=drawn, temperature=None if noise is None else noise.temperature), expected
