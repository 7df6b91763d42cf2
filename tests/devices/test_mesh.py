"""The same tokens, commit steps and NFE on a mesh as on one device, in float32. See `tests.support.drivers.mesh`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import djax
from djax.devices.sharding import DEFAULT_RULES, PRESETS, make_mesh, parse_mesh, preset_sizes, rules_for
from djax.models import init_params, parallel_on
from tests.conftest import EIGHT_DEVICES
from tests.support.drivers.mesh import CONFIG


def run(job: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.drivers.mesh", job], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False, env=os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("job", [
    "few", *(pytest.param(job, marks=pytest.mark.slow) for job in ("calls", "goldens", "product"))])
def test_a_mesh_gives_the_tokens_of_one_device(job: str) -> None:
    assert run(job).startswith("ok ")


def abstract(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_presets_use_all_devices() -> None:
    for name in PRESETS:
        for devices in (1, 2, 4, 6, 8, 16, 64) if name != "single" else (1,):
            sizes = preset_sizes(name, devices)
            assert np.prod(list(sizes.values()), dtype=int) == devices, (name, devices, sizes)
            assert tuple(sizes) == PRESETS[name]
    assert preset_sizes("tp_ep", 8) == {"tensor": 2, "expert": 4}
    assert preset_sizes("dp_tp_ep", 8) == {"data": 2, "tensor": 2, "expert": 2}


def test_a_mesh_from_text() -> None:
    assert parse_mesh("tensor=4, expert=2", devices=8) == {"tensor": 4, "expert": 2}
    assert parse_mesh("ep", devices=4) == {"expert": 4}
    for text, message in (
        ("tensor=0", "mesh: got 'tensor=0'; allowed a list of"), ("tensor=2,tensor=2", "list of different axes"),
        ("tensor=x", "mesh: got"), ("tensr=2", "mesh: got an axis 'tensr'; allowed context, data,"),
        ("tpp", "mesh: got 'tpp' for 8 devices; allowed single, tp, ep"), ("single", "mesh: got 'single' for 8")):
        with pytest.raises(ValueError, match=message):
            parse_mesh(text, devices=8)


def test_a_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"mesh: got tensor=4096, 4096 devices; allowed 1 to \d+, the devices here"):
        make_mesh({"tensor": 4096})
    assert make_mesh({}).size == 1


@pytest.mark.parametrize(("rules", "message"), [
    ({"batch": "tensor", "heads": "tensor"}, "'batch' and 'heads', which are both split over the mesh axis 'tensor'"),
    ({"sequence": "expert", "experts": "expert"}, "'sequence' and 'experts', which are both split over"),
    ({"sequence": "data", "batch": "data"}, "'sequence' and 'batch', which are both split over 'data'"),
    ({"heads": "tensor", "kv_heads": "expert"}, "'kv_heads' split over .'expert',. and 'heads' over .'tensor',."),
    ({"embed": "tensor"}, "'embed' split over .'tensor',.; allowed None for it: a generation needs it whole"),
    ({"heads": ("tensor", "expert", "data")}, "num_heads: got 8 split over 12 devices"),
])
def test_rules_that_collide(rules: dict[str, str], message: str) -> None:
    mesh = abstract(data=3, tensor=2, expert=2)
    with pytest.raises(ValueError, match=message):
        parallel_on(mesh, rules, num_heads=8, num_kv_heads=4)  # type: ignore[arg-type]


def test_heads_that_share_keys_must_meet_them() -> None:
    with pytest.raises(ValueError, match="num_kv_heads: got 3 with heads split over 2 devices"):
        parallel_on(abstract(tensor=2), {"heads": "tensor"}, num_heads=12, num_kv_heads=3)  # type: ignore[arg-type]


def test_default_rules_split_as_far_as_they_divide() -> None:
    axes = {"query": ("heads",), "key": ("kv_heads",), "gate": ("experts", "ffn"), "head": ("vocab",)}
    shapes = {name: np.zeros(shape, bool) for name, shape in (
        ("query", (8,)), ("key", (2,)), ("gate", (4, 6)), ("head", (12,)))}
    rules = rules_for(axes, shapes, abstract(tensor=2, expert=4))  # type: ignore[arg-type]
    assert rules["heads"] == ("tensor", "expert")
    assert rules["kv_heads"] == ("tensor",)
    assert rules["vocab"] == ("tensor",)
    assert (rules["experts"], rules["ffn"]) == (("expert",), ("tensor",))
    # fewer keys than devices: every device holds them all
    assert rules_for(axes, shapes, abstract(tensor=8))["kv_heads"] is None  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [
    {"fsdp": 4, "tp": 2},  # Tunix
    {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2, "context": 1},  # MaxText
])
def test_the_names_of_other_libraries(sizes: dict[str, int]) -> None:
    parallel = parallel_on(abstract(**sizes), DEFAULT_RULES, num_heads=8, num_kv_heads=8)  # type: ignore[arg-type]
    assert np.prod([sizes[axis] for axis in parallel.heads]) == 8
    assert "fsdp" in parallel.experts


def test_a_mesh_that_no_rule_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="mesh: got an axis 'rows' of 2 devices that no rule uses; allowed context"):
        djax.DiffusionLM(CONFIG, None, mesh=abstract(rows=2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rules: got a rule for 'head'; allowed embed, heads"):
        djax.DiffusionLM(CONFIG, None, mesh=abstract(tensor=2), rules={"head": "tensor"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^embed: got axis 'vocab' of size 64, which cannot be split evenly over 3"):
        djax.DiffusionLM(CONFIG, None, mesh=abstract(tensor=3))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device(axis_type: AxisType) -> None:
    mesh = make_mesh({"tensor": 1}, axis_type=axis_type)
    _, params = init_params(CONFIG, jax.random.key(0))
    lm = djax.DiffusionLM(CONFIG, params, mesh=mesh)
    assert lm.generate([[1, 2]], recipe=djax.recipes.llada(), max_new_tokens=4, block_length=4).nfe.tolist() == [4]
