"""The contract of each kind of part, and one table per kind: a new part adds one line here.

Common to all: a part is a pytree whose numbers are leaves (changing them compiles nothing), `step` is pure, gives
under jit what it gives without, and treats every row by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import cache_policies, proposals, smoothing, stopping, strategies, transforms
from djax.contracts.types import Candidates, Decision, StepInfo
from djax.parts.schedules import Constant, Cosine, Linear

BATCH, LENGTH, VOCAB = 3, 8, 12
CANVAS = 40

# name: (part, how many numbers it has)
TRANSFORMS: dict[str, tuple[Any, int]] = {
    "identity": (transforms.Identity(), 0),
    "forbid": (transforms.ForbidTokens(jnp.array([1, 5])), 1),
    "forbid_limit": (transforms.ForbidTokens(jnp.array([1]), 9), 2),
    "top_k": (transforms.TopK(4), 0),
    "top_p": (transforms.TopP(0.7, 0.9), 2),
    "min_p": (transforms.MinP(0.1, 1.2), 2),
    "credit": (transforms.Credit(0.7, 0.8, 0.2), 3),
    "chain": (transforms.Chain((transforms.ForbidTokens(jnp.array([3])), transforms.Credit(),
                                transforms.TopP(0.9))), 6),
}
PROPOSALS: dict[str, tuple[Any, int]] = {
    "greedy": (proposals.Greedy(), 0),
    "sample": (proposals.Sample(0.7), 1),
    "refuse": (proposals.RefuseToken(proposals.Sample(0.7), 2), 2),
    "refuse_greedy": (proposals.RefuseToken(proposals.Greedy(), 2), 1),
}
STRATEGIES: dict[str, tuple[Any, int]] = {
    "threshold": (strategies.Threshold(0.6), 1),
    "threshold_schedule": (strategies.Threshold(Linear(1.0, -0.02, minimum=0.5)), 4),
    "quota": (strategies.Quota(3), 1),
    "factor": (strategies.Factor(1.0), 1),
    "hierarchical": (strategies.Hierarchical(0.8, 0.4), 2),
    "local_leap": (strategies.LocalLeap(0.8, 0.4, 2), 3),
    "remasking": (strategies.Remasking(strategies.Hierarchical(0.8, 0.4), 0.5), 3),
    "random_quota": (strategies.RandomOrder(strategies.Quota(3)), 1),
    "random_threshold": (strategies.RandomOrder(strategies.Threshold(0.4)), 1),
    "remasking_random": (strategies.Remasking(strategies.RandomOrder(strategies.Quota(3)), 0.5), 2),
}
POLICIES: dict[str, tuple[Any, int]] = {
    "none": (cache_policies.NoCache(), 0),
    "prefix": (cache_policies.Prefix(), 0),
    "dual": (cache_policies.Dual(), 0),
    "vicinity": (cache_policies.Vicinity(3, 5), 0),
    "vicinity_wide": (cache_policies.Vicinity(100, 100), 0),
    "block_causal": (cache_policies.BlockCausal(), 0),
    "periodic": (cache_policies.Periodic(cache_policies.Prefix(), 3), 1),
    "warmup": (cache_policies.WithWarmup(cache_policies.Vicinity(3, 5), 2), 1),
    "warmup_periodic": (cache_policies.WithWarmup(cache_policies.Periodic(cache_policies.Dual(), 4), 1), 2),
}
SMOOTHINGS: dict[str, tuple[Any, int]] = {
    "hard": (smoothing.HardTokens(), 0),
    "soft": (smoothing.SoftTokens(), 4),
    "soft_number": (smoothing.SoftTokens(0.2), 1),
    "soft_constant": (smoothing.SoftTokens(Constant(0.2)), 1),
    "soft_cosine": (smoothing.SoftTokens(Cosine(0.3, 0.1, 8)), 3),
}
STOP_RULES: dict[str, tuple[Any, int]] = {
    "never": (stopping.Never(), 0),
    "on_eos": (stopping.OnEos(jnp.array([2, 4])), 1),
}
ALL = {
    f"{kind}/{name}": part
    for kind, table in (("transform", TRANSFORMS), ("propose", PROPOSALS), ("strategy", STRATEGIES),
                        ("cache_policy", POLICIES), ("smoothing", SMOOTHINGS), ("stop_rule", STOP_RULES))
    for name, part in table.items()}


def table(entries: dict[str, tuple[Any, int]]) -> Any:
    return pytest.mark.parametrize("part", [part for part, _ in entries.values()], ids=list(entries))


def vary(part: Any) -> Any:
    """The same part with every number changed."""
    return jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
                        else leaf * 0.9, part)


# --- inputs ---


def make_logits(seed: int, shape: tuple[int, ...] = (BATCH, LENGTH, VOCAB)) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * rng.uniform(0.5, 4, (*shape[:-1], 1)), jnp.float32)


def make_mask(seed: int) -> jax.Array:
    """At least one masked position per row."""
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.6
    mask[:, seed % LENGTH] = True
    return jnp.asarray(mask)


def make_info(seed: int, **changes: Any) -> StepInfo:
    rng = np.random.default_rng(seed)
    values = {
        "row_step": jnp.asarray(rng.integers(3, 30, BATCH), jnp.int32), "step_in_block": jnp.int32(2),
        "block": jnp.int32(1), "block_start": jnp.int32(16), "is_open": jnp.ones((BATCH, LENGTH), bool)}
    return StepInfo(**(values | changes))


def make_candidates(seed: int) -> Candidates:
    rng = np.random.default_rng(seed)
    confidence = rng.random((BATCH, LENGTH)).astype(np.float32)
    return Candidates(
        token=jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32), confidence=jnp.asarray(confidence),
        log_prob=jnp.log(confidence), current=jnp.asarray(rng.random((BATCH, LENGTH)), jnp.float32))


def keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), BATCH)


def call(kind: str, part: Any, seed: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of (part, arguments) that runs the part from a fresh state, and arguments for it."""
    rng = np.random.default_rng(seed)
    if kind == "transform":
        def transform(part: Any, logits: jax.Array, mask: jax.Array) -> Any:
            logits, state = part.step(logits, mask, part.init(logits.shape[0], LENGTH))
            return part.step(logits * 0.9, mask, state)

        return transform, (make_logits(seed), make_mask(seed))
    if kind == "propose":
        tokens = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
        return (lambda part, *given: part.step(*given)), (keys(seed), make_logits(seed), tokens)
    if kind == "strategy":
        def strategy(part: Any, keys: Any, candidates: Any, mask: Any, info: Any) -> Any:
            return part.step(keys, candidates, mask, info, part.init(mask.shape[0], LENGTH))

        return strategy, (keys(seed), make_candidates(seed), make_mask(seed), make_info(seed))
    if kind == "cache_policy":
        return (lambda part, info: part.window(info, CANVAS, LENGTH)), (make_info(seed),)
    if kind == "smoothing":
        return (lambda part, *given: part.step(*given)), (
            make_logits(seed), make_logits(seed + 1), make_mask(seed), make_info(seed))
    tokens = jnp.asarray(rng.integers(0, 8, (BATCH, CANVAS)), jnp.int32)
    is_open, is_masked = (jnp.asarray(rng.random((BATCH, CANVAS)) < 0.3) for _ in range(2))
    return (lambda part, *given: (part.step(*given), part.ends(given[0]), part.fill())), (
        tokens, is_open, is_masked & is_open, make_info(seed))


