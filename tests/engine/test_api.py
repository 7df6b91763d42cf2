"""The Python API on dInfer's tiny checkpoint and on the bundled model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import recipes, rl
from djax.contracts.canvas import bucket_size
from djax.errors import ArgumentError
from djax.parts.transforms import ForbidTokens
from tests.conftest import EIGHT_DEVICES

PROMPTS = [[98, 107, 10, 66, 130], [124, 103, 77, 122, 91, 149, 55, 129, 35], [72]]
MASK, EOS = 155, 152
SHAPE = {"max_new_tokens": 20, "block_length": 8, "mask_id": MASK}
DUAL = recipes.fast_dllm(threshold=0.6)


def same(left: djax.Generation, right: djax.Generation) -> None:
    for name in ("canvas", "canvas_mask", "is_masked", "nfe", "commit_step", "log_prob", "lengths"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert left.stop_reason == right.stop_reason


@pytest.fixture(scope="module")
def bundled():
    return djax.load(dtype="float32")


@pytest.fixture(scope="module")
def batch(golden_lm):
    return golden_lm.generate(PROMPTS, recipe=DUAL, **SHAPE)


def test_a_generation_holds_what_it_says(golden_lm, batch):
    assert batch.text is None  # this checkpoint has no tokenizer
    assert batch.canvas.shape == batch.canvas_mask.shape == batch.commit_step.shape == batch.log_prob.shape
    for row, prompt in enumerate(PROMPTS):
        real = batch.canvas[row][batch.canvas_mask[row]]
        assert real[: len(prompt)].tolist() == prompt
        assert len(real) == len(prompt) + 20  # the limit is not a multiple of the block length
        generated = real[len(prompt):]
        ends = np.flatnonzero(generated == EOS)
        length = ends[0] + 1 if len(ends) else 20
        assert batch.tokens[row].tolist() == generated[:length].tolist()
        assert batch.lengths[row] == length
        committed = batch.commit_step[row] >= 0
        assert not committed[~batch.is_open[row]].any()
        assert (batch.log_prob[row][committed] < 0).all()
        assert batch.commit_step[row].max() == batch.nfe[row] - 1
    np.testing.assert_allclose(batch.tokens_per_forward, batch.lengths / batch.nfe)
    assert set(batch.stop_reason) <= {"length", "eos"}
    assert not np.isin(batch.canvas[batch.is_open], [MASK]).any()


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(golden_lm, batch):
    for row, prompt in enumerate(PROMPTS):
        alone = golden_lm.generate([prompt], recipe=DUAL, row_ids=[row], **SHAPE)
        for name in ("canvas", "commit_step"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(batch, name)[row])
        assert alone.nfe[0] == batch.nfe[row]


def test_samples_differ_and_micro_batches_agree(golden_lm):
    prompts = [PROMPTS[0]] * 3
    whole = golden_lm.generate(prompts, recipe=DUAL, temperature=4.0, key=7, **SHAPE)
    assert len({tuple(row) for row in whole.tokens}) == 3
    again = golden_lm.generate(prompts, recipe=DUAL, temperature=4.0, key=7, **SHAPE)
    same(whole, again)
    other = golden_lm.generate(prompts, recipe=DUAL, temperature=4.0, key=8, **SHAPE)
    assert (whole.canvas != other.canvas).any()
    for row in range(3):
        part = golden_lm.generate(prompts[:1], recipe=DUAL, temperature=4.0, key=7, row_ids=[row], **SHAPE)
        np.testing.assert_array_equal(part.canvas[0], whole.canvas[row])
        np.testing.assert_array_equal(part.commit_step[0], whole.commit_step[row])


def test_sweeps_compile_nothing(golden_lm, batch):
    before = golden_lm.compile_count
    assert before >= 2  # what begins, and the loop
    for number in range(3):
        golden_lm.generate(
            [prompt[number:] for prompt in PROMPTS], recipe=recipes.fast_dllm(threshold=0.3 * number),
            temperature=0.5 * number, key=number, eos_id=[100 + number], mask_id=MASK - number,
            max_new_tokens=17 + number, block_length=8, stop_on_eos=True)
    assert golden_lm.compile_count == before


@pytest.mark.slow
def test_another_block_length_is_compiled_once(golden_lm, batch):
    before = golden_lm.compile_count
    golden_lm.generate(PROMPTS, recipe=DUAL, max_new_tokens=20, block_length=4, mask_id=MASK)
    assert golden_lm.compile_count == before + 2  # what begins, and the loop


@pytest.mark.slow
def test_warmup_compiles_ahead(golden_lm):
    lm = djax.DiffusionLM(dataclasses.replace(golden_lm.config, mask_id=MASK), golden_lm.params)
    assert lm.warmup([(2, 5, 8)], recipe=DUAL, block_length=8) == 2
    assert lm.warmup([(2, 7, 8)], recipe=DUAL, block_length=8) == 0  # the same bucket
    lm.generate([[1, 2, 3, 4], [5]], recipe=DUAL, max_new_tokens=8, block_length=8, temperature=0.3, key=5)
    assert lm.compile_count == 2


@pytest.mark.parametrize("drafts", [True, False])
def test_a_stream_ends_where_generate_does(golden_lm, batch, drafts):
    steps = list(golden_lm.stream(PROMPTS, recipe=DUAL, drafts=drafts, **SHAPE))
    if drafts:
        assert len(steps) >= batch.nfe.max()
    else:
        assert len(steps) == 3
    np.testing.assert_array_equal(steps[-1].tokens, batch.canvas)
    np.testing.assert_array_equal(steps[-1].nfe, batch.nfe)
    for row in range(len(PROMPTS)):
        pieces = np.concatenate([step.committed[row] for step in steps])
        assert pieces.tolist() == batch.tokens[row].tolist()
    given = [0] * len(PROMPTS)
    for step in steps:
        for row, prompt in enumerate(PROMPTS):
            given[row] += len(step.committed[row])
            assert len(step.draft[row]) == 20 - given[row]
            assert step.tokens[row][step.valid[row]][: len(prompt)].tolist() == prompt


class Recorder:
    def __init__(self) -> None:
        self.put_calls: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.ended = False

    def put(self, value: np.ndarray) -> None:
        self.put_calls.append(value.tolist())

    def put_draft(self, value: np.ndarray) -> None:
        self.drafts.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_hugging_face_streamers(golden_lm):
    recorder = Recorder()
    steps = list(golden_lm.stream([PROMPTS[0]], recipe=DUAL, streamer=recorder, **SHAPE))
    alone = golden_lm.generate([PROMPTS[0]], recipe=DUAL, **SHAPE)
    assert recorder.put_calls[0] == PROMPTS[0]
    assert [token for call in recorder.put_calls[1:] for token in call] == alone.tokens[0].tolist()
    assert len(recorder.drafts) == len(steps)
    assert recorder.ended
    with pytest.raises(ValueError, match="streamer: got 3 prompts"):
        golden_lm.stream(PROMPTS, streamer=recorder, **SHAPE)


@pytest.mark.slow
def test_transformers_text_streamer(bundled, capsys):
    from transformers import TextStreamer

    streamer = TextStreamer(bundled.tokenizer.backend, skip_prompt=True, skip_special_tokens=True)
    arguments = {"recipe": DUAL, "max_new_tokens": 96, "block_length": 32}
    chat = [{"role": "user", "content": "Sort these numbers: 42 7 19 30"}]
    for _ in bundled.stream([chat], streamer=streamer, **arguments):
        pass
    out = bundled.generate([chat], **arguments)
    assert out.stop_reason == ["eos"]
    assert capsys.readouterr().out == out.text[0] + "\n"


def test_text_in_text_out(bundled):
    chat = [{"role": "user", "content": "Hello"}]
    ids = bundled.tokenizer.apply_chat(chat)
    arguments = {"recipe": DUAL, "max_new_tokens": 16, "block_length": 8}
    by_chat, by_ids = (bundled.generate([first, "Hello"], **arguments) for first in (chat, ids))
    assert by_chat.tokens[0].tolist() == by_ids.tokens[0].tolist()
    assert by_chat.text[0] == by_ids.text[0]
    again = bundled.generate(["Hello"] * 2, **arguments)
    assert again.text == by_chat.text[1:] * 2


@pytest.mark.slow
def test_ids_past_the_tokenizer_never_come_out(bundled):
    """The bundled model's vocabulary is padded."""
    arguments = {"recipe": DUAL, "max_new_tokens": 16, "block_length": 8}
    hot = bundled.generate(["Hello"] * 2, temperature=50.0, **arguments)
    assert hot.canvas[hot.is_open].max() < bundled.tokenizer.size < bundled.config.vocab_size


