"""The oracle: block diffusion decoding as a plain NumPy loop over one row, in float64.

Written from the published descriptions of each decoder and the loop's documented rules, not from the engine.
One row at a time, no padding, no batch, no jit; JAX is used for its random numbers only, because the noise is
part of the contract. Every comparison that decides something records its margin: a test must not use a case
whose `margin` is within float32 error (`RELIABLE`), because there the engine may rightly differ.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import gumbel_noise

RELIABLE = 1e-5
LENGTH, END_OF_SEQUENCE, NAN, MAX_STEPS = range(4)

# --- numbers ---


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis; -inf has probability 0."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


class Margin:
    """The smallest distance to a different decision so far."""

    def __init__(self) -> None:
        self.value = math.inf

    def compare(self, left: float, right: float) -> bool:
        """left >= right, remembering how close it was."""
        if math.isfinite(left) and math.isfinite(right):
            self.value = min(self.value, abs(left - right))
        return left >= right

    def exceeds(self, left: float, right: float) -> bool:
        """left > right."""
        return not self.compare(right, left)

    def cut(self, ranked: Sequence[float], kept: int) -> None:
        """Of values in descending order the first `kept` are taken.

        Equal values (two positions with one token left, say) are no doubt: the first position goes first.
        """
        if 0 < kept < len(ranked) and ranked[kept - 1] != ranked[kept]:
            self.compare(ranked[kept - 1], ranked[kept])


@dataclasses.dataclass
class Step:
    """What every part may know."""

    step: int
    step_in_block: int
    block: int
    block_start: int
    length: int
    block_length: int
    num_open: int
    masked: list[int]
    """Positions within the block."""
    margin: Margin
    noise_key: Any
    choice_key: Any


# --- transforms: (logits [L, V], step, memory) -> logits; `memory` is a dict that lives for one block ---

Transform = Callable[[np.ndarray, Step, dict], np.ndarray]


def identity(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
    return logits


def forbid(token_ids: Sequence[int], vocab_limit: int | None = None) -> Transform:
    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        out = logits.copy()
        for token in range(logits.shape[1]):
            if token in token_ids or (vocab_limit is not None and token >= vocab_limit):
                out[:, token] = -math.inf
        return out

    return run


def _keep(logits: np.ndarray, step: Step, choose: Callable[[np.ndarray], set[int]]) -> np.ndarray:
    out = np.full_like(logits, -math.inf)
    for position in range(len(logits)):
        for token in choose(logits[position]):
            out[position, token] = logits[position, token]
    return out


def top_k(k: int) -> Transform:
    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        def choose(row: np.ndarray) -> set[int]:
            order = sorted(range(len(row)), key=lambda token: -row[token])
            step.margin.cut([row[token] for token in order], k)
            return set(order[:k])

        return _keep(logits, step, choose)

    return run


def top_p(p: float, temperature: float = 1.0) -> Transform:
    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        def choose(row: np.ndarray) -> set[int]:
            probability = softmax(row / temperature)
            order = sorted(range(len(row)), key=lambda token: -probability[token])
            kept: set[int] = set()
            mass = 0.0
            for token in order:
                kept.add(token)
                mass += probability[token]
                if step.margin.compare(mass, p):
                    break
            step.margin.cut([probability[token] for token in order], len(kept))
            return kept

        return _keep(logits, step, choose)

    return run


def min_p(p: float, temperature: float = 1.0) -> Transform:
    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        def choose(row: np.ndarray) -> set[int]:
            probability = softmax(row / temperature)
            return {t for t in range(len(row)) if step.margin.compare(probability[t], p * probability.max())}

        return _keep(logits, step, choose)

    return run


def credit(alpha: float = 0.7, beta: float = 0.8, gamma: float = 0.2) -> Transform:
    """dInfer: credit decays, grows at the present argmax of masked positions, and is added to the logits."""

    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        mass = memory.setdefault("credit", np.zeros_like(logits))
        mass *= beta
        probability = softmax(logits)
        for position in step.masked:
            best = int(logits[position].argmax())
            step.margin.cut(sorted(logits[position], reverse=True), 1)
            mass[position, best] += probability[position, best] ** gamma
        return logits + alpha * np.log1p(mass)

    return run


def chain(*parts: Transform) -> Transform:
    def run(logits: np.ndarray, step: Step, memory: dict) -> np.ndarray:
        for i, part in enumerate(parts):
            logits = part(logits, step, memory.setdefault(i, {}))
        return logits

    return run


# --- proposals: (logits [L, V], step) -> tokens, confidence, log_prob [L] ---

Propose = Callable[[np.ndarray, Step], tuple[np.ndarray, np.ndarray, np.ndarray]]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gumbel(key: Any, rows: int, columns: int) -> jax.Array:
    words = jax.random.bits(key, (rows, 2), jnp.uint32)
    return gumbel_noise(words[:, None], jnp.arange(columns))


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: Any, count: int) -> jax.Array:
    return jax.random.uniform(key, (count,))


@jax.jit
def _step_keys(key: Any, row_id: int, step: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row_id), step))


def sample(temperature: float = 0.0, *filters: Transform) -> Propose:
    """argmax of logits + temperature * Gumbel noise among what filters keep; greedy at 0.

    The confidence is that of all logits, the log-prob that of those kept.
    """

    def run(logits: np.ndarray, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = logits
        for each in filters:
            kept = each(kept, step, {})
        scores = kept.copy()
        if temperature > 0:
            scores += temperature * np.asarray(_gumbel(step.noise_key, *logits.shape), np.float64)
        for position in step.masked:
            step.margin.cut(sorted(scores[position], reverse=True), 1)
        token = scores.argmax(-1)
        where = np.arange(len(logits))
        with np.errstate(divide="ignore"):
            log_prob = np.log(softmax(kept / (temperature or 1.0)))[where, token]
        return token, softmax(logits)[where, token], log_prob

    return run


def refuse(propose: Propose, refused: int) -> Propose:
    """A position whose candidate is `refused` has no proposal."""

    def run(logits: np.ndarray, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        token, confidence, log_prob = propose(logits, step)
        return token, np.where(token == refused, -math.inf, confidence), log_prob

    return run


# --- strategies: (choice, step) -> (positions of the block to commit, to reopen) ---


@dataclasses.dataclass
class Choice:
    """What a strategy sees: candidates, probabilities of the present tokens, what the loop wrote."""

    confidence: np.ndarray
    current: np.ndarray
    written: set[int]


Strategy = Callable[[Choice, Step], tuple[set[int], set[int]]]
Value = float | Callable[[int], float]


def _at(value: Value, step: Step) -> float:
    return value(step.step) if callable(value) else value


def _ranked(choice: Choice, step: Step) -> list[int]:
    """Masked positions that have a proposal, the most confident first."""
    proposed = [p for p in step.masked if choice.confidence[p] > -math.inf]
    return sorted(proposed, key=lambda p: -choice.confidence[p])


def _best(choice: Choice, step: Step) -> set[int]:
    ranked = _ranked(choice, step)
    step.margin.cut([choice.confidence[p] for p in ranked], 1)
    return set(ranked[:1])


def threshold(value: Value) -> Strategy:
    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        ranked = _ranked(choice, step)
        if not ranked:
            return set(), set()
        bound = min(_at(value, step), choice.confidence[ranked[0]] - 1e-5)
        step.margin.compare(choice.confidence[ranked[0]], _at(value, step))
        chosen = {p for p in ranked[1:] if step.margin.compare(choice.confidence[p], bound)}
        return chosen | set(ranked[:1]), set()

    return run


def quota(steps: int) -> Strategy:
    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        wanted = step.num_open // steps + (step.step_in_block < step.num_open % steps)
        ranked = _ranked(choice, step)
        wanted = max(wanted, 1)
        step.margin.cut([choice.confidence[p] for p in ranked], wanted)
        return set(ranked[:wanted]), set()

    return run


def factor(value: float) -> Strategy:
    """Fast-dLLM: the largest prefix in which every n has (n + 1)(1 - c_n) < factor."""

    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        ranked = _ranked(choice, step)
        count = 0
        for n, position in enumerate(ranked, start=1):
            if not step.margin.exceeds(value, (n + 1) * (1 - choice.confidence[position])):
                break
            count = n
        count = max(count, 1)
        step.margin.cut([choice.confidence[p] for p in ranked], count)
        return set(ranked[:count]), set()

    return run


def local_leap(anchor: float, near: float, radius: int) -> Strategy:
    """LocalLeap: all of at least `anchor`, what is `near` enough within `radius` of one, or the best."""

    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        chosen = _best(choice, step)
        anchors = [p for p in _ranked(choice, step) if step.margin.compare(choice.confidence[p], anchor)]
        chosen |= set(anchors)
        for position in _ranked(choice, step):
            if any(abs(position - other) <= radius for other in anchors) and step.margin.compare(
                    choice.confidence[position], near):
                chosen.add(position)
        return chosen, set()

    return run


def hierarchical(high: Value, low: float) -> Strategy:
    """dInfer: the best of each run if above low, all above high, and the best of all."""

    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        chosen = _best(choice, step)
        runs: list[list[int]] = []
        for position in sorted(step.masked):
            if runs and runs[-1][-1] == position - 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        for members in runs:
            first = [p for p in _ranked(choice, step) if p in members]
            step.margin.cut([choice.confidence[p] for p in first], 1)
            if first and step.margin.exceeds(choice.confidence[first[0]], low):
                chosen.add(first[0])
        for position in _ranked(choice, step):
            if step.margin.exceeds(choice.confidence[position], _at(high, step)):
                chosen.add(position)
        return chosen, set()

    return run


def remasking(inner: Strategy, value: float) -> Strategy:
    """Reopens what the loop wrote and now finds less likely than `value`, fewer than it commits."""

    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        chosen, reopened = inner(choice, step)
        doubtful = [p for p in sorted(choice.written) if not step.margin.compare(choice.current[p], value)]
        doubtful.sort(key=lambda p: choice.current[p])
        budget = max(len(chosen) - 1, 0)
        step.margin.cut([choice.current[p] for p in doubtful], budget)
        return chosen, reopened | set(doubtful[:budget])

    return run


def random_order(inner: Strategy) -> Strategy:
    def run(choice: Choice, step: Step) -> tuple[set[int], set[int]]:
        score = np.asarray(_uniform(step.choice_key, len(choice.confidence)), np.float64)
        score = np.where(np.isneginf(choice.confidence), -math.inf, score)
        return inner(dataclasses.replace(choice, confidence=score), step)

    return run


# --- cache policies: step -> None (no cache at all) or (refresh, window start, window end) ---

Policy = Callable[[Step], tuple[bool, int, int] | None]


def no_cache(step: Step) -> None:
    return None


def prefix(step: Step) -> tuple[bool, int, int]:
    return step.step_in_block == 0, step.block_start, step.length


def dual(step: Step) -> tuple[bool, int, int]:
    return step.step_in_block == 0, step.block_start, step.block_start + step.block_length


def vicinity(before: int, after: int) -> Policy:
    def run(step: Step) -> tuple[bool, int, int]:
        end = step.block_start + step.block_length + after
        return step.step_in_block == 0, step.block_start - before, end

    return run


def block_causal(step: Step) -> tuple[bool, int, int]:
    """The block and the one before it; everything once."""
    first = step.block == 0 and step.step_in_block == 0
    return first, step.block_start - step.block_length, step.block_start + step.block_length


def periodic(policy: Policy, every: int) -> Policy:
    def run(step: Step) -> tuple[bool, int, int] | None:
        plan = policy(step)
        return plan and (plan[0] or step.step_in_block % every == 0, *plan[1:])

    return run


def with_warmup(policy: Policy, steps: int) -> Policy:
    """The first `steps` steps of block 0 are full forwards, and the one after them fills the cache."""

    def run(step: Step) -> tuple[bool, int, int] | None:
        plan = policy(step)
        warming = step.block == 0 and step.step_in_block <= steps
        return plan and (plan[0] or warming, *plan[1:])

    return run


# --- smoothing ---


def linear(
    start: float, slope: float, minimum: float = -math.inf, maximum: float = math.inf
) -> Callable[[int], float]:
    return lambda step: min(max(start + slope * step, minimum), maximum)


SOFT = linear(0.15, 0.02, maximum=0.3)

# --- the loop ---


@dataclasses.dataclass
class Row:
    """What became of one row."""

    tokens: list[int]
    is_masked: list[bool]
    commit_step: list[int]
    log_prob: list[float]
    nfe: int
    refreshes: int
    stop_reason: int
    margin: float


def decode(
    model: Any,
    tokens: Sequence[int],
    is_masked: Sequence[bool],
    key: Any,
    *,
    first_block: int,
    block_length: int,
    row_id: int = 0,
    strategy: Strategy,
    max_steps: int | None = None,
    policy: Policy = no_cache,
    transform: Transform = identity,
    propose: Propose | None = None,
    weight: Callable[[int], float] | None = None,
    eos_ids: Sequence[int] = (),
) -> Row:
    """Decode one row: `tokens` holds the mask id where `is_masked`, `weight` is that of soft tokens."""
    length = len(tokens)
    canvas = np.array(tokens)
    masked = np.array(is_masked, bool)
    is_open = masked.copy()
    mask_token = canvas[masked][0] if masked.any() else -1
    commit_step = np.full(length, -1)
    log_prob = np.zeros(length)
    inputs = model.embed(canvas)
    cache = model.init_cache(length)
    propose = propose or sample(0.0)
    margin = Margin()
    steps = refreshes = 0
    reason = LENGTH

    for block in range((length - first_block + block_length - 1) // block_length):
        low = first_block + block * block_length
        inside = [p for p in range(low, low + block_length) if 0 <= p < length]
        num_open = int(masked[inside].sum())
        if num_open == 0:
            continue
        memory: dict = {}
        written: set[int] = set()
        step_in_block = 0
        while masked[inside].any() and reason == LENGTH:
            if step_in_block == (max_steps or block_length):
                reason = MAX_STEPS
                break
            keys = _step_keys(key, row_id, steps)
            step = Step(steps, step_in_block, block, low, length, block_length, num_open,
                        [p - low for p in inside if masked[p]], margin, keys[0], keys[1])
            # Forward.
            plan = policy(step)
            if plan is None or plan[0]:
                start, end = 0, length
                refreshes += 1
            else:
                start, end = max(plan[1], 0), min(plan[2], length)
            raw = model.forward(inputs[start:end], start, None if plan is None else cache)
            steps += 1
            step_in_block += 1
            logits = np.zeros((block_length, raw.shape[1]))
            for p in inside:
                logits[p - low] = raw[p - start]
            if np.isnan(logits).any():
                reason = NAN
                break
            # Decision.
            logits = transform(logits, step, memory)
            token, confidence, chosen_log_prob = propose(logits, step)
            now = softmax(logits)
            current = np.array([now[p - low, canvas[p]] if p in inside else 0.0
                                for p in range(low, low + block_length)])
            commit, reopen = strategy(Choice(confidence, current, {p - low for p in written}), step)
            for offset in commit:
                p = low + offset
                canvas[p], masked[p] = token[offset], False
                commit_step[p], log_prob[p] = step.step, chosen_log_prob[offset]
                written.add(p)
            for offset in reopen:
                p = low + offset
                canvas[p], masked[p] = mask_token, True
                commit_step[p], log_prob[p] = -1, 0.0
                written.discard(p)
            # Next inputs of what was recomputed.
            embedded = model.embed(canvas)
            if weight is not None:
                vocabulary = model.embed(np.arange(raw.shape[1]))
                for p in range(start, end):
                    if masked[p]:
                        embedded[p] += weight(step.step) * (softmax(raw[p - start]) @ vocabulary)
            inputs[start:end] = embedded[start:end]
        if reason != LENGTH:
            break
        if any(is_open[p] and canvas[p] in eos_ids for p in inside):
            reason = END_OF_SEQUENCE
            canvas[masked], masked[:] = eos_ids[0], False
            break
    return Row(canvas.tolist(), masked.tolist(), commit_step.tolist(), log_prob.tolist(), steps, refreshes,
               reason, margin.value)
