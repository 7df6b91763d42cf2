"""A run's configuration: what it reads, and one line for every wrong field."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from djax.train.config import OptimizerSection, learning_rate, make_optimizer, read_config

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
    ("steps = 10", "", "training.steps: got nothing; allowed an integer; add it"),
    ("steps = 10", "stepz = 10", "training.stepz: got a field that does not exist; .*did you mean steps"),
    ("steps = 10", "steps = 1.5", "training.steps: got 1.5; allowed an integer"),
    ("steps = 10", "steps = true", "training.steps: got True; allowed an integer"),
    ("steps = 10", "steps = 0", "training.steps: got 0; allowed at least 1"),
    ("steps = 10", "steps = 10\naccumulate = 3", "training.accumulate: got 3; allowed a divisor of batch_size = 8"),
    ("steps = 10", 'steps = 10\ncompute_dtype = "int8"', "training.compute_dtype: got 'int8'; allowed bfloat16"),
    ("learning_rate = 1e-3", "learning_rate = nan", "optimizer.learning_rate: got nan"),
    ("learning_rate = 1e-3", "learning_rate = -1", "optimizer.learning_rate: got -1.0; allowed at least 0"),
    ("learning_rate = 1e-3", 'learning_rate = 1\nname = "adamz"', "optimizer.name: got 'adamz'; allowed adamw"),
    ("learning_rate = 1e-3", 'learning_rate = 1\nname = "sgd"\nweight_decay = 0.1', "optimizer.weight_decay: got 0.1"),
    ('tasks = ["addition", "sort"]', "", "data: got neither path nor tasks"),
    ('tasks = ["addition", "sort"]', 'tasks = ["sort"]\npath = "a"', "data: got path and tasks"),
    ('tasks = ["addition", "sort"]', "tasks = [1]", r"data.tasks: got \[1\]; allowed a list of texts"),
    ("[mesh]\ndata = 2", "[mesh]\ndata = 0", "mesh.data: got 0; allowed at least 1"),
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


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "adafactor"])
def test_every_optimizer_descends_and_only_matrices_decay(name: str) -> None:
    optimizer = make_optimizer(OptimizerSection(name=name, learning_rate=0.05, schedule="constant"), 10)
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all((leaf < 0).all() for leaf in updates.values())
    if name in ("adamw", "lion"):
        decaying = make_optimizer(
            OptimizerSection(name=name, learning_rate=0.05, schedule="constant", weight_decay=0.5), 10)
        decayed, _ = decaying.update(params, decaying.init(params), params)
        np.testing.assert_array_equal(decayed["norm"], updates["norm"])
        assert (decayed["matrix"] < updates["matrix"]).all()
