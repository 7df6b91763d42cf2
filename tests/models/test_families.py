"""A family of two files and two lines: it is built, converted, loaded, planned for and generates."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
import djax
from convert import families as checkpoints
from convert.errors import ConfigError
from djax.cli.plan import find_config
from djax.devices.sharding import named_leaves
from djax.models import abstract_params, build, families, logical_axes
from djax.plan.planner import plan
from tests.support.toy_family import checkpoint, model

FIELDS: dict[str, Any] = {
    "model_type": "toy", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "eos_token_id": 1, "mask_token_id": 31, "torch_dtype": "float32"}


@pytest.fixture
def _registered() -> Iterator[None]:
    families.FAMILIES.append(model.FAMILY)  # the two lines
    checkpoints.FAMILIES.append(checkpoint.FAMILY)
    yield
    families.FAMILIES.remove(model.FAMILY)
    checkpoints.FAMILIES.remove(checkpoint.FAMILY)


@pytest.fixture
def directory(_registered: None, tmp_path: Path) -> Path:
    """A checkpoint with random weights."""
    rng, shapes = np.random.default_rng(7), {
        "embed": (32, 8), "norm": (8,), "head": (32, 8), "layers.0.norm1": (8,), "layers.0.norm2": (8,),
        "layers.0.q": (8, 8), "layers.0.k": (4, 8), "layers.0.v": (4, 8), "layers.0.o": (8, 8),
        "layers.0.query_norm": (4,), "layers.0.key_norm": (4,), "layers.0.gate": (16, 8), "layers.0.up": (16, 8),
        "layers.0.down": (8, 16)}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(FIELDS))
    save_file({f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
              source / "model.safetensors")
    return source


def test_it_loads_generates_and_converts(directory: Path, tmp_path: Path) -> None:
    lm = djax.load(directory)
    got = lm.generate([[3, 4, 5]], max_new_tokens=8, block_length=8, recipe=djax.recipes.fast_dllm(threshold=0.9))
    assert 0 < got.tokens[0].size <= 8
    assert "toy" in repr(lm)
    converted = djax.load(convert.convert(directory, tmp_path / "converted"))
    assert converted.config == lm.config == convert.read_config(directory)
    exported = convert.export(tmp_path / "exported", lm.params, config=lm.config)
    stored = named_leaves(convert.load_params(exported)[1])
    for name, leaf in named_leaves(lm.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(converted.params)[name])
        np.testing.assert_array_equal(leaf, stored[name])


def test_it_is_planned_for_by_name_and_by_directory(directory: Path) -> None:
    small, named = find_config(str(directory)), find_config("toy")
    assert small == convert.read_config(directory)
    call = {"topology": "h200:2", "mesh": "tensor=2", "prompt_length": 16, "max_new_tokens": 512, "compiled": False}
    found, wider = (plan(dataclasses.replace(named, dense_size=size), **call) for size in (128, 256))
    assert found.split["ffn"] == found.split["heads"] == 2
    assert found.estimate.total > found.estimate.parameters > 0
    more = 2 * 3 * 64 * 128 // 2  # weights of a device's half of the blocks, in two layers
    assert {wider.steps[name].bytes - found.steps[name].bytes for name in found.steps} == {2 * more}
    assert wider.estimate.parameters - found.estimate.parameters == 2 * more
    assert wider.steps["window"].flops - found.steps["window"].flops == more * 2 * 96


def test_it_is_described(directory: Path) -> None:
    described = convert.describe(directory)
    names = {parameter.name for parameter in described.parameters}
    assert names == set(named_leaves(abstract_params(described.config)))
    assert logical_axes(described.config)["layers"][0]["mlp"]["down"] == ("embed", "ffn")


def test_nobody_else_knows_it() -> None:
    config = model.FAMILY.published["toy"]
    with pytest.raises(ValueError, match=r"got a ToyConfig; there are models for LladaMoeConfig, Llada2MoeConfig$"):
        build(config)
    with pytest.raises(ConfigError, match=r"supported are 'llada' with num_experts \(LLaDA-MoE\) and 'llada2_moe' \(L"):
        convert.model_config(FIELDS)


def test_configurations_need_no_jax() -> None:
    code = "import sys; from djax.models.config import Llada2MoeConfig; print({'jax', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
