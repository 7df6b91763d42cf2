"""Joining the readouts of a vocabulary that is cut over a mesh axis."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.unembed.running import LARGEST_ID, finite
from kernels_pallas.unembed.types import NO_ID, Readout


def combine_readouts(readout: Readout, *, axis_name: str) -> Readout:
    """The readout of the whole vocabulary from those of its shards, inside `shard_map`.

    Each device gave `unembed` its rows of the head and their `first_id`, so ids are those of the whole. Moves a
    few [N] arrays; with `expected` also one [N, D2].
    """
    best, best_logit = _largest(readout.best, readout.best_logit, axis_name)
    drawn, drawn_score = _largest(readout.drawn, readout.drawn_score, axis_name)
    mine = (readout.drawn == drawn) & (drawn != NO_ID)
    log_total = _log_sum_exp(readout.log_total, axis_name)
    second = entropy = expected = log_total_all = None
    if readout.second_logit is not None:
        runner_up = jnp.where(readout.best == best, readout.second_logit, readout.best_logit)
        second = lax.pmax(runner_up, axis_name)
    if readout.entropy is not None:
        share = jnp.exp(readout.log_total - log_total)
        term = share * (readout.entropy + log_total - readout.log_total)
        entropy = lax.psum(jnp.where(readout.log_total == -jnp.inf, 0.0, term), axis_name)
        entropy = jnp.where(jnp.abs(log_total) < jnp.inf, entropy, jnp.nan)
    if readout.expected is not None and readout.log_total_all is not None:
        log_total_all = _log_sum_exp(readout.log_total_all, axis_name)
        share = jnp.exp(readout.log_total_all - log_total_all)[:, None]
        expected = lax.psum(share * readout.expected.astype(jnp.float32), axis_name).astype(readout.expected.dtype)
    # an id has one owner, and -inf comes from all others: a sum would lose nothing, but a maximum may lose a NaN
    lost = lax.psum(jnp.isnan(readout.at).astype(jnp.int32), axis_name) > 0
    return Readout(
        best=best, best_logit=best_logit, drawn=drawn, drawn_score=drawn_score,
        drawn_logit=lax.pmax(jnp.where(mine, readout.drawn_logit, -jnp.inf), axis_name),
        log_total=log_total, log_total_tempered=_log_sum_exp(readout.log_total_tempered, axis_name),
        at=jnp.where(lost, jnp.nan, lax.pmax(jnp.where(jnp.isnan(readout.at), -jnp.inf, readout.at), axis_name)),
        second_logit=second, entropy=entropy, expected=expected, log_total_all=log_total_all)


def _largest(
    ids: Int[Array, "N"], values: Float[Array, "N"], axis_name: str
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """The lowest id among the shards' largest values."""
    largest = lax.pmax(values, axis_name)
    lowest = lax.pmin(jnp.where((values == largest) & (ids != NO_ID), ids, LARGEST_ID), axis_name)
    return jnp.where(lowest == LARGEST_ID, NO_ID, lowest), largest


def _log_sum_exp(values: Float[Array, "N"], axis_name: str) -> Float[Array, "N"]:
    """Over the shards; a NaN of one is a NaN of all."""
    shift = finite(lax.pmax(jnp.where(jnp.isnan(values), -jnp.inf, values), axis_name))
    return shift + jnp.log(lax.psum(jnp.exp(values - shift), axis_name))
