"""Running sums over the logits while the vocabulary goes by in tiles: an online softmax and its companions.

Plain jnp on [N, 1] columns and [N, C] tiles, so that an XLA loop and a Pallas TPU kernel share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels_pallas.hardware import current_platform
from kernels_pallas.unembed.noise import gumbel_noise_of
from kernels_pallas.unembed.types import NO_ID, Call, Readout

LARGEST_GATHER = 2**24
"""Numbers of the head's rows that `logits_at` gathers at once where they have to be in memory."""
LARGEST_ID = 2**31 - 1


class Greedy(NamedTuple):
    """Sums over the allowed ids seen so far, of exp(logit - shift), shift = the best logit where it is finite."""

    best: Int[Array, "N 1"]
    """LARGEST_ID before any."""
    best_logit: Float[Array, "N 1"]
    total: Float[Array, "N 1"]
    """NaN once any logit was."""
    second_logit: Float[Array, "N 1"]
    entropy_sum: Float[Array, "N 1"]
    """Sum of exp(logit - shift) * (logit - shift)."""


class Drawn(NamedTuple):
    """Sums over the allowed ids seen so far, with the temperature and the noise."""

    drawn: Int[Array, "N 1"]
    drawn_logit: Float[Array, "N 1"]
    drawn_score: Float[Array, "N 1"]
    tempered_total: Float[Array, "N 1"]
    """Sum of exp((logit - shift) / temperature)."""


class Tile(NamedTuple):
    """One tile of logits with what may be counted of it."""

    logits: Float[Array, "N C"]
    ids: Int[Array, "#N C"]
    fresh: Bool[Array, "#N C"]
    """Not seen in an earlier tile."""
    allowed: Bool[Array, "#N C"]
    """Fresh ones only."""

    def clean(self) -> Float[Array, "N C"]:
        """Allowed logits, NaN left out; -inf elsewhere."""
        return jnp.where(self.allowed & (self.logits > -jnp.inf), self.logits, -jnp.inf)

    def kept(self) -> Float[Array, "N C"]:
        """Allowed logits and every NaN; -inf elsewhere."""
        return jnp.where(self.allowed | jnp.isnan(self.logits), self.logits, -jnp.inf)


def finite(maximum: Float[Array, "..."]) -> Float[Array, "..."]:
    """The number to subtract before the exponential: an infinite maximum would give inf - inf."""
    return jnp.where(jnp.abs(maximum) < jnp.inf, maximum, 0.0)


def rescale(before: Float[Array, "N 1"], after: Float[Array, "N 1"]) -> Float[Array, "N 1"]:
    """Exponent that takes sums from the maximum `before` to the maximum `after`; 0 where nothing was summed."""
    return jnp.where(before == -jnp.inf, 0.0, finite(before) - finite(after))


def start_greedy(rows: int) -> Greedy:
    """Sums before anything is seen."""
    zeros, none = jnp.zeros((rows, 1), jnp.float32), jnp.full((rows, 1), -jnp.inf, jnp.float32)
    return Greedy(jnp.full((rows, 1), LARGEST_ID, jnp.int32), none, zeros, none, zeros)


def start_drawn(rows: int) -> Drawn:
    """Sums before anything is seen."""
    zeros, none = jnp.zeros((rows, 1), jnp.float32), jnp.full((rows, 1), -jnp.inf, jnp.float32)
    return Drawn(jnp.full((rows, 1), LARGEST_ID, jnp.int32), none, none, zeros)


def _lowest(holds: Bool[Array, "N C"], ids: Int[Array, "#N C"]) -> Int[Array, "N 1"]:
    return jnp.min(jnp.where(holds, ids, LARGEST_ID), axis=1, keepdims=True)


