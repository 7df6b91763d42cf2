"""LLaDA2 on meshes of fake devices against one device: `python -m tests.support.drivers.llada2_mesh PRESET [...]`.

In a process of its own: the number of devices is fixed when JAX starts.
"""

from __future__ import annotations

import collections
import dataclasses
import sys

import jax
import numpy as np

import convert
import djax
from djax import recipes
from djax.devices.sharding import make_mesh, named_leaves, preset_sizes
from djax.plan.hlo import Loop, generation_steps, read_module
from tests.support import golden_llada2 as golden
from tests.support.drivers.mesh import same

PROMPTS = [[5, 17, 9, 3, 44, 8, 21, 7, 60, 33, 2], [71], [12, 90, 4, 18, 55, 101, 6, 77]]
SHAPE = {"max_new_tokens": 13, "block_length": 8, "align": True}


def check_shards(lm: djax.DiffusionLM) -> None:
    """Every device's part of every parameter is the slice that its sharding says, of the tensors read by hand."""
    whole = {name: np.asarray(leaf) for name, leaf in named_leaves(golden.parameters()).items()}
    for name, leaf in named_leaves(lm.params).items():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index], err_msg=name)


def check_collectives(lm: djax.DiffusionLM, recipe: recipes.Recipe) -> None:
    """A step sums twice a layer, once in a dense layer whose width is whole, and gathers keys and values once where
    positions are split; it moves no weights."""
    seen = {}
    original = lm.program.advance

    def compiled(*arguments):
        if not seen:
            seen["text"] = original.lower(*arguments).compile().as_text()
        return original(*arguments)

    lm.program.advance = compiled
    lm.generate(PROMPTS, recipe=recipe, **SHAPE)
    lm.program.advance = original
    parallel = lm.program.parallel
    for name, step in generation_steps(read_module(seen["text"]), cached=recipe.cache_policy.exact).items():
        kinds = by_layer(step)
        for layer in range(3):
            expected = {"all-reduce": 2 if layer or parallel.ffn else 1}
            if parallel.sequence and name == "refresh":
                expected["all-gather"] = 1
            assert kinds[layer] == expected, (name, layer, kinds[layer])


def by_layer(step: Loop) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for one in step.pass_collectives():
        if one.layer is not None:
            found[one.layer][one.kind] += 1
    return found


def main(presets: list[str]) -> None:
    recipe = recipes.llada2(threshold=0.99)
    config, params = convert.load_params(golden.GOLDENS)
    config = dataclasses.replace(config, block_length=8, mask_id=155)
    options = {"temperature": 0.8, "key": 1}
    one = djax.DiffusionLM(config, params)
    expected = one.generate(PROMPTS, recipe=recipe, **SHAPE, **options)
    assert len(np.unique(expected.commit_step[expected.is_open])) > 4, "the trajectory says nothing"
    for preset in presets:
        mesh = make_mesh(preset_sizes(preset, 8))
        _, params = convert.load_params(golden.GOLDENS, config, mesh=mesh)
        lm = djax.DiffusionLM(config, params, mesh=mesh)
        check_shards(lm)
        same(expected, lm.generate(PROMPTS, recipe=recipe, **SHAPE, **options))
        # ragged rows on no common grid
        np.testing.assert_allclose(one.logits(PROMPTS), lm.logits(PROMPTS), atol=2e-4)
        check_collectives(lm, recipe)
    print("ok", *presets, "on", jax.device_count())


if __name__ == "__main__":
    main(sys.argv[1:])
