"""Proposals: logits to candidates, one per position. The vocabulary axis ends here."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from djax.contracts import answers, struct
from djax.contracts.types import Candidates, Filter, Logits, Noise, Propose, Reading
from djax.errors import check_choice, check_integer, check_number
from kernels_pallas import gumbel_noise

__all__ = ["Greedy", "RefuseToken", "Sample"]

LARGEST_TEMPERATURE = 2.0**100
"""A draw's: above, noise times temperature could overflow float32."""


@struct.dataclass
class Greedy:
    """The most probable token; the lowest id among equals."""

    needs_logits: ClassVar[bool] = False
    distribution_changes: ClassVar[tuple[Any, ...]] = ()

    def step(self, keys: Key[Array, " B"], logits: Logits, tokens: Int[Array, "B L"]) -> Candidates:
        """Candidates with their probability and log-prob at temperature 1."""
        return self.read(reading_of(logits, tokens), tokens)

    def noise(self, keys: Key[Array, " B"], block_length: int) -> Noise | None:
        """None."""
        return None

    def read(self, reading: Reading, tokens: Int[Array, "B L"]) -> Candidates:
        """Candidates from a reading."""
        return _candidates(reading, tokens)


@struct.dataclass
class Sample:
    """A draw from softmax(logits / temperature) by the Gumbel-max trick, in log space and float32.

    Temperature 0 is greedy in the same compiled program (no noise is drawn then), and its log-prob is
    the one at temperature 1. Row i's noise depends on `keys[i]` only.

    How a token is drawn does not decide whether it is kept: the confidence stays the token's probability at
    temperature 1 under unfiltered logits, as in LLaDA (arXiv 2502.09992); only `log_prob` is that of the distribution
    drawn from, filtered and tempered. Code that decides by the latter, as Dream's does (arXiv 2508.15487), is
    `confidence="drawn"`.
    """

    temperature: float | Float[Array, ""]
    filters: tuple[Filter, ...] = ()
    """Applied first to last before the draw."""
    confidence: Literal["model", "drawn"] = struct.field(pytree_node=False, default="model")

    def __post_init__(self) -> None:
        # above, noise times temperature could overflow
        check_number("temperature", self.temperature, 0.0, LARGEST_TEMPERATURE)
        check_choice("confidence", self.confidence, ("model", "drawn"))

    @property
    def needs_logits(self) -> bool:
        """Whether it has filters, which look at all of the vocabulary."""
        return bool(self.filters)

    @property
    def distribution_changes(self) -> tuple[Any, ...]:
        """The filters: they take probability from tokens that are allowed."""
        return self.filters

    def sampling_temperature(self) -> float | Float[Array, ""]:
        """The temperature."""
        return self.temperature

    def step(self, keys: Key[Array, " B"], logits: Logits, tokens: Int[Array, "B L"]) -> Candidates:
        """Candidates with their probability at temperature 1 and log-prob at the sampling temperature."""
        kept = logits
        for each in self.filters:
            kept = each.keep(kept)
        return self.read(reading_of(logits, tokens, kept=kept, noise=self.noise(keys, logits.shape[1])), tokens)

    def noise(self, keys: Key[Array, " B"], block_length: int) -> Noise | None:
        """The temperature, and two random words for every position of each row, from the row's key."""
        words = jax.vmap(lambda key: jax.random.bits(key, (block_length, 2), jnp.uint32))(keys)
        return Noise(temperature=jnp.asarray(self.temperature, jnp.float32), keys=words)

    def read(self, reading: Reading, tokens: Int[Array, "B L"]) -> Candidates:
        """Candidates from a reading."""
        candidates = _candidates(reading, tokens)
        if self.confidence == "model":
            return candidates
        return dataclasses.replace(candidates, confidence=jnp.exp(candidates.log_prob))