@pytest.mark.slow
def test_text_is_trimmed_at_the_first_eos(bundled):
    arguments = {"recipe": DUAL, "max_new_tokens": 16, "block_length": 8}
    prompts = ["Hello"] * 2  # the shape of the test above
    free = bundled.generate(prompts, stop_on_eos=False, **arguments)
    eos = int(free.canvas[0][free.is_open[0]][4])
    for stop in (True, False):
        out = bundled.generate(prompts, eos_id=eos, stop_on_eos=stop, **arguments)
        first = int(np.flatnonzero(out.canvas[0][out.is_open[0]] == eos)[0])
        assert out.lengths[0] == first + 1
        assert out.tokens[0][-1] == eos
        assert out.text[0] == bundled.tokenizer.decode(out.tokens[0][:-1])
        assert out.stop_reason == ["eos" if stop else "length"] * 2
        assert out.nfe[0] < free.nfe[0] or not stop


@pytest.mark.slow
def test_infill_keeps_pinned_tokens(golden_lm):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 150, length).tolist() for length in (18, 11, 5)]
    rows[0][3] = MASK  # a literal mask id that is pinned stays
    masks = [(rng.random(len(row)) < 0.4).tolist() for row in rows]
    masks[0][3], masks[2] = False, [False] * 5
    out = golden_lm.infill(rows, masks, recipe=DUAL, block_length=8, mask_id=MASK)
    for row, (tokens, mask) in enumerate(zip(rows, masks, strict=True)):
        filled = out.tokens[row]
        assert filled[~np.asarray(mask)].tolist() == np.asarray(tokens)[~np.asarray(mask)].tolist()
        assert not np.isin(filled[np.asarray(mask)], [MASK, EOS]).any()
    assert out.nfe[2] == 0
    assert out.stop_reason == ["length"] * 3
    turned = golden_lm.infill(rows[::-1], masks[::-1], recipe=DUAL, block_length=8, mask_id=MASK)
    assert [row.tolist() for row in turned.tokens] == [row.tolist() for row in out.tokens[::-1]]


