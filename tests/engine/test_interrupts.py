"""Ctrl-C between the stretches of a generation, weights that are gone, and what the stretches leave unchanged."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import djax
from djax import recipes, rl
from djax.cli.live import LiveCanvas
from djax.engine import interrupts
from djax.engine.interrupts import Hold, Pace
from djax.engine.results import draft_texts, tokens_per_forward
from djax.engine.streaming import StreamStep
from djax.errors import ArgumentError
from tests.conftest import press_ctrl_c

PROMPTS = [[98, 107, 10, 66, 130], [124, 103, 77, 122, 91, 149, 55, 129, 35], [72]]
MASK = 155
DUAL = recipes.fast_dllm(threshold=0.6)
CALL = {"recipe": DUAL, "max_new_tokens": 20, "block_length": 8, "mask_id": MASK}
"""The shape that test_api.py compiles."""


@pytest.fixture
def step_by_step(golden_lm, monkeypatch):
    """Stretches of one step each."""
    monkeypatch.setattr(interrupts, "STRETCH_SECONDS", 0.0)
    golden_lm.program._paces.clear()
    yield golden_lm
    golden_lm.program._paces.clear()


def test_stretches_change_nothing(step_by_step, monkeypatch):
    """The loop to its end in one go, and one step at a time: the same record. (test_api.py: as `denoise`.)"""
    reached: list[djax.Generation] = []
    got = step_by_step.generate(PROMPTS, watch=reached.append, temperature=0.7, key=3, **CALL)
    steps = list(step_by_step.stream(PROMPTS, temperature=0.7, key=3, **CALL))
    step_by_step.program._paces.clear()
    monkeypatch.setattr(interrupts, "STRETCH_SECONDS", 1e9)
    monkeypatch.setattr(interrupts, "_FASTEST_GROWTH", 2**20)
    single: list[djax.Generation] = []
    for _ in range(2):
        single.clear()
        whole = step_by_step.generate(PROMPTS, watch=single.append, temperature=0.7, key=3, **CALL)
    assert not single
    for name in ("canvas", "is_masked", "commit_step", "log_prob", "nfe", "steps", "refreshes", "stop_reason"):
        np.testing.assert_array_equal(getattr(got, name), getattr(whole, name), err_msg=name)
    assert len(reached) == len(steps) - 1 > 4
    for one, step in zip(reached, steps, strict=False):
        np.testing.assert_array_equal(one.canvas, step.tokens)
        working = (one.is_masked & one.is_open).any(1)
        assert [reason == "interrupted" for reason in one.stop_reason] == working.tolist()
    assert reached[0].lengths.sum() <= reached[-1].lengths.sum()


def test_blocks_are_streamed_whole(step_by_step):
    """A stream of blocks stops at their ends though its stretches are shorter."""
    steps = list(step_by_step.stream(PROMPTS, drafts=False, **CALL))
    assert [step.block for step in steps] == [0, 1, 2]
    for step, end in zip(steps, (8, 16, 20), strict=True):
        for row in range(len(PROMPTS)):
            assert not step.is_masked[row][step.is_open[row]][:end].any()


def test_an_interrupt_ends_a_generation_between_two_stretches(step_by_step):
    seen: list[djax.Generation] = []

    def press(got: djax.Generation) -> None:
        seen.append(got)
        press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        step_by_step.generate(PROMPTS, watch=press, **CALL)
    assert len(seen) == 1
    assert "interrupted" in seen[0].stop_reason
    before = step_by_step.compile_count
    assert set(step_by_step.generate(PROMPTS, **CALL).stop_reason) <= {"length", "eos"}
    assert step_by_step.compile_count == before


def test_an_interrupted_main_thread_ends_generations_of_others(step_by_step):
    """The pool waits for its thread while the main thread deals with Ctrl-C."""
    started, pressed = threading.Event(), threading.Event()

    def hold(got: djax.Generation) -> None:
        started.set()
        assert pressed.wait(60)

    def work() -> None:
        step_by_step.generate(PROMPTS, watch=hold, **CALL)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work)
        assert started.wait(60)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            pressed.set()
            with pytest.raises(KeyboardInterrupt, match="main thread"):
                job.result(60)
        assert len(pool.submit(lambda: step_by_step.generate(PROMPTS, **CALL)).result(60).tokens) == 3


def test_the_end_of_the_process_waits_for_threads(step_by_step, monkeypatch):
    """Also for one that is between two stretches: it ends at its next, and nothing of JAX is torn down before."""
    ending = interrupts._Ending()
    monkeypatch.setattr(interrupts, "_ENDING", ending)
    started = threading.Event()
    seen: list[djax.Generation] = []

    def hold(got: djax.Generation) -> None:
        seen.append(got)
        started.set()
        while not ending.began:
            time.sleep(0.001)

    ended: list[str] = []

    def work() -> None:
        try:
            step_by_step.generate(PROMPTS, watch=hold, **CALL)
        except SystemExit:
            ended.append("exit")

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    ending.wait()
    assert not interrupts._threads_inside()
    thread.join(60)
    assert (len(seen), ended) == (1, ["exit"])


def test_the_pace_follows_the_clock():
    pace = Pace()
    taken = []
    for _ in range(5):  # 1 ms a step
        taken.append(pace.steps)
        pace.took(1e-3 * pace.steps)
    assert taken == [1, 64, 400, 400, 400]
    pace.took(10.0)  # the machine got slow
    assert pace.steps == 16
    pace.took(1e6)
    assert pace.steps == 1
    shared = Pace(fixed=True)
    shared.took(5.0)
    assert shared.steps == interrupts.SHARED_STEPS


def test_ctrl_c_waits_for_a_compilation():
    hold, done = Hold(), []

    def compile_under(presses: int) -> None:
        with hold.armed():
            hold.begin()
            for _ in range(presses):
                press_ctrl_c()
            done.append("compiled")

    with pytest.raises(KeyboardInterrupt):
        compile_under(presses=1)
    assert done == ["compiled"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        compile_under(presses=2)
    hold.begin()  # lowering by hand is not held
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == ["compiled"]


def test_weights_that_are_gone_are_named(golden_lm):
    params = jax.tree.map(lambda leaf: leaf + 0, golden_lm.params)
    lm = djax.DiffusionLM(golden_lm.config, params)
    stream = lm.stream(PROMPTS[:1], **CALL)
    rollout = rl.as_rollout([[1, 2]], [[3]], mask_id=MASK, pad_id=0)
    states = rl.masked_states(rollout, jax.random.key(0), scheme="one_step")
    jax.tree.leaves(lm.params)[2].delete()
    calls = [
        lambda: lm.generate(PROMPTS, **CALL), lambda: next(iter(stream)), lambda: lm.logits(PROMPTS),
        lambda: lm.infill([[1, 2]], [[False, True]], recipe=DUAL, block_length=8, mask_id=MASK),
        lambda: rl.rollout(lm, PROMPTS, key=0, max_new_tokens=8, block_length=8, mask_id=MASK),
        lambda: rl.score(lm.denoiser, lm.params, rollout, states)]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"params: got layers.*deleted.*lm\.update_params\(new_params\)"):
            call()
    assert lm.compile_count == 0
    lm.update_params(golden_lm.params)
    interrupts.check()
    from djax.engine.weights import check_alive

    assert check_alive(lm.params) is lm.params


@pytest.mark.slow
def test_the_view_counts_what_the_api_counts(golden_lm):
    """A row whose EOS fills the rest of its canvas: the fill is not generated."""
    free = golden_lm.generate(PROMPTS, stop_on_eos=False, **CALL)
    eos = int(free.tokens[0][3])
    got = golden_lm.generate(PROMPTS, eos_id=eos, **CALL)
    assert (got.is_open & (got.commit_step < 0)).any(), "nothing was filled"
    *_, last = golden_lm.stream(PROMPTS, eos_id=eos, **CALL)
    np.testing.assert_array_equal(last.lengths, got.lengths)
    view = LiveCanvas(tokenizer=None, block_length=8)
    expected = got.lengths.sum() / got.nfe.sum()
    assert f"{expected:.2f} tokens/forward" in view.status(last)
    np.testing.assert_array_equal(tokens_per_forward([6, 0], [4, 0]), [1.5, 0.0])


def test_lengths_while_a_row_is_at_work():
    tokens = np.asarray([[1, 7, 9, 8, 9, 9], [1, 7, 5, 8, 5, 9]])
    is_masked = np.asarray([[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]], bool)
    is_open = np.asarray([[0, 1, 1, 1, 1, 1]] * 2, bool)
    step = StreamStep(
        tokens=tokens, is_masked=is_masked, valid=np.ones_like(is_open), is_open=is_open, generated=slice(1, 6),
        committed=[], text=None, draft=[], block=0, nfe=np.ones(2, int), done=np.zeros(2, bool), eos_ids=(9,))
    assert step.lengths.tolist() == [1, 2]
    assert step.reached(None) == ["", "7[MASK:1]8"]
    assert draft_texts(tokens, is_open, np.ones_like(is_open), (9,), None) == ["", ""]