def assert_equal(left: Any, right: Any, message: str, *, exact: bool = True) -> None:
    left_leaves, left_tree = jax.tree.flatten(left)
    right_leaves, right_tree = jax.tree.flatten(right)
    assert left_tree == right_tree, message
    for a, b in zip(left_leaves, right_leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), message
        if exact or not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b, message)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=message)


@jax.jit
def step(part: Any, *given: Any) -> Any:
    """One program a part and its shapes; eager calls would compile each operation alone."""
    return part.step(*given)


# --- what all parts share ---


@pytest.mark.parametrize("name", ALL)
def test_part_is_a_frozen_pytree_with_its_numbers_as_leaves(name: str) -> None:
    part, numbers = ALL[name]
    leaves, tree = jax.tree.flatten(part)
    assert len(leaves) == numbers
    assert jax.tree.unflatten(tree, leaves) == part if not any(hasattr(x, "shape") for x in leaves) else True
    hash(tree)
    if dataclasses.fields(part):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, 0)


def test_different_parts_have_different_tree_structures() -> None:
    """Else `jit` may run the program of another part: its cache compares tree structures, and those of two
    classes registered with `jax.tree_util.register_dataclass` (flax.struct does that) are equal when their
    fields are; on jaxlib 0.10 about one lookup in a hundred then finds the wrong entry."""
    schedules = {"constant": Constant(0.1), "linear": Linear(0.1, 0.1), "cosine": Cosine(0.1, 0.1, 3)}
    parts = [*(part for part, _ in ALL.values()), *schedules.values()]
    # The same shape of fields across kinds, so that a new class cannot fall together with an old one.
    for i, a in enumerate(parts):
        for b in parts[:i]:
            if type(a) is not type(b):
                assert jax.tree.structure(a) != jax.tree.structure(b), f"{type(a)} and {type(b)}"


