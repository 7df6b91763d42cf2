"""Credit decoding, on logits or on a reading of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from djax.contracts import struct
from djax.contracts.types import Logits, PartState, Reading
from djax.errors import check_number


@struct.dataclass
class CreditState:
    """Credit kept as slots: slot j of a position is the token that was its argmax at step j of the block."""

    token: Int[Array, "B L S"]
    """int32; -1 in an unused slot. A token has at most one slot."""
    mass: Float[Array, "B L S"]


@struct.dataclass
class Credit:
    """Credit decoding: tokens that keep being the best guess gain logits (arXiv 2510.08666, section 4.3).

    Each step, on masked positions: mass <- beta * mass, mass[argmax] += p_max ** gamma, and then
    logits + alpha * log(1 + mass). Only ids that were an argmax in this block carry mass, so S = L slots
    per position hold it all: a block takes at most L steps under a strategy that only commits. Under one
    that takes more, the slot with the least mass is given up.
    """

    alpha: float | Float[Array, ""] = 0.7
    beta: float | Float[Array, ""] = 0.8
    gamma: float | Float[Array, ""] = 0.2

    needs_logits: ClassVar[bool] = False  # only the slots' logits change

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0)
        check_number("beta", self.beta, 0.0, 1.0)
        check_number("gamma", self.gamma, 0.0)

    def init(self, batch: int, block_length: int) -> PartState:
        """No credit."""
        slots = (batch, block_length, block_length)
        return CreditState(token=jnp.full(slots, -1, jnp.int32), mass=jnp.zeros(slots, jnp.float32))

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits raised by the accumulated credit."""
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_p_max = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        state = self._credit(best, log_p_max, is_masked, state)
        batch, length = best.shape
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
        columns = jnp.arange(length, dtype=jnp.int32)[None, :, None]
        return logits.at[rows, columns, jnp.maximum(state.token, 0)].add(self._bonus(state)), state

    def wanted_ids(self, state: PartState) -> Int[Array, "B L S"] | None:
        """The tokens in the slots."""
        return state.token

    def step_reading(
        self, reading: Reading, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Reading, PartState]:
        """The reading with the slots' logits raised."""
        before = state.token
        state = self._credit(reading.best, reading.best_logit - reading.log_total, is_masked, state)
        # a token that has just got a slot was not asked for: it is the best one
        fresh = state.token != before
        logits = jnp.where(fresh, reading.best_logit[..., None], _lookup(reading, before, reading.logits, -jnp.inf))
        noise = jnp.where(fresh, reading.best_noise[..., None], _lookup(reading, before, reading.noise, 0.0))
        return _raised(reading, state.token, logits, noise, self._bonus(state)), state

    def _credit(
        self, best: Int[Array, "B L"], log_p_max: Float[Array, "B L"], is_masked: Bool[Array, "B L"],
        state: CreditState,
    ) -> CreditState:
        """The slots after this step's best guesses were credited."""
        known = state.token == best[..., None]
        # An unused slot has no mass, so the first of the least is free while there is a free one.
        weakest = jax.nn.one_hot(jnp.argmin(state.mass, axis=-1), state.mass.shape[-1], dtype=bool)
        slot = jnp.where(known.any(-1, keepdims=True), known, weakest)
        kept = jnp.where(slot & ~known, 0.0, self.beta * state.mass)
        gain = jnp.where(is_masked, jnp.exp(log_p_max) ** self.gamma, 0.0)[..., None]
        return CreditState(
            token=jnp.where(slot & is_masked[..., None], best[..., None], state.token),
            mass=kept + jnp.where(slot, gain, 0.0))

    def _bonus(self, state: CreditState) -> Float[Array, "B L S"]:
        """Gain of each slot's token; 0 in an unused one."""
        return jnp.where(state.token >= 0, self.alpha * jnp.log1p(state.mass), 0.0)


