"""What holds for every decode, on the toy: rows apart, exact caches, pinned tokens, stopping, one compilation."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import cache_policies, proposals, smoothing, stopping, strategies, transforms
from djax.contracts.canvas import Canvas
from djax.loop.denoise import Parts, Result, StopReason, advance, begin, denoise, finish
from djax.parts.schedules import Linear
from tests.support import oracle, toy
from tests.support.select import SelectStrategy

PARAMS = toy.make_params()
MODEL = toy.NumpyToy(PARAMS)
FORBID = transforms.ForbidTokens(jnp.array([toy.MASK]))

POLICIES: dict[str, tuple[Any, oracle.Policy]] = {
    "none": (cache_policies.NoCache(), oracle.no_cache),
    "prefix": (cache_policies.Prefix(), oracle.prefix),
    "dual": (cache_policies.Dual(), oracle.dual),
    "vicinity": (cache_policies.Vicinity(3, 2), oracle.vicinity(3, 2)),
    "warmup": (cache_policies.WithWarmup(cache_policies.Vicinity(2, 4), 2),
               oracle.with_warmup(oracle.vicinity(2, 4), 2)),
}
# Two settings that between them use every axis, with the oracle's words for them.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (
        {"strategy": strategies.Threshold(0.6), "cache_policy": cache_policies.Dual(), "transform": FORBID},
        {"strategy": oracle.threshold(0.6), "policy": oracle.dual, "transform": oracle.forbid([toy.MASK])}),
    "everything": (
        {"strategy": strategies.Remasking(strategies.Hierarchical(0.7, 0.3), 0.4),
         "cache_policy": cache_policies.WithWarmup(cache_policies.Vicinity(3, 2), 1),
         "transform": transforms.Chain((FORBID, transforms.Credit(), transforms.TopP(0.95))),
         "propose": proposals.Sample(0.8), "smoothing": smoothing.SoftTokens()},
        {"strategy": oracle.remasking(oracle.hierarchical(0.7, 0.3), 0.4),
         "policy": oracle.with_warmup(oracle.vicinity(3, 2), 1),
         "transform": oracle.chain(oracle.forbid([toy.MASK]), oracle.credit(), oracle.top_p(0.95)),
         "propose": oracle.sample(0.8), "weight": oracle.SOFT}),
}


SLOW_GREEDY = [pytest.param("greedy", marks=pytest.mark.slow), "everything"]


FIRST_BLOCK, LENGTH = 18, 48


@jax.jit
def _run(params: Any, canvas: Canvas, key: jax.Array, parts: dict[str, Any], row_ids: Any) -> Result:
    return denoise(toy.ToyDenoiser(), params, canvas, key, row_ids=row_ids, **parts)


def run(params: Any, canvas: Canvas, key: jax.Array, parts: dict[str, Any], row_ids: Any = None) -> Result:
    """The canvas amid padding and idle rows, of one shape for one program, and the result without them."""
    batch, left = canvas.batch, FIRST_BLOCK - canvas.first_block
    widths = ((0, (4 if batch <= 4 else 16) - batch), (left, LENGTH - left - canvas.length))
    arrays = {name: np.pad(np.asarray(getattr(canvas, name)), widths, constant_values=fill) for name, fill in (
        ("tokens", toy.PAD), ("is_masked", False), ("valid", False), ("positions", 0))}
    ids = np.arange(widths[0][1] + batch, dtype=np.int32)
    if row_ids is not None:
        ids[:batch] = row_ids
    result = _run(params, canvas.replace(first_block=FIRST_BLOCK, **arrays), key, parts, ids)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf)[(slice(batch), slice(left, left + canvas.length))[:leaf.ndim]], result)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 20, length).tolist() for length in lengths]


def canvas_of(prompts: list[list[int]], new_tokens: int = 12, block_length: int = 6, **options: Any) -> Canvas:
    return Canvas.from_prompts(prompts, max_new_tokens=new_tokens, block_length=block_length, mask_id=toy.MASK,
                               pad_id=toy.PAD, **({"bucket": False} | options))


def row_of(result: Result, row: int) -> dict[str, Any]:
    """A row without its padding."""
    valid = np.asarray(result.valid[row])
    return {name: np.asarray(getattr(result, name)[row])[valid]
            for name in ("tokens", "is_masked", "commit_step", "log_prob")} | {
        name: int(getattr(result, name)[row]) for name in ("nfe", "steps", "refreshes", "stop_reason", "lengths")}


def assert_same_row(left: dict[str, Any], right: dict[str, Any], label: str, *, exact: bool = False) -> None:
    for name, value in left.items():
        if name == "log_prob" and not exact:
            np.testing.assert_allclose(value, right[name], atol=1e-4, err_msg=f"{label}: {name}")
        else:
            np.testing.assert_array_equal(value, right[name], f"{label}: {name}")


def oracle_rows(canvas: Canvas, key: jax.Array, words: dict[str, Any], **options: Any) -> list[oracle.Row]:
    """Each row of a canvas decoded by the oracle, without its padding and without the others."""
    rows = []
    for row in range(canvas.batch):
        valid = np.asarray(canvas.valid[row])
        rows.append(oracle.decode(
            MODEL, np.asarray(canvas.tokens[row])[valid], np.asarray(canvas.is_masked[row])[valid], key,
            first_block=canvas.first_block - int(valid.argmax()), block_length=canvas.block_length, row_id=row,
            **words, **options))
    return rows


def assert_as_oracle(result: Result, rows: list[oracle.Row], label: str) -> None:
    for i, row in enumerate(rows):
        got = row_of(result, i)
        for name in ("tokens", "is_masked", "commit_step"):
            assert got[name].tolist() == getattr(row, name), f"{label}, row {i}: {name}"
        np.testing.assert_allclose(got["log_prob"], row.log_prob, atol=1e-4, err_msg=f"{label}, row {i}")
        assert (got["nfe"], got["refreshes"], got["stop_reason"]) == (row.nfe, row.refreshes, row.stop_reason), (
            f"{label}, row {i}")


def reliable_seed(make: Any, words: dict[str, Any], *, first: int = 0) -> tuple[int, Canvas, list[oracle.Row]]:
    """The first seed from `first` on whose canvas is decoded without a decision inside float32 error."""
    for seed in range(first, first + 20):
        canvas = make(seed)
        rows = oracle_rows(canvas, jax.random.key(seed), words)
        if min(row.margin for row in rows) > oracle.RELIABLE:
            return seed, canvas, rows
    raise AssertionError(f"no seed from {first} to {first + 19} has reliable margins")


# --- the toy itself ---


def test_toy_is_its_numpy_twin_and_spread() -> None:
    """The oracle's model is the engine's model, and its confidences leave something to decide."""
    seed, canvas = 0, canvas_of(prompts_of([9, 4], 0))
    tokens = np.asarray(canvas.tokens[0])
    denoiser = toy.ToyDenoiser()
    hidden, _ = denoiser.apply(
        PARAMS, denoiser.embed(PARAMS, canvas.tokens), positions=denoiser.prepare_positions(PARAMS, canvas.positions),
        key_mask=canvas.valid, window_start=jnp.int32(0), write=canvas.valid, cache=None)
    logits = np.asarray(denoiser.unembed(PARAMS, hidden))
    np.testing.assert_allclose(logits[0], MODEL.forward(MODEL.embed(tokens), 0, None), atol=2e-5)
    padding = int(np.asarray(canvas.valid[1]).argmax())
    assert padding == 5
    alone = MODEL.forward(MODEL.embed(np.asarray(canvas.tokens[1])[padding:]), 0, None)
    np.testing.assert_allclose(logits[1, padding:], alone, atol=2e-5)
    confidences = []
    for seed in range(30):
        tokens = np.asarray(canvas_of(prompts_of([5], seed)).tokens[0])
        confidences += list(oracle.softmax(MODEL.forward(MODEL.embed(tokens), 0, None)).max(-1)[5:])
    low, middle, high = np.quantile(confidences, [0.1, 0.5, 0.9])
    assert low < 0.25 < 0.35 < middle < 0.65 < 0.75 < high


# --- caches ---


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_cache_refreshed_at_every_step_is_no_cache(name: str) -> None:
    parts = {"strategy": strategies.Threshold(0.7), "transform": FORBID, "propose": proposals.Sample(0.5)}
    for seed in range(5):
        canvas, key = canvas_of(prompts_of([3, 7], seed)), jax.random.key(seed)
        plain = run(PARAMS, canvas, key, parts)
        policy = cache_policies.Periodic(POLICIES[name][0], 1)
        cached = run(PARAMS, canvas, key, parts | {"cache_policy": policy})
        for row in range(2):
            assert_same_row(row_of(plain, row), row_of(cached, row), f"{name}, seed {seed}, row {row}")


@pytest.mark.slow
def test_caches_go_stale() -> None:
    """Without refreshes the cached policies do differ from no cache: the test above is not empty."""
    parts = {"strategy": strategies.Threshold(0.7), "transform": FORBID, "propose": proposals.Sample(0.5)}
    for name, (policy, _) in POLICIES.items():
        differs = False
        for seed in range(5):
            canvas, key = canvas_of(prompts_of([3, 7], seed)), jax.random.key(seed)
            plain, cached = (run(PARAMS, canvas, key, parts | {"cache_policy": chosen})
                             for chosen in (cache_policies.NoCache(), policy))
            differs |= bool((plain.tokens != cached.tokens).any() | (plain.log_prob != cached.log_prob).any())
        assert differs == (name != "none"), name


@pytest.mark.slow
def test_window_as_wide_as_the_canvas_is_exact() -> None:
    parts = {"strategy": strategies.Threshold(0.7), "transform": FORBID, "smoothing": smoothing.SoftTokens()}
    for seed in range(3):
        canvas, key = canvas_of(prompts_of([3, 7], seed)), jax.random.key(seed)
        plain = run(PARAMS, canvas, key, parts)
        wide = run(PARAMS, canvas, key, parts | {"cache_policy": cache_policies.Vicinity(99, 99)})
        for name in ("tokens", "commit_step", "nfe"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(wide, name), f"seed {seed}")
        assert (np.asarray(wide.refreshes) < np.asarray(plain.refreshes)).all()


# --- rows apart ---


FIRST_SEED = {"greedy": 0, "everything": 27}
"""Sixteen rows make many decisions: one seed in twenty or so leaves all of them clear, and the search takes long."""


@functools.cache
def sixteen(setting: str) -> tuple[int, Canvas, list[oracle.Row], Result]:
    parts, words = SETTINGS[setting]
    seed, canvas, rows = reliable_seed(
        lambda seed: canvas_of(prompts_of(list(range(1, 17)), seed)), words, first=FIRST_SEED[setting])
    return seed, canvas, rows, run(PARAMS, canvas, jax.random.key(seed), parts)


@pytest.mark.parametrize("setting", SETTINGS)
def test_ragged_batch_is_the_oracle_row_by_row(setting: str) -> None:
    seed, _, rows, result = sixteen(setting)
    assert_as_oracle(result, rows, f"{setting}, seed {seed}")


@pytest.mark.parametrize(("size", "setting"), [
    pytest.param(size, setting, marks=() if (size, setting) == (2, "greedy") else pytest.mark.slow)
    for size in (1, 2, 5) for setting in SETTINGS])
def test_row_of_a_ragged_batch_is_the_row_alone(setting: str, size: int) -> None:
    """Batches of 1 to 16: other rows, other padding, the same row."""
    seed, _, _, whole = sixteen(setting)
    prompts = prompts_of(list(range(1, 17)), seed)
    chosen = [[0], [0, 15], [3, 14, 7, 0, 9]][(1, 2, 5).index(size)]
    part = run(PARAMS, canvas_of([prompts[i] for i in chosen]), jax.random.key(seed), SETTINGS[setting][0],
               jnp.asarray(chosen))
    for here, there in enumerate(chosen):
        assert_same_row(row_of(part, here), row_of(whole, there), f"{setting}, seed {seed}, row {there}")


@pytest.mark.parametrize("setting", SLOW_GREEDY)
def test_bucketed_padding_changes_nothing(setting: str) -> None:
    parts, words = SETTINGS[setting]
    seed, canvas, rows = reliable_seed(
        lambda seed: canvas_of(prompts_of([5, 2], seed), new_tokens=13, bucket=True), words)
    assert canvas.first_block > 5
    assert not np.asarray(canvas.valid)[:, -1].any()
    assert_as_oracle(run(PARAMS, canvas, jax.random.key(seed), parts), rows, f"{setting}, seed {seed}")


@pytest.mark.parametrize("setting", SLOW_GREEDY)
def test_aligned_blocks(setting: str) -> None:
    """Block boundaries on multiples of the block length: block 0 begins inside the prompt."""
    parts, words = SETTINGS[setting]
    seed, canvas, rows = reliable_seed(
        lambda seed: canvas_of(prompts_of([9, 4, 12], seed), new_tokens=14, align=True), words)
    result = run(PARAMS, canvas, jax.random.key(seed), parts)
    assert_as_oracle(result, rows, f"{setting}, seed {seed}")
    assert np.asarray(canvas.positions)[:, canvas.first_block].tolist() == [6, 0, 12]


# --- pinned tokens ---


def infilling(seed: int) -> Canvas:
    """Three rows with holes; rows 1 and 2 have nothing open in a block in which others work."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 24, length).tolist() for length in (24, 26, 22)]
    holes = [(2, 3, 4, 6, 8, 9, 10, 13, 20, 23), (5, 6, 7, 8, 18, 19, 21, 25), (4, 6, 7, 9, 10, 12, 13, 14, 15)]
    masks = [[i in hole for i in range(len(row))] for row, hole in zip(rows, holes, strict=True)]
    return Canvas.from_tokens(rows, masks, block_length=6, mask_id=toy.MASK, pad_id=toy.PAD, bucket=False)


