"""Joining the readouts of a vocabulary that is cut over a mesh axis."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.unembed.running import LARGEST_ID, finite
from kernels_pallas.unembed.types import NO_ID, Readout


def combine_readouts(
    readout: Readout, *, axis_name: str | tuple[str, ...], temperature: Float[Array, ""] | float | None = None,
) -> Readout:
    """The readout of the whole vocabulary from those of its shards, inside `shard_map`.

    Each device gave `unembed` its rows of the head and their `first_id`, so ids are those of the whole. All that a row
    says goes to every device in one all-gather of some ten words a row and shard; with `expected` there is also a sum
    of one [N, D2]. `temperature` is the one that `unembed` was given.
    """
    shards = _gather(readout._replace(expected=None), axis_name)
    best, best_logit = _largest(shards.best, shards.best_logit)
    drawn, drawn_score = _largest(shards.drawn, shards.drawn_score)
    mine = (shards.drawn == drawn) & (drawn != NO_ID)
    log_total = _log_sum_exp(shards.log_total)
    second = entropy = expected = log_total_all = None
    if shards.second_logit is not None:
        second = jnp.max(jnp.where(shards.best == best, shards.second_logit, shards.best_logit), axis=0)
    if shards.entropy is not None:
        share = jnp.exp(shards.log_total - log_total)
        term = share * (shards.entropy + log_total - shards.log_total)
        entropy = jnp.sum(jnp.where(shards.log_total == -jnp.inf, 0.0, term), axis=0)
        entropy = jnp.where(jnp.abs(log_total) < jnp.inf, entropy, jnp.nan)
    if readout.expected is not None and readout.log_total_all is not None and shards.log_total_all is not None:
        log_total_all = _log_sum_exp(shards.log_total_all)
        share = jnp.exp(readout.log_total_all - log_total_all)[:, None]
        expected = lax.psum(share * readout.expected.astype(jnp.float32), axis_name).astype(readout.expected.dtype)
    return Readout(
        best=best, best_logit=best_logit, drawn=drawn, drawn_score=drawn_score,
        drawn_logit=jnp.max(jnp.where(mine, shards.drawn_logit, -jnp.inf), axis=0),
        log_total=log_total, log_sum_tempered=_tempered(shards, best_logit, temperature),
        # an id has one owner, and -inf comes from all others
        at=jnp.max(shards.at, axis=0),
        second_logit=second, entropy=entropy, expected=expected, log_total_all=log_total_all)


def _tempered(
    shards: Readout, best_logit: Float[Array, " N"], temperature: Float[Array, ""] | float | None
) -> Float[Array, " N"]:
    """The shards' sums, each taken from its own best logit, as one that is taken from the best of all."""
    heat = jnp.asarray(1.0 if temperature is None else temperature, jnp.float32)
    heat = jnp.where(heat > 0, heat, 1.0)
    own = jnp.where(shards.best_logit == -jnp.inf, 0.0, finite(shards.best_logit) - finite(best_logit))
    return _log_sum_exp(own / heat + shards.log_sum_tempered)


def _gather(readout: Readout, axis_name: str | tuple[str, ...]) -> Readout:
    """Every field with a leading axis of shards, all of them moved as the words of one array."""
    fields = {name: value for name, value in readout._asdict().items() if value is not None}
    rows = readout.best.shape[0]
    words = jnp.concatenate(
        [lax.bitcast_convert_type(value, jnp.int32).reshape(rows, -1) for value in fields.values()], axis=1)
    everywhere = lax.all_gather(words, axis_name)
    gathered, start = {}, 0
    for name, value in fields.items():
        width = value.size // rows
        part = lax.bitcast_convert_type(everywhere[..., start:start + width], value.dtype)
        gathered[name] = part.reshape(-1, *value.shape)
        start += width
    return readout._replace(**gathered)


def _largest(
    ids: Int[Array, "shards N"], values: Float[Array, "shards N"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The lowest id among the shards' largest values."""
    largest = jnp.max(values, axis=0)
    lowest = jnp.min(jnp.where((values == largest) & (ids != NO_ID), ids, LARGEST_ID), axis=0)
    return jnp.where(lowest == LARGEST_ID, NO_ID, lowest), largest


def _log_sum_exp(values: Float[Array, "shards N"]) -> Float[Array, " N"]:
    """Over the shards; a NaN of one is a NaN of all."""
    shift = finite(jnp.max(jnp.where(jnp.isnan(values), -jnp.inf, values), axis=0))
    return shift + jnp.log(jnp.sum(jnp.exp(values - shift), axis=0))