def _lookup(
    reading: Reading, ids: Int[Array, "B L S"], values: Float[Array, "B L A"], default: float
) -> Float[Array, "B L S"]:
    """The values of the reading's entries with these ids; `default` where there is none."""
    same = (reading.ids[..., None, :] == ids[..., None]) & (ids >= 0)[..., None]
    otherwise = jnp.where(same.any(-1, keepdims=True), jnp.float32(-jnp.inf), jnp.float32(default))
    return jnp.max(jnp.where(same, values[..., None, :], otherwise), axis=-1)


def _raised(
    reading: Reading, ids: Int[Array, "B L S"], logits: Float[Array, "B L S"], noise: Float[Array, "B L S"],
    bonus: Float[Array, "B L S"],
) -> Reading:
    """The reading after `bonus`, at least 0, is added to the logits of `ids`, each of which occurs once.

    A sum of exponentials is corrected by what its terms gain. Whatever wins afterwards is one of `ids` or has won
    before, because no other logit rises.
    """
    raised = jnp.where(ids >= 0, logits + bonus, -jnp.inf)
    same = (reading.ids[..., None] == ids[..., None, :]) & (ids >= 0)[..., None, :]
    best, best_logit, best_noise = _winner(
        reading.best, reading.best_logit, reading.best_noise, ids, raised, noise, jnp.float32(0.0))

    def gained(log_sum: Float[Array, "B L"], temperature: Float[Array, ""] | float) -> Float[Array, "B L"]:
        """The log-sum taken from the best logit, now from the new one: no term of it is above 1 at any temperature."""
        before = jnp.exp((reading.best_logit - best_logit) / temperature + log_sum)
        terms = jnp.exp((raised - best_logit[..., None]) / temperature) * -jnp.expm1(-bonus / temperature)
        return jnp.log(before + jnp.sum(jnp.where(ids >= 0, terms, 0.0), axis=-1))

    log_sum = gained(reading.log_total - reading.best_logit, 1.0)
    common = {"logits": reading.logits + jnp.sum(jnp.where(same, bonus[..., None, :], 0.0), axis=-1), "best": best,
              "best_logit": best_logit, "best_noise": best_noise, "log_total": best_logit + log_sum}
    if reading.temperature is None:
        return dataclasses.replace(
            reading, **common, drawn=best, drawn_logit=best_logit, drawn_noise=best_noise, log_sum_tempered=log_sum)
    drawn, drawn_logit, drawn_noise = _winner(
        reading.drawn, reading.drawn_logit, reading.drawn_noise, ids, raised, noise, reading.temperature)
    divisor = jnp.where(reading.temperature > 0, reading.temperature, 1.0)
    return dataclasses.replace(
        reading, **common, drawn=drawn, drawn_logit=drawn_logit, drawn_noise=drawn_noise,
        log_sum_tempered=gained(reading.log_sum_tempered, divisor))


def _winner(
    token: Int[Array, "B L"], logit: Float[Array, "B L"], noise: Float[Array, "B L"], ids: Int[Array, "B L S"],
    raised: Float[Array, "B L S"], noise_at: Float[Array, "B L S"], temperature: Float[Array, ""],
) -> tuple[Int[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
    """Id, logit and noise of the largest logit + temperature * noise, the lowest id among equals."""
    stack = lambda one, many: jnp.concatenate([one[..., None], many], axis=-1)  # noqa: E731
    every = stack(token, ids), stack(logit, raised), stack(noise, noise_at)
    score = every[1] + jnp.where(temperature > 0, temperature * every[2], 0.0)
    wins = (score == score.max(-1, keepdims=True)) & (every[0] >= 0)
    winner = jnp.min(jnp.where(wins, every[0], jnp.iinfo(jnp.int32).max), axis=-1)
    # its raised logit, where it stands twice
    is_winner = (every[0] == winner[..., None]) & wins
    logit, noise = (jnp.max(jnp.where(is_winner, values, -jnp.inf), axis=-1) for values in every[1:])
    return winner, logit, noise