@pytest.mark.parametrize("setting", SLOW_GREEDY)
def test_infilling(setting: str) -> None:
    parts, words = SETTINGS[setting]
    seed, canvas, rows = reliable_seed(infilling, words)
    result = run(PARAMS, canvas, jax.random.key(seed), parts)
    assert_as_oracle(result, rows, f"{setting}, seed {seed}")
    pinned = ~np.asarray(canvas.is_masked)
    np.testing.assert_array_equal(np.asarray(result.tokens)[pinned], np.asarray(canvas.tokens)[pinned])
    assert (np.asarray(result.commit_step)[pinned] == -1).all()
    assert (np.asarray(result.log_prob)[pinned] == 0).all()
    assert not np.asarray(result.is_masked).any()


def test_literal_mask_id_in_a_prompt_survives() -> None:
    parts, words = SETTINGS["greedy"]
    prompts = [[3, toy.MASK, 5, toy.MASK], [toy.MASK] * 3]
    canvas = canvas_of(prompts)
    key = jax.random.key(0)
    result, rows = run(PARAMS, canvas, key, parts), oracle_rows(canvas, key, words)
    assert min(row.margin for row in rows) > oracle.RELIABLE
    assert_as_oracle(result, rows, "literal mask id")
    for row, prompt in enumerate(prompts):
        got = row_of(result, row)
        assert got["tokens"][:len(prompt)].tolist() == prompt
        assert toy.MASK not in got["tokens"][len(prompt):]


