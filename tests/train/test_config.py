"""A run's configuration: what it reads, and one line for every wrong field."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import init_params, logical_axes
from djax.models.config import LladaMoeConfig
from djax.train.config import OptimizerSection, learning_rate, make_optimizer, read_config
from tests.support.drivers.train_run import CONFIG

GOOD = """
[model]
source = "somewhere"
[data]
tasks = ["addition", "sort"]
[optimizer]
learning_rate = 1e-3
clip_norm = false
[training]
output = "out"
steps = 10
batch_size = 8
[mesh]
data = 2
"""


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return read_config(path)


def test_fields_defaults_and_paths(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert config.data.tasks == ("addition", "sort")  # type: ignore[attr-defined]
    assert config.optimizer.clip_norm is None  # type: ignore[attr-defined]
    assert config.training.output == str(tmp_path / "out")  # type: ignore[attr-defined]
    assert config.mesh.data == 2  # type: ignore[attr-defined]
    bare = read(tmp_path, GOOD.replace("[mesh]\ndata = 2\n", ""))
    assert bare.mesh is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("steps = 10", "", "training.steps: got nothing; allowed a value; add it"),
    ("steps = 10", "stepz = 10", "training.stepz: got a field that does not exist; .*did you mean steps"),
    ("steps = 10", "steps = 1.5", "training.steps: got 1.5; allowed a valid integer"),
    ("steps = 10", "steps = true", "training.steps: got True; allowed a valid integer"),
    ("steps = 10", "steps = 0", "training.steps: got 0; allowed a number greater than or equal to 1"),
    ("steps = 10", "steps = 10\naccumulate = 3", "training.accumulate: got 3; allowed a divisor of batch_size = 8"),
    ("steps = 10", 'steps = 10\nobjective = "blocks"', "training.objective: got 'blocks'; allowed 'masked' or 'block'"),
    ("steps = 10", 'steps = 10\ncompute_dtype = "int8"', "training.compute_dtype: got 'int8'; allowed 'bfloat16'"),
    ("learning_rate = 1e-3", "learning_rate = nan", "optimizer.learning_rate: got nan; allowed a finite number"),
    ("learning_rate = 1e-3", "learning_rate = -1", "optimizer.learning_rate: got -1; allowed a number greater"),
    ("learning_rate = 1e-3", 'learning_rate = 1\nname = "adamz"', "optimizer.name: got 'adamz'; allowed 'adamw', 'a"),
    ("learning_rate = 1e-3", 'learning_rate = 1\nname = "sgd"\nweight_decay = 0.1', "optimizer.weight_decay: got 0.1"),
    ("learning_rate = 1e-3", 'learning_rate = 1\nschedule = "trapezoid"', "optimizer.decay_steps: got 0 with trape"),
    ("learning_rate = 1e-3", "learning_rate = 1\ndecay_steps = 5", "optimizer.decay_steps: got 5 with cosine"),
    ("learning_rate = 1e-3", "learning_rate = 1\noptions = {b3 = 1}", "optimizer.options.b3: got 1; allowed .*b1, b2"),
    ("learning_rate = 1e-3", 'learning_rate = 1\noptions = {b2 = "x"}', "optimizer.options.b2: got 'x'; allowed a num"),
    ("learning_rate = 1e-3", "learning_rate = 1\noptions = {mask = 1}", "optimizer.options.mask: got 1; allowed"),
    ("learning_rate = 1e-3", "learning_rate = 1\noptions = 3", "optimizer.options: got 3; allowed a table"),
    ("batch_size = 8", "batch_size = 8\n[data2]", "data2: got a field that does not exist"),
    ('tasks = ["addition", "sort"]', 'tasks = ["sort"]\ngroup = 0', "data.group: got 0; allowed a number greater"),
    ('tasks = ["addition", "sort"]', 'tasks = ["sort"]\ngiven = 1.5', "data.given: got 1.5; allowed .* or equal to 1"),
    ('tasks = ["addition", "sort"]', "", "data: got neither path nor tasks"),
    ('tasks = ["addition", "sort"]', 'tasks = ["sort"]\npath = "a"', "data: got path and tasks"),
    ('tasks = ["addition", "sort"]', "tasks = [1]", r"data.tasks\[0\]: got 1; allowed a valid string"),
    ("[mesh]\ndata = 2", "[mesh]\ndata = 0", "mesh.data: got 0; allowed a number greater than or equal to 1"),
    ("[mesh]", "[mash]", "mash: got a field that does not exist; .*did you mean mesh"),
    ("[model]", "[model", "got no TOML"),
    ('[model]\nsource = "somewhere"', "model = 3", r"model: got 3; allowed a table; write \[model\]"),
])
def test_wrong_fields_are_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, GOOD.replace(old, new) if not new.startswith("model =") else new + GOOD.replace(old, ""))
    assert str(error.value).startswith(str(tmp_path / "run.toml"))
    assert "\n" not in str(error.value)


def test_resuming_shares_what_decides_the_weights(tmp_path: Path) -> None:
    first = read(tmp_path, GOOD).identity()  # type: ignore[attr-defined]
    same = read(tmp_path, GOOD.replace("steps = 10", "steps = 10\nlog_every = 3\nremat = true"))
    assert same.identity() == first  # type: ignore[attr-defined]
    for change in ("steps = 20", "steps = 10\nseed = 1"):
        assert read(tmp_path, GOOD.replace("steps = 10", change)).identity() != first  # type: ignore[attr-defined]
    constant = GOOD.replace("learning_rate = 1e-3", 'learning_rate = 1e-3\nschedule = "constant"')
    longer = read(tmp_path, constant.replace("steps = 10", "steps = 20"))
    assert longer.identity() == read(tmp_path, constant).identity()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 1 / 6), ("cosine", 0.0670)])
def test_learning_rates(schedule: str, last: float) -> None:
    rate = learning_rate(OptimizerSection(learning_rate=2.0, schedule=schedule, warmup_steps=4), 10)
    np.testing.assert_allclose([float(rate(step)) for step in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    assert float(rate(9)) == pytest.approx(2 * last, rel=1e-2)


def test_a_trapezoid_is_flat_until_its_last_updates() -> None:
    section = OptimizerSection(learning_rate=2.0, schedule="trapezoid", warmup_steps=2, decay_steps=4)
    rate = learning_rate(section, 10)
    np.testing.assert_allclose(
        [float(rate(step)) for step in range(10)], [1.0, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5], rtol=1e-6)


def test_options_reach_the_optimizer() -> None:
    params, gradient = {"matrix": jnp.ones((2, 2))}, {"matrix": jnp.full((2, 2), 0.5)}

    def second_update(**options: float) -> float:
        section = OptimizerSection(
            name="sgd", learning_rate=1.0, schedule="constant", clip_norm=None, options=options)
        optimizer = make_optimizer(section, 10)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return float(optimizer.update(gradient, state, params)[0]["matrix"][0, 0])

    assert second_update() == pytest.approx(-0.5)
    assert second_update(momentum=0.5) == pytest.approx(-0.75)


@pytest.mark.slow
def test_muon_takes_experts_one_by_one_and_projections_whole() -> None:
    config = LladaMoeConfig(**{**CONFIG, "num_kv_heads": 1})
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(init_params(config, jax.random.key(0))[1]))
    section = OptimizerSection(
        name="muon", learning_rate=1.0, schedule="constant", clip_norm=None, options={"ns_steps": 12})
    optimizer = make_optimizer(section, 10, axes=logical_axes(config))
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)

    def spread(matrix: jnp.ndarray) -> float:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        return float(values.max() / values.min())

    layer = updates["layers"][0]
    width = config.hidden_size
    whole = {
        "query": layer["attention"]["query"].reshape(-1, width), "key": layer["attention"]["key"].reshape(-1, width),
        "output": layer["attention"]["output"].reshape(width, -1), "router": layer["moe"]["router"],
        **{f"{name} {index}": layer["moe"][name][index] for name in ("gate", "up", "down") for index in (0, 3)}}
    for name, matrix in whole.items():  # Newton-Schulz brings all singular values near each other
        assert spread(matrix) < 2, name
    for name in ("embed", "head"):  # Adam: every entry moves as far as any other
        np.testing.assert_allclose(np.abs(updates[name]), np.abs(updates[name][0, 0]), rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "adafactor", "muon"])
def test_every_optimizer_descends_and_only_matrices_decay(name: str) -> None:
    optimizer = make_optimizer(OptimizerSection(name=name, learning_rate=0.05, schedule="constant"), 10)
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all((leaf < 0).all() for leaf in updates.values())
    if name in ("adamw", "lion", "muon"):
        decaying = make_optimizer(
            OptimizerSection(name=name, learning_rate=0.05, schedule="constant", weight_decay=0.5), 10)
        decayed, _ = decaying.update(params, decaying.init(params), params)
        np.testing.assert_array_equal(decayed["norm"], updates["norm"])
        assert (decayed["matrix"] < updates["matrix"]).all()
