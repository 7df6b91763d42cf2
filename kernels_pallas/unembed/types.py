"""Arguments of the op, and its result."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int, UInt32

NO_ID = -1
"""Stands for an id where no id is allowed."""


class Readout(NamedTuple):
    """Summary of N rows of logits: float32 values and int32 ids.

    "Allowed" ids are those below `vocab_limit` that are not forbidden. A NaN among the logits makes the row's
    `log_total`, `log_sum_tempered`, `entropy` and `expected` NaN; the other fields leave it out.
    """

    best: Int[Array, " N"]
    """The allowed id with the largest logit, the lowest among equals; -1 where no id is allowed."""
    best_logit: Float[Array, " N"]
    drawn: Int[Array, " N"]
    """The allowed id with the largest logit + temperature * Gumbel noise; `best` without a temperature or at 0."""
    drawn_logit: Float[Array, " N"]
    """The drawn id's logit, without the noise."""
    drawn_score: Float[Array, " N"]
    """The drawn id's logit with the noise."""
    log_total: Float[Array, " N"]
    """log sum exp of the allowed logits; NaN if any logit of the row is NaN, allowed or not, and only then."""
    log_sum_tempered: Float[Array, " N"]
    """log of the sum over allowed ids of exp((logit - best_logit) / temperature); at temperature 1 without one or at 0.

    It is taken from the best logit because logit / temperature overflows at low temperatures: a token's log-prob is
    (logit - best_logit) / temperature - log_sum_tempered.
    """
    at: Float[Array, "N A"]
    """Logits of the ids asked for; -inf for an id that is forbidden or outside the vocabulary."""
    second_logit: Float[Array, " N"] | None
    """The runner-up's logit (the best one's, if two share it); -inf where one id is allowed."""
    entropy: Float[Array, " N"] | None
    """Entropy of the softmax over the allowed ids, in nats; NaN where `log_total` is not finite."""
    expected: Float[Array, "N D2"] | None
    """softmax(all logits, those of forbidden ids too) @ embedding, in the embedding's dtype."""
    log_total_all: Float[Array, " N"] | None
    """log sum exp of all logits, which `expected` is divided by; given together with it."""


class Call(NamedTuple):
    """The op's arguments, checked and complete, as every implementation takes them."""

    hidden: Float[Array, "N D"]
    head: Float[Array, "V D"]
    at: Int[Array, "N A"]
    """A may be 0."""
    forbidden: Int[Array, " n"]
    """n may be 0; an id outside the vocabulary forbids nothing."""
    vocab_limit: Int[Array, ""]
    temperature: Float[Array, ""] | None
    """Static absence; 0 or less is no temperature either, in the same program."""
    noise_keys: UInt32[Array, "N 2"] | None
    embedding: Float[Array, "V D2"] | None
    second: bool
    entropy: bool
    first_id: Int[Array, ""]
    """Id of the head's first row; `at`, `forbidden` and `vocab_limit` count as it does."""