def test_committed_mask_token_is_a_token() -> None:
    """Nothing looks for the mask id on the canvas: where it is not forbidden it may be generated, and stays."""
    params = toy.script([[0, toy.MASK, toy.MASK, 5, toy.MASK]])
    result = scripted(params, canvas_of([[0]], 4, 4), {"strategy": strategies.Threshold(0.5)})
    assert result.tokens.tolist() == [[0, toy.MASK, toy.MASK, 5, toy.MASK]]
    assert not result.is_masked.any()
    assert int(result.lengths[0]) == 4


# --- tokens that must not come out ---


@pytest.mark.slow
def test_forbidden_tokens_never_come_out() -> None:
    """30 hot batches; the same runs without the filter do give such tokens."""
    banned = [3, 7, toy.MASK]
    seen: dict[str, set[int]] = {"forbidden": set(), "free": set()}
    for seed in range(30):
        canvas = canvas_of([[seed % 20], [3, 7, 23], [1, 2], [5, 21, 22, 23]])
        filters = {"forbidden": transforms.ForbidTokens(jnp.array(banned), jnp.int32(20)),
                   "free": transforms.ForbidTokens(jnp.array([-1, -1, -1]), jnp.int32(24))}
        for name, transform in filters.items():
            parts = {"strategy": strategies.Threshold(0.4), "cache_policy": cache_policies.Vicinity(2, 2),
                     "transform": transforms.Chain((transform, transforms.Credit())),
                     "propose": proposals.Sample(jnp.float32(2.0))}
            result = run(PARAMS, canvas, jax.random.key(seed), parts)
            assert not result.is_masked.any(), f"seed {seed}"
            seen[name] |= set(np.asarray(result.tokens)[np.asarray(canvas.is_masked)].tolist())
    assert seen["forbidden"] == set(range(20)) - {3, 7}
    assert seen["free"] == set(range(24))


