"""Rollouts: what the record holds, replay, and that the batch around a row does not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import cache_policies, proposals, recipes, rl, smoothing, stopping, strategies, transforms
from djax.contracts.canvas import Canvas
from djax.contracts.part_shapes import AXES
from djax.loop.denoise import denoise
from djax.loop.state import Parts, StopReason
from tests.support import toy
from tests.support.golden_llada2 import GOLDENS
from tests.support.tiny import CONFIG, EOS, MASK

PROMPTS = [[9, 17, 10, 6, 13], [12, 10, 57, 32, 1, 49, 55, 29, 35], [7]]
SHAPE: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8}
RECIPE = recipes.fast_dllm(threshold=0.6, cache="none")
WARM = 0.7


@pytest.fixture(scope="module")
def warm(tiny_lm):
    return rl.rollout(tiny_lm, PROMPTS, key=3, num_samples=2, temperature=WARM, recipe=RECIPE, **SHAPE)


def same(left: rl.Rollout, right: rl.Rollout) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for field in dataclasses.fields(rl.Rollout):
        if field.name in ("log_prob", "forbidden"):
            continue
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)
    np.testing.assert_allclose(left.log_prob, right.log_prob, atol=2e-5)


# --- replay ---

STRATEGIES = {
    "threshold": strategies.Threshold(0.5), "quota": strategies.Quota(3), "factor": strategies.Factor(1.0),
    "hierarchical": strategies.Hierarchical(0.7, 0.2), "random": strategies.RandomOrder(strategies.Quota(4)),
}
PARAMS = toy.make_params()
score = jax.jit(rl.score, static_argnames=("reduce", "vocab_chunk", "remat"))


@jax.jit
def decode(params: Any, canvas: Canvas, key: jax.Array, parts: Parts) -> rl.Rollout:
    axes = {axis: getattr(parts, axis) for axis in AXES}
    return rl.record(canvas, denoise(toy.ToyDenoiser(), params, canvas, key, **axes), parts=parts)


def toy_parts(strategy: Any, temperature: float) -> Parts:
    forbid = transforms.ForbidTokens(jnp.asarray([toy.MASK]), jnp.int32(toy.VOCAB - 3))
    return Parts(strategy=strategy, transform=transforms.Chain((forbid, transforms.Identity())),
                 propose=proposals.Sample(jnp.float32(temperature)),
                 stop_rule=stopping.OnEos(jnp.asarray([7], jnp.int32)))


def toy_canvas() -> Canvas:
    return Canvas.from_prompts([[3, 1, 4], [1, 5, 9, 2, 6], [5]] * 4, max_new_tokens=17, block_length=6,
                               mask_id=toy.MASK, pad_id=toy.PAD, bucket=False)


@pytest.mark.parametrize("name", [
    name if name == "random" else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES])
def test_replay_equals_the_sampler(name: str) -> None:
    """Ragged prompts, rows that stop early and rows that do not, hot, warm and greedy."""
    for temperature in (0.0, 0.6, 1.5):
        got = decode(PARAMS, toy_canvas(), jax.random.key(5), toy_parts(STRATEGIES[name], temperature))
        assert got.replayable
        states = rl.trace_states(got, num_states=18)
        replayed = score(toy.ToyDenoiser(), PARAMS, got, states)
        np.testing.assert_allclose(replayed, got.log_prob, atol=1e-5)
        committed = np.asarray(got.commit_step) >= 0
        for tokens, is_open, length in zip(*map(np.asarray, (got.tokens, got.is_open, got.lengths)), strict=True):
            assert length == [*tokens[is_open], 7].index(7) + (7 in tokens[is_open])
        assert (np.asarray(got.log_prob)[committed] < 0).all()
        assert not np.asarray(replayed)[~committed].any()
        np.testing.assert_array_equal(np.asarray(states.weights).sum(1), committed)
    assert {int(StopReason.EOS), int(StopReason.LENGTH)} == set(np.asarray(got.stop_reason).tolist())
    # the test can fail: at another temperature, or with one token hidden too long, log-probs are others
    assert np.abs(score(toy.ToyDenoiser(), PARAMS, got, states, temperature=1.0) - got.log_prob).max() > 0.1
    late = states.replace(masks=states.masks.at[:, 1:].set(states.masks[:, :-1]))
    assert np.abs(score(toy.ToyDenoiser(), PARAMS, got, late) - got.log_prob).max() > 0.1


def test_rows_that_broke_off_are_defined() -> None:
    """Rows turn NaN once they hold a certain token: what they had committed is kept, and the rest never counts."""
    good = decode(PARAMS, toy_canvas(), jax.random.key(5), toy_parts(STRATEGIES["quota"], 1.5))
    token = int(np.bincount(np.asarray(good.tokens)[np.asarray(good.is_open)], minlength=toy.VOCAB).argmax())
    got = decode(toy.poison(PARAMS, token), toy_canvas(), jax.random.key(5), toy_parts(STRATEGIES["quota"], 1.5))
    broken = np.asarray(got.stop_reason) == StopReason.NAN
    assert broken.sum() > 0
    states, chain = rl.trace_states(got, num_states=18), rl.masked_states(got, jax.random.key(0), scheme="one_step")
    for row in np.flatnonzero(broken):
        is_open, masked = np.asarray(got.is_open)[row], np.asarray(got.is_masked)[row]
        before = is_open & (np.arange(got.length) < masked.argmax())
        ends = np.flatnonzero(np.asarray(got.tokens)[row][before] == 7)
        assert got.lengths[row] == (ends[0] + 1 if len(ends) else before.sum())
        assert np.asarray(states.masks)[row][:, masked].all()
        assert not np.asarray(states.weights)[row][:, masked].any()
        assert np.asarray(chain.masks)[row, 0][is_open].all()
        assert np.asarray(chain.weights)[row].sum() == got.lengths[row] == len(got.completions()[row])


def test_replay_equals_the_sampler_through_the_model(tiny_lm, warm) -> None:
    assert warm.replayable
    assert warm.not_replayable_because is None
    replayed = score(tiny_lm.denoiser, tiny_lm.params, warm, rl.trace_states(warm, num_states=24))
    np.testing.assert_allclose(replayed, warm.log_prob, rtol=1e-5, atol=1e-5)
    assert (np.asarray(rl.trace_states(warm).weights).sum(2) > 1).any(), "no step commits several tokens"


def test_a_shrunk_trace_takes_fewer_states(warm) -> None:
    whole, shrunk = rl.trace_states(warm), rl.trace_states(warm, shrink=3)
    used = lambda states: (np.asarray(states.weights) > 0).any((0, 2)).sum()  # noqa: E731
    assert used(whole) == warm.steps.max()
    assert used(shrunk) == -(-warm.steps.max() // 3)
    np.testing.assert_array_equal(np.asarray(shrunk.weights).sum(1), np.asarray(whole.weights).sum(1))
    np.testing.assert_array_equal(shrunk.masks[:, 1], whole.masks[:, 3])  # the first of its three steps


NOT_EXACT = {
    "cache": (recipes.fast_dllm(threshold=0.6, cache="dual"), {}, "cache policy Dual approximates"),
    "smoothing": (recipes.dinfer(cache=False), {}, "smoothing SoftTokens is soft"),
    "credit": (recipes.dinfer_credit(smoothing=None), {}, "transform Credit changes"),
    "reopens": (recipes.Recipe(strategies.Remasking(strategies.Threshold(0.6), 0.3)), {}, "Remasking reopens"),
    "top_k": (RECIPE, {"top_k": 3}, "filter TopK changes"),
    "top_p": (RECIPE, {"top_p": 0.8}, "filter TopP changes"),
    "min_p": (RECIPE, {"min_p": 0.1}, "filter MinP changes"),
    "guidance": (RECIPE, {"guidance": 0.5}, "guidance mixes"),
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_what_cannot_be_replayed_says_why(name: str) -> None:
    """Asked of the record alone: nothing is decoded."""
    from djax.engine.options import Sampling, resolve
    from djax.rollouts.rollout import record

    recipe, options, reason = NOT_EXACT[name]
    sampling = Sampling(recipe=recipe, block_length=8, temperature=1.0, mask_id=MASK, eos_id=EOS, **options)
    parts = resolve(sampling, CONFIG, vocab_limit=50).parts
    canvas = Canvas.from_prompts([[1]], max_new_tokens=8, block_length=8, mask_id=MASK, pad_id=0)
    blank = jnp.zeros(canvas.tokens.shape, jnp.int32)
    row = jnp.zeros(1, jnp.int32)
    result = djax.Result(tokens=blank, is_masked=blank > 0, valid=canvas.valid, commit_step=blank, log_prob=blank,
                         lengths=row, nfe=row, steps=row, refreshes=row, stop_reason=row)
    got = record(canvas, result, parts=parts, guided="guidance" in options)
    assert not got.replayable
    assert reason in got.not_replayable_because
    assert got.not_replayable_because.count(";") == 0
    assert int(got.forbidden.limit) == 50
    with pytest.raises(ValueError, match="rollout: not replayable: .*" + reason.split()[-1]):
        rl.trace_states(got)
    assert rl.trace_states(got, exact=False).num_states >= 1


def test_filters_are_honoured(tiny_lm) -> None:
    """top_k = 1 leaves one token at any temperature; top_p = 1 and min_p = 0 are no filters."""
    ask = {"num_samples": 2, "recipe": RECIPE, **SHAPE}
    one = rl.rollout(tiny_lm, PROMPTS, key=3, top_k=1, temperature=5.0, **ask)
    np.testing.assert_allclose(one.log_prob, 0.0, atol=1e-5)
    assert not one.replayable
    greedy = rl.rollout(tiny_lm, PROMPTS, key=4, temperature=0.0, **ask)
    everything = rl.rollout(tiny_lm, PROMPTS, key=4, temperature=0.0, top_p=1.0, min_p=0.0, **ask)
    same(everything, greedy)
    np.testing.assert_allclose(  # log-probs of a greedy rollout are those at temperature 1
        score(tiny_lm.denoiser, tiny_lm.params, greedy, rl.trace_states(greedy, num_states=24)), greedy.log_prob,
        atol=1e-5)


# --- the record ---


def test_a_rollout_is_the_generation_with_all_that_replay_needs(tiny_lm, warm) -> None:
    got = tiny_lm.generate([p for p in PROMPTS for _ in range(2)], key=3, temperature=WARM, recipe=RECIPE, **SHAPE)
    np.testing.assert_array_equal(warm.tokens, got.canvas)
    for name in ("commit_step", "log_prob", "lengths", "nfe", "is_open", "is_masked"):
        np.testing.assert_array_equal(getattr(warm, name), getattr(got, name))
    assert [StopReason(reason).name.lower() for reason in warm.stop_reason] == got.stop_reason
    assert [row.tolist() for row in warm.completions()] == [row.tolist() for row in got.tokens]
    np.testing.assert_array_equal(warm.steps, warm.commit_step.max(1) + 1)
    assert warm.first_block == warm.is_open.argmax(1).max()
    assert warm.temperature == np.float32(WARM)
    assert warm.forbidden.ids.tolist() == [MASK]
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(warm)), "not on the host"
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        here = warm.valid[row]
        assert warm.tokens[row][here][: len(prompt)].tolist() == prompt
        np.testing.assert_array_equal(warm.positions[row][here], np.arange(here.sum()))


def test_lengths_end_at_eos_and_completions_with_it(tiny_lm) -> None:
    ask = {"key": 3, "num_samples": 2, "recipe": RECIPE, **SHAPE}
    free = rl.rollout(tiny_lm, PROMPTS, **ask)
    eos = int(free.completions()[0][3])
    got = rl.rollout(tiny_lm, PROMPTS, eos_id=eos, **ask)
    assert got.lengths[0] == int((free.completions()[0] == eos).argmax()) + 1
    np.testing.assert_array_equal(np.asarray(got.is_completion).sum(1), got.lengths)
    assert got.completions()[0][-1] == eos
    assert got.stop_reason[0] == StopReason.EOS
    filled = got.is_open & (got.commit_step < 0)
    assert filled[0].any()
    assert (got.tokens[filled] == eos).all()
    # a filled position was hidden in every state that the sampler saw
    states = rl.trace_states(got, num_states=24)
    assert np.asarray(states.masks)[0][:, filled[0]].all()
    np.testing.assert_allclose(
        score(tiny_lm.denoiser, tiny_lm.params, got, states), got.log_prob, atol=1e-5)


@pytest.mark.slow
def test_eight_samples_differ_and_cuts_do_not_matter(tiny_lm) -> None:
    """16 rows whose prompts' lengths lie in different buckets, in cuts of 1, 4 and 16."""
    prompts = [list(range(1, 20)), [5]]
    ask = {"key": jax.random.key(11), "num_samples": 8, "temperature": 4.0, "recipe": RECIPE, **SHAPE}
    whole = rl.rollout(tiny_lm, prompts, **ask)
    for prompt in range(2):
        assert len({row.tobytes() for row in whole.completions()[8 * prompt:8 * prompt + 8]}) == 8
    before = tiny_lm.compile_count
    for size in (1, 4, 16):
        same(rl.rollout(tiny_lm, prompts, micro_batch=size, **ask), whole)
    assert tiny_lm.compile_count == before + 4  # two programs for each of two batch sizes
    part = rl.rollout(tiny_lm, prompts[:1], **(ask | {"num_samples": 4}), row_ids=[4, 5, 6, 7])
    assert [row.tolist() for row in part.completions()] == [row.tolist() for row in whole.completions()[4:8]]
    other = rl.rollout(tiny_lm, prompts, **(ask | {"key": 12}))
    assert (other.tokens != whole.tokens).any(1).all()