def add_greedy(state: Greedy, tile: Tile, *, second: bool, entropy: bool) -> Greedy:
    """The state with a tile more; what is not asked for stays as it is."""
    clean = tile.clean()
    tile_best_logit = jnp.max(clean, axis=1, keepdims=True)
    tile_best = _lowest(tile.allowed & (clean == tile_best_logit), tile.ids)
    best_logit = jnp.maximum(state.best_logit, tile_best_logit)
    best = jnp.minimum(
        jnp.where(state.best_logit == best_logit, state.best, LARGEST_ID),
        jnp.where(tile_best_logit == best_logit, tile_best, LARGEST_ID))
    kept = tile.kept() - finite(best_logit)
    weights = jnp.exp(kept)
    exponent = rescale(state.best_logit, best_logit)
    factor = jnp.exp(exponent)
    total = factor * state.total + jnp.sum(weights, axis=1, keepdims=True)
    second_logit, entropy_sum = state.second_logit, state.entropy_sum
    if second:
        others = jnp.max(jnp.where(tile.ids == tile_best, -jnp.inf, clean), axis=1, keepdims=True)
        loser = jnp.minimum(state.best_logit, tile_best_logit)
        second_logit = jnp.maximum(jnp.maximum(second_logit, others), loser)
    if entropy:
        terms = jnp.sum(jnp.where(kept == -jnp.inf, 0.0, weights * kept), axis=1, keepdims=True)
        entropy_sum = factor * (entropy_sum + exponent * state.total) + terms
    return Greedy(best, best_logit, total, second_logit, entropy_sum)


def add_drawn(
    state: Drawn,
    tile: Tile,
    best_logits: tuple[Float[Array, "N 1"], Float[Array, "N 1"]],
    *,
    temperature: Float[Array, ""],
    key_words: tuple[UInt32[Array, "N 1"], UInt32[Array, "N 1"]],
) -> Drawn:
    """The state with a tile more; `best_logits` are the greedy ones before and after it. temperature > 0."""
    clean = tile.clean()
    scores = clean + temperature * gumbel_noise_of(*key_words, tile.ids)
    tile_score = jnp.max(scores, axis=1, keepdims=True)
    tile_drawn = _lowest(tile.allowed & (scores == tile_score), tile.ids)
    tile_logit = jnp.max(jnp.where(tile.ids == tile_drawn, clean, -jnp.inf), axis=1, keepdims=True)
    wins = (tile_score > state.drawn_score) | ((tile_score == state.drawn_score) & (tile_drawn < state.drawn))
    weights = jnp.exp((tile.kept() - finite(best_logits[1])) / temperature)
    factor = jnp.exp(rescale(*best_logits) / temperature)
    return Drawn(
        drawn=jnp.where(wins, tile_drawn, state.drawn),
        drawn_logit=jnp.where(wins, tile_logit, state.drawn_logit),
        drawn_score=jnp.maximum(state.drawn_score, tile_score),
        tempered_total=factor * state.tempered_total + jnp.sum(weights, axis=1, keepdims=True))


def join(
    greedy: Greedy, drawn: Drawn | None, temperature: Float[Array, ""] | None
) -> tuple[Greedy, Drawn | None]:
    """States of P parts of the vocabulary, fields [P, N], as if one had seen it all.

    One reduction with a combiner of its own, so one kernel on a GPU. With a `drawn` the temperature is positive, or
    nothing in it counts.
    """
    fields = [*greedy]
    starts: list[float | int] = [LARGEST_ID, -jnp.inf, 0.0, -jnp.inf, 0.0]
    if drawn is not None and temperature is not None:
        # the combiner may not close over an array, so the temperature goes along with every part
        heat = jnp.broadcast_to(jnp.where(temperature > 0, temperature, 1.0), greedy.best_logit.shape)
        fields += [*drawn, greedy.best_logit, heat]
        starts += [LARGEST_ID, -jnp.inf, -jnp.inf, 0.0, -jnp.inf, 0.0]
    identity = [jnp.asarray(start, field.dtype) for start, field in zip(starts, fields, strict=True)]
    joined = lax.reduce(fields, identity, lambda a, b: (
        *_join_greedy(Greedy(*a[:5]), Greedy(*b[:5])), *(_join_drawn(a[5:], b[5:]) if len(a) > 5 else ())), (0,))
    columns = [field[:, None] for field in joined]
    return Greedy(*columns[:5]), Drawn(*columns[5:9]) if drawn is not None else None