@jax.jit
def scripted(params: Any, canvas: Canvas, parts: dict[str, Any]) -> Result:
    return denoise(toy.ScriptedDenoiser(), params, canvas, jax.random.key(0), **parts)


EVERY_STRATEGY = {
    "threshold": strategies.Threshold(0.9), "quota": strategies.Quota(2), "factor": strategies.Factor(1.0),
    "hierarchical": strategies.Hierarchical(0.9, 0.5),
    "remasking": strategies.Remasking(strategies.Threshold(0.9), 0.5),
    "random": strategies.RandomOrder(strategies.Quota(3))}


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_rows_that_only_propose_a_refused_token_end(name: str) -> None:
    """Row 0 gets stuck in block 1 of 3, row 1 does not and goes on."""
    parts = tuple(EVERY_STRATEGY.values())
    strategy = SelectStrategy(index=jnp.int32(list(EVERY_STRATEGY).index(name)), parts=parts)
    said = [[0, 1, 2, 3, 4, toy.MASK, 6, toy.MASK, 8, 9, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]]
    canvas = canvas_of([[0], [0]], 12, 4)
    result = scripted(toy.script(said), canvas, {
        "strategy": strategy, "propose": proposals.RefuseToken(proposals.Greedy(), toy.MASK)})
    assert result.stop_reason.tolist() == [StopReason.MAX_STEPS, StopReason.LENGTH]
    assert result.tokens.tolist() == [[0, 1, 2, 3, 4, toy.MASK, 6, toy.MASK, 8] + [toy.MASK] * 4, said[1]]
    masked = [False] * 5 + [True, False, True, False] + [True] * 4
    assert result.is_masked.tolist() == [masked, [False] * 13]
    last_block = np.asarray(result.commit_step)[1, 9:]
    assert int(result.steps[1]) == last_block.max() + 1
    # Stuck rows spent the whole bound of one block and not a step more.
    first_block = int(np.asarray(result.commit_step)[0, 1:5].max()) + 1
    assert int(result.steps[0]) == first_block + EVERY_STRATEGY[name].max_steps(4)