def test_a_literal_mask_id_in_a_prompt_survives(golden_lm):
    prompt = [5, MASK, 7, MASK, MASK]
    out = golden_lm.generate([prompt, *PROMPTS[1:]], recipe=DUAL, **SHAPE)
    assert out.canvas[0][out.canvas_mask[0]][:5].tolist() == prompt
    assert out.is_open[0].sum() == 20


def test_logits_are_padded_on_the_left(golden_lm):
    whole = golden_lm.logits(PROMPTS)
    assert whole.dtype == np.float32
    assert whole.shape == (3, 9, 160)
    np.testing.assert_allclose(whole[0, 4:], golden_lm.logits(PROMPTS[:1])[0], atol=2e-4)


@pytest.mark.slow
def test_guidance_counts_two_forwards(golden_lm):
    arguments = {"recipe": recipes.llada(), "stop_on_eos": False, **SHAPE}
    plain, guided = golden_lm.generate(PROMPTS, **arguments), golden_lm.generate(PROMPTS, guidance=0.0, **arguments)
    assert guided.canvas.tolist() == plain.canvas.tolist()  # scale 0 is the conditional model
    assert guided.nfe.tolist() == (2 * plain.nfe).tolist()
    strong = golden_lm.generate(PROMPTS, guidance=3.0, **arguments)
    assert strong.canvas.tolist() != plain.canvas.tolist()


@pytest.mark.slow
def test_llada_takes_one_step_per_token(golden_lm):
    out = golden_lm.generate(PROMPTS, recipe=recipes.llada(), stop_on_eos=False, **SHAPE)
    assert out.nfe.tolist() == [20, 20, 20]
    fast = golden_lm.generate(PROMPTS, recipe=recipes.llada(steps_per_block=2), stop_on_eos=False, **SHAPE)
    assert fast.nfe.tolist() == [6, 6, 6]


@pytest.mark.slow
def test_denoise_inside_your_own_jit(golden_lm, batch):
    canvas = djax.Canvas.from_prompts(PROMPTS, max_new_tokens=20, block_length=8, mask_id=MASK, pad_id=EOS)

    @jax.jit
    def mine(params, canvas, key):
        result = djax.denoise(
            golden_lm.denoiser, params, canvas, key, strategy=DUAL.strategy, cache_policy=DUAL.cache_policy,
            transform=ForbidTokens(jnp.asarray([MASK])), stop_rule=djax.stopping.OnEos(jnp.asarray([EOS])))
        return result, result.lengths.sum()

    result, total = mine(golden_lm.params, canvas, jax.random.key(0))
    np.testing.assert_array_equal(result.tokens, batch.canvas)
    assert int(total) == batch.lengths.sum()
    assert {djax.StopReason(reason).name.lower() for reason in np.asarray(result.stop_reason)} == set(batch.stop_reason)