@pytest.mark.slow
def test_pinned_tokens_come_back(tiny_lm) -> None:
    """A prompt, and an answer of which three tokens are pinned; EOS may end it or may not occur."""
    tokens = [PROMPTS[0] + [0] * 12, PROMPTS[2] + [0] * 9]
    mask = [[False] * 5 + [True] * 12, [False] + [True] * 9]
    for row, column, token in ((0, 8, 33), (0, 9, MASK), (1, 6, 44)):
        tokens[row][column], mask[row][column] = token, False
    ask = {"key": 2, "num_samples": 3, "recipe": RECIPE, "block_length": 8}
    got = rl.rollout_infill(tiny_lm, tokens, mask, **ask)
    assert got.batch == 6
    for row in range(6):
        given, hidden = np.asarray(tokens[row // 3]), np.asarray(mask[row // 3])
        here = got.valid[row]
        np.testing.assert_array_equal(got.is_open[row][here], hidden)
        np.testing.assert_array_equal(got.tokens[row][here][~hidden], given[~hidden])
        assert not np.isin(got.tokens[row][here][hidden], [MASK, EOS]).any()
        assert got.lengths[row] == hidden.sum()
        assert (got.commit_step[row][here][~hidden] == -1).all()
    assert len({row.tobytes() for row in got.tokens[:3]}) == 3
    assert sorted(got.forbidden.ids.tolist()) == sorted([MASK, EOS])
    replayed = score(tiny_lm.denoiser, tiny_lm.params, got, rl.trace_states(got, num_states=24))
    np.testing.assert_allclose(replayed, got.log_prob, atol=1e-5)
    same(rl.rollout_infill(tiny_lm, tokens, mask, micro_batch=4, **ask), got)  # the last cut is not full
    eos = int(got.tokens[0][got.is_open[0]][1])  # from now on this one ends a row
    ended = rl.rollout_infill(tiny_lm, tokens, mask, eos_id=eos, stop_on_eos=True, **ask)
    assert ended.stop_reason[0] == StopReason.EOS
    assert ended.lengths[0] == int((got.tokens[0][got.is_open[0]] == eos).argmax()) + 1
    pinned = got.valid & ~got.is_open
    np.testing.assert_array_equal(ended.tokens[pinned], got.tokens[pinned])
    assert ended.forbidden.ids.tolist() == [MASK]


@pytest.mark.slow
def test_blocks_of_attention_are_blocks_of_rollouts() -> None:
    """Without being asked for: pins of a ragged batch as each row alone, and replayed by the scorer."""
    lm = djax.load(GOLDENS, dtype="float32", mask_id=150, eos_id=151)
    rows = [list(range(1, 50)), list(range(60, 77))]
    masks = [[index in (3, 40, 41) for index in range(49)], [index % 5 == 4 for index in range(17)]]
    got = rl.rollout_infill(lm, rows, masks, key=0, temperature=0.0)
    assert got.block_length == lm.config.block_length == 32
    for row, (tokens, mask) in enumerate(zip(rows, masks, strict=True)):
        alone = lm.infill([tokens], [mask], recipe=recipes.llada2(threshold=0.9, cache=False))
        np.testing.assert_array_equal(got.tokens[row][got.valid[row]], alone.tokens[0])
        start = int(got.valid[row].argmax())
        assert (got.first_block - start) % 32 == 0
    replayed = score(lm.denoiser, lm.params, got, rl.trace_states(got))
    np.testing.assert_allclose(replayed, got.log_prob, atol=2e-5)
    assert rl.rollout(lm, [[1, 2, 3]], key=0, max_new_tokens=4).block_length == 32


def test_rows_can_be_taken(warm) -> None:
    part = warm.take(slice(2, 4))
    assert part.batch == 2
    assert part.mask_id == warm.mask_id
    np.testing.assert_array_equal(part.tokens, warm.tokens[2:4])
    np.testing.assert_array_equal(rl.trace_states(warm, num_states=24).take(np.asarray([5])).masks,
                                  rl.trace_states(warm.take(np.asarray([5])), num_states=24).masks)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_samples": 0}, "num_samples: got 0; allowed an integer of at least 1"),
    ({"micro_batch": 0}, "micro_batch: got 0; allowed an integer of at least 1"),
    ({"row_ids": [1]}, "row_ids: got 1 ids; allowed one for each of the 2 rows (prompts times num_samples)"),
    ({"temperature": -1.0}, "temperature: got -1.0"),
    ({"top_p": 1.5}, "top_p: got 1.5"),
    ({"max_new_tokens": 9000}, "max_new_tokens: got 9000"),
])
def test_wrong_arguments_are_named(tiny_lm, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        rl.rollout(tiny_lm, [[1]], **({"key": 0, "num_samples": 2, **SHAPE} | change))
    assert str(caught.value).startswith(message)


def test_wrong_traces_and_pins_are_named(tiny_lm, warm) -> None:
    with pytest.raises(ValueError, match="shrink: got 0; allowed an integer of at least 1"):
        rl.trace_states(warm, shrink=0)
    with pytest.raises(ValueError, match=r"num_states: got 2; the longest row needs \d+"):
        rl.trace_states(warm, num_states=2)
    with pytest.raises(ValueError, match=r"mask: got rows of \[2\] entries; the rows of tokens have \[3\]"):
        rl.rollout_infill(tiny_lm, [[1, 2, 3]], [[True, False]], key=0)
    with pytest.raises(ValueError, match="completions: got 1 for 2 prompts"):
        rl.as_rollout([[1], [2]], [[3]], mask_id=MASK, pad_id=0)


def test_unused_parts_are_exact() -> None:
    """A warm-up of no cache, and a mask id that is refused, are exact; a periodic refresh is not."""
    from djax.rollouts.rollout import _obstacles

    exact = Parts(strategy=strategies.Quota(3), cache_policy=cache_policies.WithWarmup(cache_policies.NoCache(), 4),
                  propose=proposals.RefuseToken(proposals.Greedy(), MASK))
    assert _obstacles(exact, guided=False) == []
    stale = Parts(strategy=strategies.Quota(3), cache_policy=cache_policies.Periodic(cache_policies.Dual(), 1),
                  smoothing=smoothing.SoftTokens())
    assert len(_obstacles(stale, guided=False)) == 2