# --- NaN ---


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "dual"])
def test_nan_in_one_row_ends_that_row_only(policy: str) -> None:
    """The row that generates a poisoned token turns NaN in the step after; the others do not change by a bit."""
    parts = {"strategy": strategies.Threshold(0.6), "transform": FORBID, "cache_policy": POLICIES[policy][0]}
    found = 0
    for seed in range(8):
        canvas, key = canvas_of(prompts_of([3, 5, 2], seed)), jax.random.key(seed)
        clean = run(PARAMS, canvas, key, parts)
        tokens = [set(row_of(clean, row)["tokens"].tolist()) for row in range(3)]
        for row in range(3):
            own = tokens[row] - tokens[row - 1] - tokens[row - 2] - {toy.MASK, toy.PAD}
            steps = np.asarray(clean.commit_step)[row]
            # The poison's first appearance, early enough that another forward follows.
            first = {token: int(steps[np.asarray(clean.tokens)[row] == token].min()) for token in own}
            usable = [token for token, step in first.items() if 0 <= step < int(clean.steps[row]) - 1]
            if not usable:
                continue
            found += 1
            token = usable[0]
            result = run(toy.poison(PARAMS, token), canvas, key, parts)
            label = f"{policy}, seed {seed}, row {row}, token {token}"
            for other in {0, 1, 2} - {row}:
                assert_same_row(row_of(clean, other), row_of(result, other), label, exact=True)
            got, before = row_of(result, row), row_of(clean, row)
            assert got["stop_reason"] == StopReason.NAN, label
            assert got["steps"] == got["nfe"] == first[token] + 2, label
            kept = (before["commit_step"] >= 0) & (before["commit_step"] <= first[token])
            np.testing.assert_array_equal(got["commit_step"] >= 0, kept, label)
            np.testing.assert_array_equal(got["tokens"][kept], before["tokens"][kept], label)
            np.testing.assert_array_equal(got["is_masked"], (before["commit_step"] >= 0) & ~kept, label)
            assert not np.isnan(got["log_prob"]).any(), label
    assert found >= 5