def test_generation_from_a_worker_thread(golden_lm, batch):
    results = []
    thread = threading.Thread(target=lambda: results.append(golden_lm.generate(PROMPTS, recipe=DUAL, **SHAPE)))
    thread.start()
    thread.join()
    same(results[0], batch)


def test_memory_is_estimated_before_compiling(bundled):
    before = bundled.compile_count
    small, large = (bundled.memory_estimate(n, 64, recipe=DUAL, block_length=8) for n in (1, 8))
    assert bundled.compile_count == before
    assert small.parameters == large.parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(bundled.params))
    config = bundled.config
    keys = 2 * config.num_layers * 64 * config.num_kv_heads * config.head_dim * 4
    assert (small.cache, large.cache) == (keys, 8 * keys)
    assert bundled.memory_estimate(1, 64, recipe=recipes.llada(), block_length=8).cache == 0
    for wrong in ({"batch": 0}, {"canvas_length": 0}, {"block_length": 65}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            bundled.memory_estimate(**({"batch": 1, "canvas_length": 64, "block_length": 8} | wrong))
    assert large.total == large.parameters + large.cache + large.other + large.temporaries


def test_memory_is_estimated_as_a_plan_does(bundled):
    """One answer to one question; tests/plan/test_plan.py compares it with the compilers'."""
    from djax.plan import plan

    planned = plan(bundled.config, topology="h200:1", batch=8, prompt_length=192, max_new_tokens=320, block_length=64,
                   recipe=DUAL, compiled=False)
    assert bundled.memory_estimate(8, planned.canvas_length, recipe=DUAL, block_length=64) == planned.estimate


def test_bucket_sizes():
    assert [bucket_size(n, minimum=1) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13)] == [1, 1, 2, 3, 4, 6, 6, 8, 12, 16]
    assert bucket_size(3, minimum=16) == 16
    for size in range(1, 2000):
        assert size <= bucket_size(size, minimum=1) <= max(1.5 * size, 1)


WRONG = [
    ({"prompts": []}, "prompts: got an empty list"),
    ({"prompts": None}, "prompts: got None"),
    ({"prompts": ["text"]}, "prompts[0]: got text, but this checkpoint has no tokenizer"),
    ({"prompts": [[160]]}, "prompts[0]: got token id 160; allowed 0 to 159"),
    ({"prompts": [[-1]]}, "prompts[0]: got token id -1"),
    ({"prompts": [[1.5]]}, "prompts[0]: got [1.5]"),
    ({"prompts": [[True]]}, "prompts[0]: got [True]"),
    ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ({"max_new_tokens": 9000}, "max_new_tokens: got 9000"),
    ({"block_length": 0}, "block_length: got 0"),
    ({"temperature": -0.1}, "temperature: got -0.1"),
    ({"temperature": float("nan")}, "temperature: got nan"),
    ({"temperature": "hot"}, "temperature: got 'hot'"),
    ({"top_k": 0}, "top_k: got 0"),
    ({"top_p": 0.0}, "top_p: got 0.0"),
    ({"top_p": 1.5}, "top_p: got 1.5"),
    ({"min_p": 2.0}, "min_p: got 2.0"),
    ({"guidance": float("inf")}, "guidance: got inf"),
    ({"recipe": "dinfer"}, "recipe: got a str"),
    ({"mask_id": 160}, "mask_id: got 160"),
    ({"mask_id": None}, "mask_id: got none, neither from the checkpoint"),
    ({"eos_id": []}, "eos_id: got an empty list"),
    ({"eos_id": [1, 999]}, "eos_id: got 999"),
    ({"row_ids": [1, 2, 3]}, "row_ids: got 3 ids"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments_are_named(golden_lm, change, message):
    arguments = {"prompts": [[1, 2]], "recipe": DUAL, **SHAPE} | change
    before = golden_lm.compile_count
    with pytest.raises(ValueError, match=r".") as caught:
        golden_lm.generate(arguments.pop("prompts"), **arguments)
    assert str(caught.value).startswith(message)
    assert golden_lm.compile_count == before


def test_a_record_is_its_keywords(golden_lm, batch):
    """Of every call that takes one; and what it holds may not be said twice."""
    lengths = {"max_new_tokens": SHAPE["max_new_tokens"]}
    keywords = {"recipe": DUAL, "block_length": 8, "mask_id": MASK}
    record = djax.Sampling(**keywords)
    before = golden_lm.compile_count
    same(golden_lm.generate(PROMPTS, sampling=record, **lengths), batch)
    *_, last = golden_lm.stream(PROMPTS, sampling=record, **lengths)
    np.testing.assert_array_equal(last.tokens, batch.canvas)
    assert golden_lm.warmup([(3, 9, 20)], sampling=record) == 0
    greedy = rl.rollout(golden_lm, PROMPTS, key=0, sampling=record, **lengths)  # a record's temperature is its own
    np.testing.assert_array_equal(greedy.tokens, batch.canvas)
    assert golden_lm.compile_count == before
    rows, masks = [[1, 2, 3, 4]], [[False, True, True, False]]
    call = {"token_ids": rows, "mask": masks}
    filled = golden_lm.infill(**call, sampling=record)
    same(filled, golden_lm.infill(**call, **keywords))
    pinned = rl.rollout_infill(golden_lm, rows, masks, key=0, sampling=record)
    np.testing.assert_array_equal(pinned.tokens, filled.canvas)
    calls = {"generate": golden_lm.generate, "stream": golden_lm.stream, "warmup": golden_lm.warmup,
             "infill": lambda given, **options: golden_lm.infill(given, masks, **options),
             "rollout": lambda given, **options: rl.rollout(golden_lm, given, key=0, **options),
             "rollout_infill": lambda given, **options: rl.rollout_infill(golden_lm, given, masks, key=0, **options)}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .* 'temprature'.*temperature"):
            call(rows, temprature=0.5)
        with pytest.raises(ArgumentError, match="sampling: got a record and top_k=, which it holds"):
            call(rows, sampling=record, top_k=None)
        with pytest.raises(ArgumentError, match=r"sampling: got 0\.7; allowed a djax\.Sampling"):
            call(rows, sampling=0.7)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"temperature": None}, {"block_length": 0}, {"recipe": "dinfer"}], ids=str)
