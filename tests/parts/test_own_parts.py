"""Parts of a user's own in every call that takes a recipe."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import proposals, recipes, rl, stopping, strategies
from djax.contracts import struct
from djax.errors import ArgumentError

MASK = 150
CALL = {"max_new_tokens": 12, "block_length": 4, "mask_id": MASK}
PROMPTS = [[1, 2, 3], [4, 5, 6]]


@struct.dataclass
class Enough:
    """Ends a row once it has `count` generated tokens."""

    count: int
    reasons: ClassVar[tuple[str, ...]] = ("enough",)

    def step(self, tokens: Any, is_open: Any, is_masked: Any, info: Any) -> Any:
        return (is_open & ~is_masked).sum(-1) >= self.count

    def ends(self, tokens: Any) -> Any:
        return jnp.zeros(tokens.shape, bool)

    def fill(self) -> None:
        return None


@struct.dataclass
class AlwaysFive:
    """Proposes token 5 everywhere, surely."""

    def step(self, keys: Any, logits: Any, tokens: Any) -> Any:
        from djax.contracts.types import Candidates

        sure = jnp.ones(tokens.shape, jnp.float32)
        return Candidates(token=jnp.full(tokens.shape, 5, jnp.int32), confidence=sure, log_prob=sure * 0, current=sure)


def own() -> djax.Parts:
    """A new object at each call, as a user's code makes it."""
    return recipes.fast_dllm(threshold=0.9, cache="none").replace(stop_rule=Enough(4), propose=AlwaysFive())


def test_generate_infill_stream_and_rollout_take_them(golden_lm):
    got = golden_lm.generate(PROMPTS, recipe=own(), **CALL)
    assert got.stop_reason == ["enough", "enough"]
    assert [row.tolist() for row in got.tokens] == [[5] * 4] * 2
    assert golden_lm.generate(PROMPTS, recipe=own(), **CALL) == got
    assert got != golden_lm.generate(PROMPTS[::-1], recipe=own(), **CALL)

    *_, last = golden_lm.stream(PROMPTS, recipe=own(), drafts=False, **CALL)
    np.testing.assert_array_equal(last.tokens, got.canvas)

    filled = golden_lm.infill([[1, 2, 3, 4]], [[False, True, True, False]], recipe=own(), block_length=4, mask_id=MASK)
    assert filled.tokens[0].tolist() == [1, 5, 5, 4]

    rollout = rl.rollout(golden_lm, PROMPTS, key=0, temperature=0.0, recipe=own(), **CALL)
    np.testing.assert_array_equal(rollout.tokens, got.canvas)
    assert rollout.stop_reason.tolist() == [4, 4]
    assert not rollout.replayable
    assert "AlwaysFive" in rollout.not_replayable_because


def test_a_rule_of_ones_own_stands_beside_the_eos(golden_lm):
    """Whichever comes first gives its reason."""
    eos = recipes.fast_dllm(threshold=0.9, cache="none").replace(stop_rule=Enough(8), propose=AlwaysFive())
    assert golden_lm.generate(PROMPTS, recipe=eos, eos_id=5, **CALL).stop_reason == ["eos", "eos"]
    both = golden_lm.generate(PROMPTS, recipe=eos, eos_id=7, **CALL)
    assert both.stop_reason == ["enough", "enough"]
    assert both.lengths.tolist() == [8, 8]


def test_settings_that_an_own_proposal_would_not_see_are_refused(golden_lm):
    for setting in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        with pytest.raises(ArgumentError, match=f"^{next(iter(setting))}: got .* AlwaysFive"):
            golden_lm.generate(PROMPTS, recipe=own(), **setting, **CALL)


def test_reasons_are_counted_through_several_rules():
    rule = stopping.AnyOf((Enough(9), stopping.OnEos(np.array([5], np.int32)), Enough(2)))
    tokens = jnp.asarray([[1, 2, 3], [1, 5, 3], [1, 2, 3]])
    is_masked = jnp.asarray([[False, True, True], [False] * 3, [False] * 3])
    why = rule.step(tokens, jnp.ones_like(is_masked), is_masked, None)
    assert why.tolist() == [0, 2, 3]
    assert rule.reasons == ("enough", "eos", "enough")


def test_a_recipe_is_a_choice_of_parts():
    assert recipes.Recipe is djax.Parts
    assert isinstance(recipes.dinfer(), djax.Parts)
    assert djax.Parts(strategy=strategies.Threshold(0.9)).propose == proposals.Greedy()


def test_the_model_says_what_it_is(golden_lm):
    text = repr(golden_lm)
    assert text.startswith("DiffusionLM(llada_moe, ")
    assert "one device" in text
