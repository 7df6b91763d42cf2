"""Lengths off the block grid, for a model with blocks: its last block is decoded whole, as its own code does."""

from __future__ import annotations

import numpy as np
import pytest

import djax
from djax import recipes, rl
from djax.contracts.canvas import Canvas
from djax.engine.options import Sampling, resolve
from tests.support import golden_llada2

MASK, EOS, BLOCK = 155, 152, golden_llada2.CONFIG.block_length
RECIPE = recipes.llada2(threshold=0.3)
CALL = {"recipe": RECIPE, "mask_id": MASK}
PROMPTS = [np.random.default_rng(seed).integers(0, 150, length).tolist()
           for seed, length in enumerate([1, 3, 5, 7, 8, 9, 12, 14])]


@pytest.fixture(scope="module")
def lm() -> djax.DiffusionLM:
    return djax.DiffusionLM(golden_llada2.CONFIG, golden_llada2.parameters())


def whole(lm: djax.DiffusionLM, prompt: list[int], new: int) -> list[int]:
    """Up to the end of the last block, then cut: what the published `generate()` does."""
    to_the_end = -(-(len(prompt) + new) // BLOCK) * BLOCK - len(prompt)
    got = lm.generate([prompt] * 2, max_new_tokens=to_the_end, eos_id=EOS, **CALL)  # as many as the next test has
    row = got.canvas[0][got.is_open[0]][:new].tolist()
    return row[:row.index(EOS) + 1] if EOS in row else row


def test_a_length_is_that_of_whole_blocks(lm: djax.DiffusionLM) -> None:
    """Two of the eight prompts of the next test."""
    got = lm.generate(PROMPTS[:2], max_new_tokens=13, eos_id=EOS, **CALL)
    assert [row.tolist() for row in got.tokens] == [whole(lm, prompt, 13) for prompt in PROMPTS[:2]]


@pytest.mark.slow
def test_every_length_is_that_of_whole_blocks(lm: djax.DiffusionLM) -> None:
    """Also: a canvas that ends inside the block gives other answers, so that the test can tell."""
    differ = 0
    for new in range(9, 17):
        got = lm.generate(PROMPTS, max_new_tokens=new, eos_id=EOS, **CALL)
        want = [whole(lm, prompt, new) for prompt in PROMPTS]
        assert [row.tolist() for row in got.tokens] == want, new
        assert got.lengths.max() <= new
        assert (got.is_open.sum(1) == new).all()
        parts = resolve(Sampling(**CALL, eos_id=EOS), lm.config, vocab_limit=lm.vocab_limit).parts
        cut = Canvas.from_prompts(PROMPTS, max_new_tokens=new, block_length=BLOCK, mask_id=MASK, pad_id=EOS, align=True)
        short = lm.decode(cut, parts, eos_ids=[EOS])
        differ += sum(row.tolist() != right for row, right in zip(short.tokens, want, strict=True))
    assert differ >= 5


@pytest.mark.slow
def test_streams_and_rollouts_are_cut_alike(lm: djax.DiffusionLM) -> None:
    new = 13
    want = lm.generate(PROMPTS, max_new_tokens=new, eos_id=EOS, **CALL)
    given = [[] for _ in PROMPTS]
    for step in lm.stream(PROMPTS, max_new_tokens=new, eos_id=EOS, drafts=False, **CALL):
        for row, tokens in zip(given, step.committed, strict=True):
            row += tokens.tolist()
    assert given == [row.tolist() for row in want.tokens]
    rollout = rl.rollout(lm, PROMPTS, key=0, temperature=0.0, max_new_tokens=new, eos_id=EOS, **CALL)
    np.testing.assert_array_equal(rollout.lengths, want.lengths)
    assert [row.tolist() for row in rollout.completions()] == given
    scored = np.asarray(rl.score(lm.denoiser, lm.params, rollout, rl.trace_states(rollout)))
    here = np.asarray(rollout.is_completion)
    assert here.sum() == want.lengths.sum()
    np.testing.assert_allclose(scored[here], np.asarray(rollout.log_prob)[here], atol=1e-4)


@pytest.mark.slow
def test_an_eos_behind_the_asked_length_ends_nothing(lm: djax.DiffusionLM) -> None:
    """The token that is decoded right behind the length is made the EOS."""
    found = lm.generate(PROMPTS, max_new_tokens=13, eos_id=EOS, **CALL)
    rows = [row[here].tolist() for row, here in zip(found.canvas, found.is_open, strict=True)]
    index, new = next((index, new) for index, row in enumerate(rows) for new in range(9, 13)
                      if row[new] not in row[:new] and EOS not in row[:new] and (len(PROMPTS[index]) + new) % BLOCK)
    got = lm.generate([PROMPTS[index]], max_new_tokens=new, eos_id=rows[index][new], **CALL)
    assert got.stop_reason == ["length"]
    assert got.tokens[0].tolist() == rows[index][:new]