@pytest.mark.parametrize("name", ALL)
def test_part_is_pure_jittable_and_sweeps_without_compiling(name: str) -> None:
    kind, (part, _) = name.split("/")[0], ALL[name]
    function, given = call(kind, part, 0)
    before = jax.tree.map(lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x), given)
    eager = function(part, *given)
    assert_equal(eager, function(part, *given), f"{name} is not pure")
    after = jax.tree.map(lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x), given)
    assert_equal(before, after, f"{name} changed its arguments")
    jitted = jax.jit(function)
    assert_equal(eager, jitted(part, *given), f"{name} differs under jit", exact=False)
    # A part built anew, with other numbers, on other data: still one compilation.
    jitted(vary(part), *call(kind, part, 1)[1])
    jitted(jax.tree.map(lambda x: x, part), *call(kind, part, 2)[1])
    assert jitted._cache_size() == 1, f"{name} compiled again for other numbers"


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("cache_policy")])
def test_part_treats_rows_apart(name: str) -> None:
    kind, (part, _) = name.split("/")[0], ALL[name]
    function, given = call(kind, part, 3)
    whole = jax.jit(function)(part, *given)
    alone = jax.jit(function)
    for row in range(BATCH):
        one = alone(part, *jax.tree.map(lambda x: x[row:row + 1] if jnp.ndim(x) else x, given))  # noqa: B023
        expected = jax.tree.map(lambda x: x[row:row + 1] if x.ndim else x, whole)  # noqa: B023
        assert_equal(one, expected, f"{name}, row {row}", exact=False)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# --- transforms ---


@table(TRANSFORMS)
def test_transform_keeps_shape_and_float32(part: Any) -> None:
    logits = make_logits(4)
    out, state = step(part, logits, make_mask(4), part.init(BATCH, LENGTH))
    assert out.shape == logits.shape
    assert out.dtype == jnp.float32
    again, next_state = step(part, out, make_mask(5), state)
    assert again.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), next_state)


@table({name: entry for name, entry in TRANSFORMS.items() if name not in ("credit", "chain")})
def test_transform_only_drops_tokens(part: Any) -> None:
    for seed in range(5):
        logits = make_logits(seed)
        out, _ = step(part, logits, make_mask(seed), part.init(BATCH, LENGTH))
        kept = np.asarray(out) == np.asarray(logits)
        assert (kept | np.isneginf(out)).all(), f"seed {seed}"
        assert kept.any(-1).all(), f"seed {seed}: a position lost every token"


@table({name: entry for name, entry in TRANSFORMS.items() if name in ("top_k", "top_p", "min_p", "identity")})
def test_transform_keeps_the_best_token(part: Any) -> None:
    for seed in range(5):
        logits = make_logits(seed)
        out, _ = step(part, logits, make_mask(seed), part.init(BATCH, LENGTH))
        np.testing.assert_array_equal(out.argmax(-1), logits.argmax(-1), f"seed {seed}")


@table(TRANSFORMS)
def test_transform_survives_forbidden_tokens(part: Any) -> None:
    """What an earlier transform dropped stays dropped, and nothing turns NaN."""
    logits = make_logits(6).at[:, :, 7:].set(-jnp.inf)
    state = part.init(BATCH, LENGTH)
    for _ in range(3):
        out, state = step(part, logits, make_mask(6), state)
        assert np.isneginf(np.asarray(out)[:, :, 7:]).all()
        assert not np.isnan(out).any()


