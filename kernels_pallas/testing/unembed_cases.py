"""The cases that every implementation of `unembed` runs, and a float64 NumPy computation as their oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """By default everything is asked for, on sizes that most cases share: they share a compiled program, too."""

    name: str
    rows: int = 6
    vocabulary: int = 397
    model: int = 64
    dtype: str = "float32"
    scale: float = 2.0
    """Standard deviation of the logits."""
    at: int = 4
    forbidden: tuple[int, ...] = ()
    """Padded to FORBIDDEN with ids that forbid nothing."""
    forbid_best: bool = False
    """Forbids row 0's argmax as well."""
    vocab_limit: int = 10**9
    temperature: float | None = 0.7
    second: bool = True
    entropy: bool = True
    expected: int = 24
    """Width of the embedding; 0 for none."""
    ties: tuple[int, ...] = ()
    """Ids that share the best row of the head."""
    poison: tuple[tuple[int, float], ...] = ()
    """Values that stand first in rows of `hidden`."""
    bad_id: int | None = None
    """An id whose row of the head holds a NaN."""
    first_id: int = 0
    bare: bool = False
    """Gives only the arguments that the case says something about."""


FORBIDDEN = 5
PLAIN: dict[str, Any] = dict(at=0, temperature=None, second=False, entropy=False, expected=0)

CASES = (
    Case(name="everything"),
    Case(name="nothing_else", **PLAIN, bare=True),
    Case(name="one_row", rows=1, at=1, expected=0, second=False, entropy=False),
    Case(name="sixty_four_rows", rows=64, **PLAIN | {"at": 1, "second": True}),
    Case(name="seventy_rows", rows=70, **PLAIN | {"expected": 8, "temperature": 1.0}),
    Case(name="vocabulary_of_whole_tiles", vocabulary=384, rows=3),
    Case(name="one_id", vocabulary=1, rows=3, bare=True),
    Case(name="ties_inside_a_tile", ties=(3, 17, 18), temperature=0.0),
    Case(name="ties_across_tiles", ties=(140, 12, 395, 260), temperature=0.0),
    Case(name="runner_up_in_another_tile", ties=(130, 395)),
    Case(name="argmax_forbidden", forbidden=(5, -1, 77, 10**6), forbid_best=True),
    Case(name="all_but_one_forbidden", vocabulary=6, forbidden=(0, 1, 2, 4, 5)),
    Case(name="all_forbidden", vocabulary=6, vocab_limit=4, forbidden=(0, 1, 2, 3)),
    Case(name="limited", vocab_limit=131),
    Case(name="limited_to_one", vocab_limit=1),
    Case(name="limited_to_none", vocab_limit=0),
    Case(name="cold", temperature=0.0),
    Case(name="cool", temperature=0.3, scale=10.0),
    Case(name="icy", temperature=1e-6),
    Case(name="icy_to_the_last_bit", temperature=1e-30, scale=10.0),
    Case(name="warm", temperature=1.0),
    Case(name="hot", temperature=2.0),
    Case(name="large_logits", scale=35.0),
    Case(name="nan_row", poison=((2, NAN),), forbidden=(4,)),
    Case(name="infinite_rows", poison=((0, INF), (4, -INF)), forbidden=(4,)),
    Case(name="nan_at_an_id", bad_id=140),
    Case(name="nan_at_a_forbidden_id", bad_id=4, forbidden=(4,)),
    Case(name="later_ids", first_id=1000, forbidden=(1003, 5), vocab_limit=1350),
    Case(name="bfloat16", dtype="bfloat16", forbidden=(7,)),
    Case(name="bfloat16_ties", dtype="bfloat16", ties=(140, 12, 395), temperature=1.0),
    Case(name="odd_sizes", rows=7, vocabulary=131, model=13),
)


