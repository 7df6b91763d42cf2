"""Generations on meshes of fake devices against one device: `python -m tests.support.drivers.mesh NAME`, one of `JOBS`.

In a process of its own: the number of devices is fixed when JAX starts. Prints "ok" and what was compared.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

import djax
from djax import recipes, transforms
from djax.devices.sharding import PRESETS, make_mesh, preset_sizes
from djax.engine.results import Generation
from djax.models import init_params
from djax.models.config import LladaMoeConfig
from djax.recipes import Recipe
from tests.conftest import GOLDENS
from tests.replay_goldens import read_cases, replay

MASK, EOS = 63, 62
CONFIG = LladaMoeConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, num_experts=8,
    experts_per_token=2, expert_size=16, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=256, mask_id=MASK, eos_id=EOS,
    pad_id=EOS, dtype="float32")
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
"""Ragged, and no multiple of any number of devices."""
SHAPE: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8}
RECIPES: dict[str, Recipe] = {
    "dinfer": recipes.dinfer(threshold=0.3, warmup=1, before=4, after=4),
    "llada": recipes.llada(steps_per_block=3),
    "dinfer_credit": recipes.dinfer_credit(threshold=0.3),
    "fast_dllm": recipes.fast_dllm(threshold=0.3),
    "dinfer_hierarchical": recipes.dinfer_hierarchical(high=0.5, low=0.2, warmup=0, before=4, after=4),
    "fast_dllm_prefix": recipes.fast_dllm(factor=0.5, cache="prefix"),
}
NAMES = [name for name in PRESETS if name != "single"]
DEVICES = (8, 2, 4)
AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
SCALES = {1: 24, 2: 8}
"""By the number of layers: what makes confidences of random weights differ."""


@functools.cache
def weights(config: LladaMoeConfig = CONFIG) -> Any:
    """Random ones, on the host."""
    _, params = init_params(config, jax.random.key(3))
    scale = SCALES[config.num_layers]
    return jax.tree.map(lambda array: np.asarray(array * scale if array.ndim > 1 else array), params)


def on_mesh(preset: str, devices: int, axis_type: AxisType, config: LladaMoeConfig = CONFIG) -> djax.DiffusionLM:
    mesh = make_mesh(preset_sizes(preset, devices), axis_type=axis_type)
    return djax.DiffusionLM(config, weights(config), mesh=mesh)


def same(expected: Generation, got: Generation) -> None:
    for field in ("canvas", "canvas_mask", "is_masked", "commit_step", "nfe", "refreshes", "lengths"):
        np.testing.assert_array_equal(getattr(expected, field), getattr(got, field), err_msg=field)
    assert expected.stop_reason == got.stop_reason
    np.testing.assert_allclose(expected.log_prob, got.log_prob, atol=2e-4)


def compare(cases: list[tuple[str, int, AxisType, str]], config: LladaMoeConfig = CONFIG) -> int:
    """(preset, devices, kind of axes, recipe) each against one device."""
    one = djax.DiffusionLM(config, jax.tree.map(jax.numpy.asarray, weights(config)))
    expected = {name: one.generate(PROMPTS, recipe=RECIPES[name], **SHAPE) for name in {case[-1] for case in cases}}
    for generation in expected.values():
        assert len(np.unique(generation.commit_step[generation.is_open])) > 2, "the trajectory says nothing"
    for preset, devices, axis_type, recipe in cases:
        lm = on_mesh(preset, devices, axis_type, config)
        same(expected[recipe], lm.generate(PROMPTS, recipe=RECIPES[recipe], **SHAPE))
    return len(cases)


def few() -> int:
    """One preset with one recipe: what the default run has time for."""
    return compare([("sp_tp_ep", 8, AxisType.Auto, "dinfer_credit")])


def product() -> int:
    """Every preset with every recipe, and every other pair of preset, recipe, number of devices and kind of axes.

    Of one layer: compiling is what takes the time, and the other jobs have two.
    """
    one_layer = dataclasses.replace(CONFIG, num_layers=1)
    cases = [(preset, DEVICES[(row + column) % len(DEVICES)], AXIS_TYPES[(row + column) % len(AXIS_TYPES)], recipe)
             for row, preset in enumerate(NAMES) for column, recipe in enumerate(RECIPES)]
    for left, right in itertools.combinations(range(4), 2):
        pairs = {(case[left], case[right]) for case in cases}
        assert len(pairs) == len({one for one, _ in pairs}) * len({other for _, other in pairs})
    return compare(cases, one_layer)


def calls() -> int:
    """The ways to call a model on a mesh: sampling, filters, guidance, streams, infilling, logits, other threads."""
    one = djax.DiffusionLM(CONFIG, jax.tree.map(jax.numpy.asarray, weights()))
    rows, holes = [[1, 2, MASK, 4, MASK, MASK], [5, MASK, 7]], [[0, 0, 1, 0, 1, 1], [0, 1, 0]]
    masks = [[bool(hole) for hole in row] for row in holes]
    for preset, axis_type in (("dp_tp_ep", AxisType.Auto), ("sp_tp", AxisType.Explicit)):
        many = on_mesh(preset, 8, axis_type)
        recipe = RECIPES["fast_dllm"]
        sampled = {"temperature": 1.0, "top_k": 5, "guidance": 0.5, "key": 3}
        drawn = {"temperature": 0.7, "key": 5}
        for options in (sampled, drawn):
            expected = one.generate(PROMPTS, recipe=recipe, **SHAPE, **options)
            same(expected, many.generate(PROMPTS, recipe=recipe, **SHAPE, **options))
        results: list[Generation] = []
        thread = threading.Thread(target=lambda lm=many, into=results, given=drawn: into.append(
            lm.generate(PROMPTS, recipe=RECIPES["fast_dllm"], **SHAPE, **given)))
        thread.start()
        thread.join()
        same(expected, results[0])
        for drafts in (True, False):
            steps = list(many.stream(PROMPTS, recipe=recipe, drafts=drafts, **SHAPE, **drawn))
            np.testing.assert_array_equal(steps[-1].tokens, expected.canvas)
            np.testing.assert_array_equal(steps[-1].nfe, expected.nfe)
        filled = [lm.infill(rows, masks, recipe=recipe, block_length=4) for lm in (one, many)]
        same(*filled)
        np.testing.assert_allclose(one.logits(PROMPTS), many.logits(PROMPTS), atol=2e-4)
        before = many.compile_count
        many.generate(PROMPTS, recipe=RECIPES["fast_dllm"].replace(strategy=recipe.strategy.replace(threshold=0.6)),
                      **SHAPE, **drawn)
        assert many.compile_count == before
    # a part without a reading is given all logits
    plain = RECIPES["fast_dllm"].replace(transform=transforms.Chain((transforms.MinP(0.05, 1.0),)))
    same(one.generate(PROMPTS, recipe=plain, **SHAPE), many.generate(PROMPTS, recipe=plain, **SHAPE))
    return 2


def goldens() -> int:
    """Every 24th of dInfer's recorded traces; `python -m tests.replay_goldens --mesh` replays all."""
    cases = read_cases(GOLDENS)[::24]
    for preset, devices, part in (("tp_ep", 8, cases[::2]), ("sp_tp", 4, cases[1::4]), ("ep", 2, cases[3::4])):
        lm = djax.load(GOLDENS, dtype="float32", mesh=make_mesh(preset_sizes(preset, devices)))
        for case in part:
            problem = replay(lm, case)
            assert problem is None, f"{preset} {devices}: {case['algo']}: {problem}"
    return len(cases)


JOBS = {"few": few, "product": product, "calls": calls, "goldens": goldens}

if __name__ == "__main__":
    print("ok", JOBS[sys.argv[1]](), "on", jax.device_count())