@struct.dataclass
class RefuseToken:
    """Makes no proposal where the inner one proposes `token_id`; the token keeps its probability mass.

    dInfer treats the mask id so. Forbidding it (`ForbidTokens`) is the sounder choice: here a block whose
    remaining positions all predict the mask id can never be finished.
    """

    propose: Propose
    token_id: int | Int[Array, ""]

    def __post_init__(self) -> None:
        check_integer("token_id", self.token_id)

    @property
    def needs_logits(self) -> bool:
        """Whether the inner one does."""
        return answers.needs_logits(self.propose)

    @property
    def distribution_changes(self) -> tuple[Any, ...]:
        """The inner one's: refusing a token leaves the draw as it is."""
        return answers.distribution_changes(self.propose)

    def sampling_temperature(self) -> float | Float[Array, ""]:
        """The inner one's."""
        return answers.sampling_temperature(self.propose)

    def step(self, keys: Key[Array, " B"], logits: Logits, tokens: Int[Array, "B L"]) -> Candidates:
        """The inner candidates, with confidence -inf where the token is refused."""
        return self._refuse(self.propose.step(keys, logits, tokens))

    def noise(self, keys: Key[Array, " B"], block_length: int) -> Noise | None:
        """The inner one's."""
        return self.propose.noise(keys, block_length)  # type: ignore[attr-defined]

    def read(self, reading: Reading, tokens: Int[Array, "B L"]) -> Candidates:
        """Candidates from a reading."""
        return self._refuse(self.propose.read(reading, tokens))  # type: ignore[attr-defined]

    def _refuse(self, candidates: Candidates) -> Candidates:
        refused = candidates.token == self.token_id
        return dataclasses.replace(candidates, confidence=jnp.where(refused, -jnp.inf, candidates.confidence))


def reading_of(
    logits: Logits, tokens: Int[Array, "B L"], *, kept: Logits | None = None, noise: Noise | None = None
) -> Reading:
    """Read logits as a head does that is asked for `tokens`.

    The draw is from `kept`, in which filters set logits of improbable tokens to -inf; without noise it is the best.
    """
    kept = logits if kept is None else kept
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    best, best_logit = first_argmax(logits), jnp.max(logits, axis=-1)
    shift = jnp.where(jnp.isfinite(best_logit), best_logit, 0.0)

    def log_sum(logits: Logits, temperature: Float[Array, ""] | float = 1.0) -> Float[Array, "B L"]:
        # differences are divided and not logits, which overflow at low temperatures
        return jnp.log(jnp.sum(jnp.exp((logits - shift[..., None]) / temperature), axis=-1))

    def at(tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
        return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]

    drawn, tempered = best, log_sum(kept)
    if noise is not None:
        scale = noise.temperature
        drawn = jax.lax.cond(
            scale > 0, lambda: first_argmax(kept + scale * gumbel_noise(noise.keys[:, :, None], ids)), lambda: best)
        # another pass over the vocabulary, which is worth a branch
        tempered = jax.lax.cond((scale > 0) & (scale != 1), lambda: log_sum(kept, scale), lambda: tempered)
    noise_of = lambda tokens: jnp.zeros(tokens.shape) if noise is None else gumbel_noise(noise.keys, tokens)  # noqa: E731
    return Reading(
        ids=tokens[..., None], logits=at(tokens)[..., None], noise=noise_of(tokens)[..., None], best=best,
        best_logit=best_logit, best_noise=noise_of(best), drawn=drawn, drawn_logit=at(drawn),
        drawn_noise=noise_of(drawn), log_total=shift + log_sum(logits), log_sum_tempered=tempered,
        temperature=None if noise is None else noise.temperature)


def first_argmax(logits: Logits) -> Int[Array, "B L"]:
    """Index of the largest entry, the lowest among equals, int32.

    As two plain reductions: XLA's argmax, one over pairs, is not vectorised on CPU.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, ids, logits.shape[-1] - 1), axis=-1)


def _candidates(reading: Reading, tokens: Int[Array, "B L"]) -> Candidates:
    temperature = jnp.float32(1.0) if reading.temperature is None else reading.temperature
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    return Candidates(
        token=reading.drawn,
        confidence=jnp.exp(reading.drawn_logit - reading.log_total),
        log_prob=(reading.drawn_logit - reading.best_logit) / temperature - reading.log_sum_tempered,
        current=jnp.exp(reading.logit_of(tokens) - reading.log_total),
    )