def test_credit_only_raises_and_remembers() -> None:
    part, logits, mask = transforms.Credit(), make_logits(7), make_mask(7)
    first, state = step(part, logits, mask, part.init(BATCH, LENGTH))
    second, _ = step(part, logits, mask, state)
    best = logits.argmax(-1)[..., None]
    gains = [np.take_along_axis(np.asarray(out - logits), best, -1)[..., 0] for out in (first, second)]
    assert (np.asarray(first - logits) >= 0).all()
    assert (gains[1] > gains[0] + 1e-3)[np.asarray(mask)].all()
    np.testing.assert_array_equal(np.asarray(first - logits)[~np.asarray(mask)], 0.0)


def test_credit_equals_dense_credit_over_a_block() -> None:
    """The slots lose nothing: LENGTH steps with changing argmaxes against a [B, L, V] array of masses."""
    part = transforms.Credit(0.9, 0.7, 0.4)
    state, mass = part.init(BATCH, LENGTH), np.zeros((BATCH, LENGTH, VOCAB))
    for seed in range(LENGTH):
        logits, mask = make_logits(100 + seed), make_mask(seed)
        out, state = step(part, logits, mask, state)
        dense = np.asarray(logits, np.float64)
        probability = np.exp(dense) / np.exp(dense).sum(-1, keepdims=True)
        mass *= 0.7
        for b, position in zip(*np.nonzero(np.asarray(mask)), strict=True):
            best = dense[b, position].argmax()
            mass[b, position, best] += probability[b, position, best] ** 0.4
        np.testing.assert_allclose(out, dense + 0.9 * np.log1p(mass), rtol=1e-5, atol=1e-5, err_msg=f"step {seed}")


# --- proposals ---