@pytest.mark.slow
def test_nan_from_the_first_forward() -> None:
    poison = 7
    transform = transforms.ForbidTokens(jnp.array([toy.MASK, poison]))
    parts = {"strategy": strategies.Threshold(0.6), "transform": transform, "propose": proposals.Sample(0.9)}
    canvas = canvas_of([[1, 2, 3], [4, poison], [5, 6, 8, 9]])
    clean = run(PARAMS, canvas, jax.random.key(0), parts)
    result = run(toy.poison(PARAMS, poison), canvas, jax.random.key(0), parts)
    assert result.stop_reason.tolist() == [StopReason.LENGTH, StopReason.NAN, StopReason.LENGTH]
    for row in (0, 2):
        assert_same_row(row_of(clean, row), row_of(result, row), f"row {row}", exact=True)
    got = row_of(result, 1)
    assert got["tokens"].tolist() == [4, poison] + [toy.MASK] * 12
    assert (got["steps"], got["commit_step"].max()) == (1, -1)


# --- EOS ---


def test_eos() -> None:
    """Row 0: in block 1 of 3. Row 1: only in the prompt. Row 2: in the first block, not at its end. Row 3: last."""
    eos, other = toy.EOS, 20
    canvas = canvas_of([[1], [eos], [1], [1]], 12, 4)
    said = [[1, 1, 2, 3, 4, 5, other, 7, 8, 9, 1, 2, 3], [eos] + [1, 2, 3, 4] * 3,
            [1, 1, eos, 3, eos, 5, 6, 7, 8, 9, 1, 2, 3], [1, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, eos]]
    parts = {"strategy": strategies.Threshold(0.5), "stop_rule": stopping.OnEos(jnp.array([eos, other]))}
    result = scripted(toy.script(said), canvas, parts)
    assert result.stop_reason.tolist() == [StopReason.EOS, StopReason.LENGTH, StopReason.EOS, StopReason.EOS]
    assert result.tokens.tolist() == [said[0][:9] + [eos] * 4, said[1], said[2][:5] + [eos] * 8, said[3]]
    assert not result.is_masked.any()
    assert result.lengths.tolist() == [6, 12, 2, 12]
    assert result.nfe.tolist() == [2, 3, 1, 3]
    filled = [[False] * 9 + [True] * 4, [False] * 13, [False] * 5 + [True] * 8, [False] * 13]
    open_ = np.asarray(canvas.is_masked)
    np.testing.assert_array_equal((np.asarray(result.commit_step) == -1) & open_, filled)
    assert (np.asarray(result.log_prob)[np.asarray(filled)] == 0).all()
    # Without the rule the same rows run to the end.
    plain = scripted(toy.script(said), canvas, {"strategy": strategies.Threshold(0.5)})
    assert plain.tokens.tolist() == said
    assert plain.lengths.tolist() == [12] * 4
    assert plain.stop_reason.tolist() == [StopReason.LENGTH] * 4