def test_a_record_checks_its_fields(wrong):
    with pytest.raises(ArgumentError) as error:
        djax.Sampling(**wrong)
    assert error.value.name == next(iter(wrong))


def test_rows_that_are_filled_in_may_end(golden_lm):
    """With `stop_on_eos` as in rollouts; the last token of the first block is made the EOS."""
    rows, masks = [[1] * 3 + [0] * 16 + [2]], [[False] * 3 + [True] * 16 + [False]]
    call = {"recipe": DUAL, "block_length": 8, "mask_id": MASK}
    free = golden_lm.infill(rows, masks, **call)
    eos = int(free.tokens[0][10])
    got = golden_lm.infill(rows, masks, eos_id=eos, stop_on_eos=True, **call)
    assert got.stop_reason == ["eos"]
    rollout = rl.rollout_infill(golden_lm, rows, masks, key=0, temperature=0.0, eos_id=eos, stop_on_eos=True, **call)
    np.testing.assert_array_equal(rollout.tokens, got.canvas)
    np.testing.assert_array_equal(rollout.lengths, got.lengths)


def test_recipes_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="cache: got 'tripel'; allowed none, prefix, dual"):
        recipes.fast_dllm(cache="tripel")


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one():
    """Weights sharded over a mesh of fake devices: a fresh process, because the count is fixed at start."""
    code = textwrap.dedent("""
        import jax, numpy as np, djax
        from jax.sharding import AxisType
        arguments = dict(recipe=djax.recipes.fast_dllm(threshold=0.6), max_new_tokens=8, block_length=8)
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
        one = djax.load(dtype="float32").generate(prompts, **arguments)
        mesh = jax.make_mesh((4, 2), ("tensor", "expert"), axis_types=(AxisType.Auto,) * 2)
        lm = djax.load(dtype="float32", mesh=mesh)
        shards = {len({str(shard.index) for shard in leaf.addressable_shards}) for leaf in jax.tree.leaves(lm.params)}
        many = lm.generate(prompts, **arguments)
        assert shards >= {1, 4}, shards
        np.testing.assert_array_equal(one.canvas, many.canvas)
        np.testing.assert_array_equal(one.commit_step, many.commit_step)
        np.testing.assert_array_equal(one.nfe, many.nfe)
        print("equal on", jax.device_count())
    """)
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"})
    assert done.stdout.strip() == "equal on 8", done.stderr[-2000:]