def operands(case: Case, seed: int) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """hidden and head, and the keyword arguments that the case asks for."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(case.rows, case.model))
    head = rng.normal(size=(case.vocabulary, case.model)) * case.scale / math.sqrt(case.model)
    for tie in case.ties:
        head[tie] = 8 * case.scale / case.model * np.sign(hidden[0])  # far above the rest in row 0
    for row, value in case.poison:
        hidden[row, 0] = value
    if case.bad_id is not None:
        head[case.bad_id, 1] = NAN
    arrays = jnp.asarray(hidden, case.dtype), jnp.asarray(head, case.dtype)
    options: dict[str, Any] = {"second": case.second, "entropy": case.entropy}
    forbidden = list(case.forbidden)
    if case.forbid_best:
        forbidden.append(case.first_id + int(np.argmax(_logits(*arrays)[0])))
    if not case.bare:
        options["forbidden"] = jnp.asarray(forbidden + [-1] * (FORBIDDEN - len(forbidden)), jnp.int32)
        options["vocab_limit"] = jnp.int32(case.vocab_limit)
        options["first_id"] = jnp.int32(case.first_id)
    if case.at:
        at = rng.integers(-1, case.vocabulary, (case.rows, case.at)) + case.first_id
        at[:, 0] = case.first_id + np.arange(case.rows) % case.vocabulary
        if case.at > 2:
            at[:, 1] = -1
            at[:, 2] = at[:, 0]
            at[0, 3] = forbidden[0] if forbidden else case.first_id + case.vocabulary
        options["at"] = jnp.asarray(at, jnp.int32)
    if case.temperature is not None:
        options["temperature"] = jnp.float32(case.temperature)
        options["noise_keys"] = jnp.asarray(rng.integers(0, 2**32, (case.rows, 2), dtype=np.uint32))
    if case.expected:
        options["embedding"] = jnp.asarray(rng.normal(size=(case.vocabulary, case.expected)), case.dtype)
    return arrays, options


def _logits(hidden: Any, head: Any) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds in Python integers, from the paper's text."""
    words = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = [(c + w) % 2**32 for c, w in zip(counter, words, strict=False)]
    for step in range(20):
        x = (x + y) % 2**32
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[step % 8]
        y = ((y << rotation) | (y >> (32 - rotation))) % 2**32 ^ x
        if step % 4 == 3:
            inject = step // 4 + 1
            x = (x + words[inject % 3]) % 2**32
            y = (y + words[(inject + 1) % 3] + inject) % 2**32
    return x, y


def gumbel(key: Any, vocab_id: int) -> float:
    """The noise of one key and id in float64."""
    u = (threefry((int(key[0]), int(key[1])), (vocab_id, 0))[0] + 0.5) / 2**32
    return -math.log(-math.log1p(-min(u, 1 - 2.0**-24)))


def oracle(hidden: Any, head: Any, **options: Any) -> list[dict[str, Any]]:
    """The op row by row in float64: a dictionary a row, with the fields that are defined for it.

    A row with a NaN defines the ids and logits by what is not NaN. `scores` holds the noisy logits of all ids.
    """
    logits = _logits(hidden, head)
    first = int(options.get("first_id", 0))
    ids = np.arange(logits.shape[1]) + first
    allowed = ids < int(options.get("vocab_limit", len(ids)))
    allowed &= ~np.isin(ids, np.asarray(options.get("forbidden", [])))
    return [_row(row, values, ids - first, allowed, first, options) for row, values in enumerate(logits)]


def _log_sum_exp(values: np.ndarray) -> float:
    if np.isnan(values).any():
        return NAN
    largest = values.max(initial=-INF)
    if abs(largest) == INF:
        return largest
    return largest + math.log(np.exp(values - largest).sum())


def _row(row: int, values: np.ndarray, places: np.ndarray, allowed: np.ndarray, first: int, options: Any) -> Any:
    bad = np.isnan(values).any()
    clean = np.where(allowed & ~np.isnan(values), values, -INF)
    largest = clean.max(initial=-INF)
    candidates = places[allowed & (clean == largest)]
    best = int(candidates[0]) + first if len(candidates) else -1
    total = NAN if bad else _log_sum_exp(values[allowed])
    result = {"best": best, "best_logit": largest, "log_total": total, "logits": values, "first": first}
    temperature = float(options.get("temperature", 0.0))
    result["log_sum_tempered"] = total - largest if abs(largest) < INF else total
    result["scores"] = clean
    if temperature:
        keys = np.asarray(options["noise_keys"])
        noise = np.array([gumbel(keys[row], int(place) + first) for place in places])
        result["scores"] = clean + temperature * noise
        shift = largest if abs(largest) < INF else 0.0
        result["log_sum_tempered"] = NAN if bad else _log_sum_exp((values[allowed] - shift) / temperature)
    result["allowed"] = allowed
    at = np.asarray(options["at"])[row] - first if "at" in options else []
    inside = [0 <= place < len(places) and allowed[place] for place in at]
    result["at"] = np.array([values[p] if i else -INF for p, i in zip(at, inside, strict=True)])
    others = np.delete(clean, best - first) if best >= 0 else clean
    result["second_logit"] = others.max(initial=-INF)
    probs = np.exp(values[allowed] - total) if abs(total) < INF else None
    terms = None if probs is None else probs[probs > 0] * np.log(probs[probs > 0])
    result["entropy"] = NAN if terms is None else -terms.sum()
    if "embedding" in options:
        result["log_total_all"] = _log_sum_exp(values)
        finite = abs(result["log_total_all"]) < INF
        weights = np.exp(values - result["log_total_all"]) if finite else np.full(len(values), NAN)
        result["expected"] = weights @ np.asarray(options["embedding"], np.float64)
    return result