def test_pinned_eos_stops_nothing() -> None:
    eos = toy.EOS
    rows, masks = [[1, 0, eos, 0, 0, 0]], [[False, True, False, True, True, True]]
    canvas = Canvas.from_tokens(rows, masks, block_length=2, mask_id=toy.MASK, pad_id=toy.PAD, bucket=False)
    said = [[9] * canvas.length]
    result = scripted(toy.script(said), canvas, {
        "strategy": strategies.Threshold(0.5), "stop_rule": stopping.OnEos(jnp.array([eos]))})
    assert np.asarray(result.tokens)[np.asarray(result.valid)].tolist() == [1, 9, eos, 9, 9, 9]
    assert result.stop_reason.tolist() == [StopReason.LENGTH]
    assert result.lengths.tolist() == [5]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_eos_against_the_oracle(setting: str) -> None:
    parts, words = SETTINGS[setting]
    words = words | {"eos_ids": [toy.EOS, 11]}
    parts = parts | {"stop_rule": stopping.OnEos(jnp.array([toy.EOS, 11]))}
    reasons = set()
    for first in (0, 20, 40):
        seed, canvas, rows = reliable_seed(
            lambda seed: canvas_of(prompts_of([4, 6, 3], seed + first), new_tokens=18), words)  # noqa: B023
        assert_as_oracle(run(PARAMS, canvas, jax.random.key(seed), parts), rows, f"{setting}, {first} + {seed}")
        reasons |= {row.stop_reason for row in rows}
    assert reasons == {oracle.LENGTH, oracle.END_OF_SEQUENCE}


# --- one program ---


@pytest.mark.slow
def test_sweeps_compile_nothing() -> None:
    @jax.jit
    def sweep(denoiser: Any, params: Any, canvas: Canvas, key: jax.Array, parts: dict[str, Any]) -> Result:
        return denoise(denoiser, params, canvas, key, **parts)

    seen = set()
    for seed in range(4):
        step = seed / 10
        parts = {
            "strategy": strategies.Remasking(
                strategies.Hierarchical(Linear(0.9 - step, -0.02 - step, minimum=0.3 + step), 0.2 + step), 0.1 + step),
            "cache_policy": cache_policies.WithWarmup(cache_policies.Periodic(cache_policies.Dual(), seed + 2), seed),
            "transform": transforms.Chain((
                transforms.ForbidTokens(jnp.array([seed, toy.MASK]), 20 + seed),
                transforms.Credit(0.1 + step, 0.2 + step, 0.3 + step), transforms.MinP(step, 1 + step))),
            "propose": proposals.Sample(step), "smoothing": smoothing.SoftTokens(Linear(step, 0.01 + step)),
            "stop_rule": stopping.OnEos(jnp.array([seed, 11]))}
        canvas = canvas_of(prompts_of([3, 5], seed)).replace(mask_id=jnp.int32(toy.MASK - seed))
        result = sweep(toy.ToyDenoiser(1.0 + step), toy.make_params(seed), canvas, jax.random.key(seed), parts)
        seen.add(str(result.tokens.tolist()))
    assert len(seen) == 4
    assert sweep._cache_size() == 1