def _join_greedy(a: Greedy, b: Greedy) -> Greedy:
    best_logit = jnp.maximum(a.best_logit, b.best_logit)
    exponents = [rescale(part.best_logit, best_logit) for part in (a, b)]
    factors = [jnp.exp(exponent) for exponent in exponents]
    entropies = [factor * (part.entropy_sum + exponent * part.total)
                 for factor, exponent, part in zip(factors, exponents, (a, b), strict=True)]
    return Greedy(
        best=jnp.minimum(*(jnp.where(part.best_logit == best_logit, part.best, LARGEST_ID) for part in (a, b))),
        best_logit=best_logit, total=factors[0] * a.total + factors[1] * b.total,
        second_logit=jnp.maximum(
            jnp.maximum(a.second_logit, b.second_logit), jnp.minimum(a.best_logit, b.best_logit)),
        entropy_sum=entropies[0] + entropies[1])


def _join_drawn(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, ...]:
    """The fields of two `Drawn`, the best logit that the tempered total was taken from, and the temperature.

    The difference is divided and not its terms: these overflow at low temperatures.
    """
    wins = (b[2] > a[2]) | ((b[2] == a[2]) & (b[0] < a[0]))
    largest, heat = jnp.maximum(a[4], b[4]), jnp.maximum(a[5], b[5])
    positive = jnp.where(heat > 0, heat, 1.0)  # 0 is the reduction's start, beside itself
    totals = [jnp.exp(rescale(part[4], largest) / positive) * part[3] for part in (a, b)]
    chosen = [jnp.where(wins, y, x) for x, y in zip(a[:3], b[:3], strict=True)]
    return (*chosen, totals[0] + totals[1], largest, heat)


def log_of_sum(maximum: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """log sum exp from a maximum and the sum of exp(logit - finite(maximum))."""
    return finite(maximum) + jnp.log(total)


def finish(
    call: Call,
    greedy: Greedy,
    drawn: Drawn | None,
    *,
    at: Float[Array, "N A"],
    expected: Float[Array, "N D2"] | None = None,
    log_total_all: Float[Array, " N"] | None = None,
) -> Readout:
    """The readout when the whole vocabulary has gone by. `drawn` counts where the temperature is positive."""
    best = jnp.where(greedy.best == LARGEST_ID, NO_ID, greedy.best)
    log_total = log_of_sum(greedy.best_logit, greedy.total)
    fields: tuple[Array, ...] = (best, greedy.best_logit, greedy.best_logit, jnp.log(greedy.total))
    if drawn is not None and call.temperature is not None:
        positive = call.temperature > 0
        token = jnp.where(drawn.drawn == LARGEST_ID, NO_ID, drawn.drawn)
        hot = (token, drawn.drawn_logit, drawn.drawn_score, jnp.log(drawn.tempered_total))
        fields = tuple(jnp.where(positive, a, b) for a, b in zip(hot, fields, strict=True))
    entropy = jnp.log(greedy.total) - greedy.entropy_sum / greedy.total
    entropy = jnp.where(jnp.abs(log_total) < jnp.inf, jnp.maximum(entropy, 0.0), jnp.nan)
    column = lambda values: values[:, 0]  # noqa: E731
    return Readout(
        best=column(best), best_logit=column(greedy.best_logit), drawn=column(fields[0]),
        drawn_logit=column(fields[1]), drawn_score=column(fields[2]), log_total=column(log_total),
        log_sum_tempered=column(fields[3]), at=at,
        second_logit=column(greedy.second_logit) if call.second else None,
        entropy=column(entropy) if call.entropy else None, expected=expected, log_total_all=log_total_all)


def logits_at(call: Call, readable: Bool[Array, "N A"]) -> Float[Array, "N A"]:
    """Logits of `call.at` from the head's own rows: a gather and a float32 sum of products.

    A GPU fuses the two. Elsewhere the rows are in memory, so of many they are taken one id of each row at a time.
    """
    if call.at.shape[1] == 0:
        return jnp.zeros(call.at.shape, jnp.float32)
    place = call.at - call.first_id
    inside = (place >= 0) & (place < call.head.shape[0]) & readable
    place = jnp.clip(place, 0, call.head.shape[0] - 1)

    def products(ids: Int[Array, " N *A"]) -> Float[Array, " N *A"]:
        hidden = call.hidden if ids.ndim == 1 else call.hidden[:, None]
        return jnp.sum(call.head[ids].astype(jnp.float32) * hidden.astype(jnp.float32), axis=-1)

    one_by_one = current_platform() != "gpu" and place.size * call.head.shape[1] > LARGEST_GATHER
    return jnp.where(inside, lax.map(products, place.T).T if one_by_one else products(place), -jnp.inf)