@table(PROPOSALS)
def test_proposal_reports_probabilities_of_what_it_proposes(part: Any) -> None:
    logits = make_logits(8).at[0, 0, 3].set(-jnp.inf)
    tokens = jnp.full((BATCH, LENGTH), 3, jnp.int32)
    out = step(part, keys(8), logits, tokens)
    assert (out.token.dtype, out.confidence.dtype, out.log_prob.dtype, out.current.dtype) == (
        jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    assert all(leaf.shape == (BATCH, LENGTH) for leaf in jax.tree.leaves(out))
    probability = np.asarray(jax.nn.softmax(logits, -1))
    proposed = np.take_along_axis(probability, np.asarray(out.token)[..., None], -1)[..., 0]
    refused = np.isneginf(out.confidence)
    np.testing.assert_allclose(np.asarray(out.confidence)[~refused], proposed[~refused], rtol=1e-5)
    np.testing.assert_allclose(out.current, probability[..., 3], rtol=1e-5, atol=1e-7)
    assert float(out.current[0, 0]) == 0.0


def test_refused_positions_are_those_that_propose_the_token() -> None:
    logits = make_logits(9)
    inner = proposals.Greedy().step(keys(0), logits, logits.argmax(-1).astype(jnp.int32))
    token = int(np.bincount(np.asarray(inner.token).ravel()).argmax())
    out = proposals.RefuseToken(proposals.Greedy(), token).step(keys(0), logits, inner.token)
    np.testing.assert_array_equal(out.token, inner.token)
    np.testing.assert_array_equal(np.isneginf(out.confidence), np.asarray(inner.token) == token)


# --- strategies ---


@table(STRATEGIES)
def test_strategy_commits_at_least_one_masked_position_per_row(part: Any) -> None:
    for seed in range(20):
        mask = make_mask(seed)
        decision, _ = step(
            part, keys(seed), make_candidates(seed), mask, make_info(seed), part.init(BATCH, LENGTH))
        assert decision.commit.dtype == decision.reopen.dtype == jnp.bool_
        commit, reopen, masked = (np.asarray(x) for x in (decision.commit, decision.reopen, mask))
        assert commit.any(-1).all(), f"seed {seed}: a row with masked positions got nothing"
        if part.reopens:
            assert not (reopen & masked).any(), f"seed {seed}"
            assert (reopen.sum(-1) < (commit & masked).sum(-1)).all(), f"seed {seed}: no net gain"
        else:
            assert not (commit & ~masked).any(), f"seed {seed}: rewrote a position"
            assert not reopen.any(), f"seed {seed}: reopened a position"


@table(STRATEGIES)
def test_strategy_commits_nothing_in_a_finished_row(part: Any) -> None:
    mask = make_mask(1).at[1].set(False)
    decision, _ = step(part, keys(1), make_candidates(1), mask, make_info(1), part.init(BATCH, LENGTH))
    assert not decision.commit[1].any()
    assert not decision.reopen[1].any()


@table(STRATEGIES)
def test_strategy_never_commits_where_there_is_no_proposal(part: Any) -> None:
    for seed in range(20):
        candidates = make_candidates(seed)
        none = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.5
        none[0] = True  # The whole row: nothing can be committed at all.
        confidence = jnp.where(none, -jnp.inf, candidates.confidence)
        decision, _ = step(part, keys(seed), candidates.replace(confidence=confidence), make_mask(seed),
                                make_info(seed), part.init(BATCH, LENGTH))
        assert not (np.asarray(decision.commit) & none).any(), f"seed {seed}"
        assert not decision.reopen[0].any(), f"seed {seed}: reopened without committing"
        left = np.asarray(make_mask(seed)) & ~none
        np.testing.assert_array_equal(np.asarray(decision.commit).any(-1), left.any(-1), f"seed {seed}")


@table(STRATEGIES)
def test_strategy_finishes_a_block_within_its_bound(part: Any) -> None:
    step = jax.jit(part.step)
    for seed in range(5):
        masked = np.ones((BATCH, LENGTH), bool)
        state = part.init(BATCH, LENGTH)
        for count in range(part.max_steps(LENGTH)):
            info = make_info(seed, row_step=jnp.full(BATCH, count, jnp.int32), step_in_block=jnp.int32(count))
            decision, state = step(keys(seed * 99 + count), make_candidates(seed * 99 + count), jnp.asarray(masked),
                                   info, state)
            masked = (masked | np.asarray(decision.reopen)) & ~np.asarray(decision.commit)
        assert not masked.any(), f"seed {seed}"


@table({name: entry for name, entry in STRATEGIES.items() if "random" not in name})
def test_strategy_breaks_ties_by_position(part: Any) -> None:
    """With equal confidences a strategy may take several, but never a later position before an earlier one."""
    candidates = make_candidates(0).replace(
        confidence=jnp.full((BATCH, LENGTH), 0.3), current=jnp.full((BATCH, LENGTH), 0.9))
    mask = jnp.ones((BATCH, LENGTH), bool)
    decision, _ = step(part, keys(0), candidates, mask, make_info(0), part.init(BATCH, LENGTH))
    commit = np.asarray(decision.commit)
    assert commit[:, 0].all()
    assert (commit[:, 1:] <= commit[:, :-1]).all()


@table({name: entry for name, entry in STRATEGIES.items() if entry[0].reopens})
def test_strategy_reopens_no_pinned_position(part: Any) -> None:
    """A pinned position must not use up what may be reopened."""
    reopened = 0
    for seed in range(20):
        pinned = np.asarray(jax.random.bernoulli(jax.random.key(seed), 0.4, (BATCH, LENGTH)))
        mask = make_mask(seed) & ~pinned
        candidates = make_candidates(seed)
        # Pinned tokens are the least likely ones: the first choice of a strategy that does not look.
        candidates = candidates.replace(current=jnp.where(pinned, 0.0, candidates.current))
        decision, _ = step(part, keys(seed), candidates, mask, make_info(seed, is_open=jnp.asarray(~pinned)),
                                part.init(BATCH, LENGTH))
        assert not (np.asarray(decision.reopen) & pinned).any(), f"seed {seed}"
        reopened += int(decision.reopen.sum())
    assert reopened > 5


def test_remasking_reopens_the_least_likely_first() -> None:
    part = strategies.Remasking(strategies.Threshold(0.5), 0.6)
    mask = jnp.array([[True, True, True, False, False, False, False, False]])
    confidence = jnp.array([[0.9, 0.8, 0.7, 0, 0, 0, 0, 0]])
    current = jnp.array([[0, 0, 0, 0.5, 0.1, 0.3, 0.7, 0.59]])
    candidates = Candidates(token=jnp.zeros((1, 8), jnp.int32), confidence=confidence, log_prob=confidence,
                            current=current)
    info = StepInfo(row_step=jnp.array([3]), step_in_block=jnp.int32(3), block=jnp.int32(0), block_start=jnp.int32(0),
                    is_open=jnp.ones((1, 8), bool))
    decision, _ = step(part, keys(0)[:1], candidates, mask, info, part.init(1, 8))
    assert np.nonzero(decision.commit[0])[0].tolist() == [0, 1, 2]
    assert np.nonzero(decision.reopen[0])[0].tolist() == [4, 5]


@pytest.mark.parametrize(("steps", "num_open", "expected"), [
    (3, 8, [3, 3, 2]), (4, 8, [2, 2, 2, 2]), (8, 8, [1] * 8), (100, 8, [1] * 8), (1, 8, [8]), (2, 5, [3, 2]),
    (5, 7, [2, 2, 1, 1, 1]),
])
def test_quota_spreads_the_open_positions_over_the_steps(steps: int, num_open: int, expected: list[int]) -> None:
    part, counts = strategies.Quota(steps), []
    is_open = np.arange(LENGTH) < num_open
    masked = np.broadcast_to(is_open, (BATCH, LENGTH))
    while masked.any():
        info = make_info(0, step_in_block=jnp.int32(len(counts)),
                         is_open=jnp.broadcast_to(jnp.asarray(is_open), (BATCH, LENGTH)))
        decision, _ = step(part, keys(0), make_candidates(len(counts)), jnp.asarray(masked), info, ())
        counts.append(int(decision.commit[0].sum()))
        masked = masked & ~np.asarray(decision.commit)
    assert counts == expected


def test_bounds_are_as_documented() -> None:
    """Threshold takes what equals it, hierarchical only what exceeds; both always take the best."""
    confidence = jnp.array([[0.5, 0.25, 0.125, 0.75, 0.5, 0.25, 0.0, 0.5]] * BATCH)
    candidates = make_candidates(0).replace(confidence=confidence)
    mask = jnp.ones((BATCH, LENGTH), bool).at[:, 2].set(False)

    def committed(part: Any) -> list[int]:
        decision: Decision = step(part, keys(0), candidates, mask, make_info(0), ())[0]
        return np.nonzero(np.asarray(decision.commit)[0])[0].tolist()

    assert committed(strategies.Threshold(0.5)) == [0, 3, 4, 7]
    assert committed(strategies.Threshold(1.0)) == [3]
    assert committed(strategies.Hierarchical(0.5, 0.25)) == [0, 3]
    assert committed(strategies.Hierarchical(0.5, 0.5)) == [3]
    assert committed(strategies.Hierarchical(0.99, 0.99)) == [3]
    # Factor: n = 1: 2 * 0.25 < f; n = 2: 3 * 0.5 < f; n = 3: 4 * 0.5; n = 4: 5 * 0.5; n = 5: 6 * 0.75.
    assert committed(strategies.Factor(1.5)) == [3]
    assert committed(strategies.Factor(1.6)) == [0, 3]
    assert committed(strategies.Factor(2.6)) == [0, 3, 4, 7]
    assert committed(strategies.Factor(0.01)) == [3]
    assert committed(strategies.LocalLeap(0.75, 0.5, 1)) == [3, 4]
    assert committed(strategies.LocalLeap(0.75, 0.5, 3)) == [0, 3, 4]
    assert committed(strategies.LocalLeap(0.8, 0.25, 8)) == [3]  # no anchor, so no neighbours either


# --- cache policies ---


@table(POLICIES)
def test_policy_plans_a_window_that_holds_the_block_and_fits(part: Any) -> None:
    first = 8
    width = part.window_length(CANVAS, first, LENGTH)
    assert width is None or LENGTH <= width <= CANVAS
    for block in range(4):
        for step in range(6):
            start = first + block * LENGTH
            info = make_info(0, step_in_block=jnp.int32(step), block=jnp.int32(block), block_start=jnp.int32(start))
            plan = part.window(info, CANVAS, LENGTH)
            assert (plan.refresh.shape, plan.refresh.dtype) == ((), jnp.bool_)
            assert 0 <= int(plan.start) <= start
            assert start + LENGTH <= int(plan.end) <= CANVAS
            assert bool(plan.refresh) or width is not None
            if width is not None and not plan.refresh:
                assert int(plan.end) - int(plan.start) <= width
            if step == 0 and block > 0 and isinstance(part, cache_policies.BlockCausal):
                assert int(plan.start) == start - LENGTH, "the block before has to be written with its final tokens"
            elif step == 0:
                assert bool(plan.refresh), "a block must not start on another block's cache"


@table(POLICIES)
def test_policy_ignores_the_rows(part: Any) -> None:
    plans = [part.window(make_info(seed, is_open=make_mask(seed)), CANVAS, LENGTH) for seed in range(3)]
    for plan in plans[1:]:
        assert_equal(plans[0], plan, "the plan depends on a row")


def refreshed(part: Any, *, block: int) -> list[int]:
    return [step for step in range(7) if part.window(
        make_info(0, block=jnp.int32(block), step_in_block=jnp.int32(step)), CANVAS, LENGTH).refresh]


def test_policies_refresh_when_documented() -> None:
    dual, vicinity = cache_policies.Dual(), cache_policies.Vicinity(1, 1)
    assert refreshed(cache_policies.NoCache(), block=1) == [0, 1, 2, 3, 4, 5, 6]
    for block, policy in enumerate((cache_policies.Prefix(), dual, vicinity)):
        assert refreshed(policy, block=block) == [0]
    assert refreshed(cache_policies.BlockCausal(), block=0) == [0]
    assert refreshed(cache_policies.BlockCausal(), block=1) == []
    assert refreshed(cache_policies.Periodic(cache_policies.BlockCausal(), 3), block=1) == [0, 3, 6]
    assert refreshed(cache_policies.Periodic(dual, 3), block=1) == [0, 3, 6]
    assert refreshed(cache_policies.Periodic(dual, 1), block=1) == [0, 1, 2, 3, 4, 5, 6]
    assert refreshed(cache_policies.WithWarmup(vicinity, 2), block=0) == [0, 1, 2]
    assert refreshed(cache_policies.WithWarmup(vicinity, 0), block=0) == [0]
    assert refreshed(cache_policies.WithWarmup(vicinity, 2), block=1) == [0]


@pytest.mark.parametrize("widths", [(-1, 2), (2, -1)])
def test_vicinity_refuses_negative_widths(widths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="-1"):
        cache_policies.Vicinity(*widths)


# --- smoothing ---


@table(SMOOTHINGS)
def test_smoothing_leaves_closed_positions_alone(part: Any) -> None:
    embedded, expected, mask = make_logits(10), make_logits(11), make_mask(10)
    out = step(part, embedded, expected, mask, make_info(10))
    assert out.dtype == embedded.dtype
    np.testing.assert_array_equal(np.asarray(out)[~np.asarray(mask)], np.asarray(embedded)[~np.asarray(mask)])
    moved = (np.asarray(out) != np.asarray(embedded)).any(-1)
    assert moved[np.asarray(mask)].all() == part.soft


def test_soft_tokens_add_the_weighted_expectation() -> None:
    embedded, expected = jnp.zeros((2, 1, 4)), jnp.ones((2, 1, 4))
    info = dataclasses.replace(make_info(0), row_step=jnp.array([0, 5], jnp.int32))
    out = smoothing.SoftTokens().step(embedded, expected, jnp.ones((2, 1), bool), info)
    np.testing.assert_allclose(out[:, 0, 0], [0.15, 0.25], rtol=1e-6)
    info = dataclasses.replace(info, row_step=jnp.array([7, 8], jnp.int32))
    out = smoothing.SoftTokens().step(embedded, expected, jnp.ones((2, 1), bool), info)
    np.testing.assert_allclose(out[:, 0, 0], [0.29, 0.3], rtol=1e-6)


# --- stop rules ---


def test_on_eos_counts_generated_tokens_only() -> None:
    part = stopping.OnEos(jnp.array([2, 4]))
    tokens = jnp.array([[2, 1, 1], [1, 2, 1], [1, 4, 1], [1, 2, 1], [1, 1, 1]])
    is_open = jnp.array([[False, True, True]] * 5)
    is_masked = jnp.array([[False] * 3, [False] * 3, [False] * 3, [False, True, True], [False] * 3])
    info = make_info(0)
    assert step(part, tokens, is_open, is_masked, info).tolist() == [False, True, True, False, False]
    assert int(part.fill()) == 2
    assert not stopping.Never().step(tokens, is_open, is_masked, info).any()
    assert stopping.Never().fill() is None