@pytest.mark.slow
def test_works_inside_the_users_jit_and_scan() -> None:
    canvas = canvas_of(prompts_of([3, 5], 1))
    parts, _ = SETTINGS["everything"]

    @jax.jit
    def best_of(keys: jax.Array) -> jax.Array:
        def one(carry: None, key: jax.Array) -> tuple[None, Any]:
            result = denoise(toy.ToyDenoiser(), PARAMS, canvas, key, **parts)
            return carry, (result.tokens, result.log_prob.sum(-1))

        _, (tokens, score) = jax.lax.scan(one, None, keys)
        return tokens[score.argmax(0), jnp.arange(2)], score

    keys = jax.random.split(jax.random.key(3), 4)
    tokens, score = best_of(keys)
    apart = [run(PARAMS, canvas, key, parts) for key in keys]
    np.testing.assert_allclose(score, [result.log_prob.sum(-1) for result in apart], atol=1e-3)
    for row in range(2):
        winner = int(np.argmax([result.log_prob[row].sum() for result in apart]))
        np.testing.assert_array_equal(tokens[row], apart[winner].tokens[row])


@pytest.mark.slow
def test_eager_is_jitted_and_repeatable() -> None:
    canvas, key = canvas_of(prompts_of([3, 5], 2)), jax.random.key(2)
    parts, _ = SETTINGS["everything"]
    jitted = run(PARAMS, canvas, key, parts)
    for result in (denoise(toy.ToyDenoiser(), PARAMS, canvas, key, **parts), run(PARAMS, canvas, key, parts)):
        for row in range(2):
            assert_same_row(row_of(jitted, row), row_of(result, row), f"row {row}")


@pytest.mark.slow
def test_pieces_are_the_whole() -> None:
    """begin, advance by any number of steps, finish: the same result, and the number of steps is a leaf."""
    canvas, key = canvas_of(prompts_of([3, 5], 4)), jax.random.key(4)
    chosen, _ = SETTINGS["everything"]
    whole, parts = run(PARAMS, canvas, key, chosen), Parts(**chosen)

    @jax.jit
    def piece(canvas: Canvas, state: Any, parts: Parts, steps: jax.Array) -> Any:
        return advance(toy.ToyDenoiser(), PARAMS, canvas, state, parts=parts, steps=steps)

    for sizes in ([1] * 30, [2, 5, 1, 30], [100]):
        state = begin(toy.ToyDenoiser(), PARAMS, canvas, key, parts=parts)
        for size in sizes:
            state = piece(canvas, state, parts, jnp.int32(size))
        result = finish(canvas, state, parts=parts)
        for row in range(2):
            assert_same_row(row_of(whole, row), row_of(result, row), f"pieces {sizes}, row {row}")
    assert piece._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 7, 10])
def test_head_in_chunks_is_the_head(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothing reads long windows' logits in chunks; the last chunk overlaps the one before."""
    parts, words = SETTINGS["everything"]
    seed, canvas, rows = reliable_seed(lambda seed: canvas_of(prompts_of([3, 5], seed)), words)
    # The package's attribute of that name is the function.
    monkeypatch.setattr(importlib.import_module("djax.loop.step"), "HEAD_CHUNK", chunk)
    fresh = jax.jit(lambda *given: denoise(toy.ToyDenoiser(), PARAMS, *given, **parts))
    assert_as_oracle(fresh(canvas, jax.random.key(seed)), rows, f"chunk {chunk}, seed {seed}")
