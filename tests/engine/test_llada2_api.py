"""A model whose attention has blocks, through the same calls as any other."""

from __future__ import annotations

import numpy as np
import pytest

import djax
from djax import recipes
from djax.parts.cache_policies import Dual
from tests.support.golden_llada2 import GOLDENS

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 20]
SHAPE = {"max_new_tokens": 40, "block_length": 32}


@pytest.fixture(scope="module")
def lm() -> djax.DiffusionLM:
    return djax.load(GOLDENS, dtype="float32", mask_id=150, eos_id=151)


@pytest.mark.slow
def test_a_row_of_a_ragged_batch_is_the_row_alone(lm: djax.DiffusionLM) -> None:
    """Blocks are on every row's own grid without being asked for, with the recipe and block length of the model."""
    batch = lm.generate(PROMPTS, max_new_tokens=40)
    for index, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], **SHAPE, recipe=recipes.llada2(cache=False), align=True)
        np.testing.assert_array_equal(batch.tokens[index], alone.tokens[0])
        assert batch.nfe[index] == alone.nfe[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, recipes.llada2().replace(cache_policy=Dual())], ids=["own", "dual"])
def test_infilling(lm: djax.DiffusionLM, recipe: recipes.Recipe | None) -> None:
    rows = [list(range(1, 50)), list(range(60, 77))]
    masks = [[index in (3, 40, 41) for index in range(49)], [index % 5 == 0 for index in range(17)]]
    batch = lm.infill(rows, masks, recipe=recipe)
    for index in range(2):
        alone = lm.infill([rows[index]], [masks[index]], recipe=recipes.llada2(cache=False))
        np.testing.assert_array_equal(batch.tokens[index], alone.tokens[0])


def test_what_cannot_be_is_refused(lm: djax.DiffusionLM, golden_lm: djax.DiffusionLM) -> None:
    with pytest.raises(ValueError, match="block_length: got 16 with the cache policy BlockCausal; allowed"):
        lm.generate(PROMPTS, block_length=16)
    with pytest.raises(ValueError, match="BlockCausal, which needs open positions in every block"):
        lm.infill([[1, 2]], [[False, True]], recipe=recipes.llada2())
    with pytest.raises(ValueError, match="BlockCausal with llada_moe, whose attention is not causal over blocks"):
        golden_lm.generate([[1, 2]], recipe=recipes.llada2(), max_new_tokens=4, mask_id=3)
