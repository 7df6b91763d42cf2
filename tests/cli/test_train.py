"""`djax train` from a configuration to a model that loads."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

import djax
from convert import save
from djax import assets
from djax.cli.app import app
from djax.models import init_params

RUN = """
[data]
tasks = ["addition"]
row_length = 128
longest_tail = 4
[optimizer]
learning_rate = 1e-3
schedule = "constant"
[training]
output = "out"
steps = 2
batch_size = 2
log_every = 1
save_every = 1
"""


def tiny_checkpoint(directory: Path) -> Path:
    """The bundled tokenizer, and one narrow layer."""
    config = dataclasses.replace(
        djax.load().config, num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, num_experts=2,
        experts_per_token=1, expert_size=4)
    return save(directory, init_params(config, jax.random.key(0))[1], config=config, text_files=assets.path())


def train(path: Path, text: str) -> Result:
    path.write_text(text)
    return CliRunner().invoke(app, ["train", str(path)])


@pytest.mark.parametrize(("objective", "bundled"), [
    pytest.param("block", False, marks=pytest.mark.slow), pytest.param("masked", True, marks=pytest.mark.slow)])
def test_a_run_gives_a_model_and_goes_on(objective: str, bundled: bool, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    run = RUN + f'objective = "{objective}"\n'
    if not bundled:
        run += f'[model]\nsource = "{tiny_checkpoint(tmp_path / "tiny")}"\n'
    done = train(config, run)
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "model") in done.output
    assert "2/2: loss" in done.output
    lm = djax.load(tmp_path / "out" / "model")
    assert lm.config.dtype == "bfloat16"
    assert len(lm.generate("Add 12 and 30.", max_new_tokens=4, block_length=4).tokens) == 1
    longer = train(config, run.replace("steps = 2", "steps = 3"))
    assert longer.exit_code == 0, longer.output
    lines = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]


@pytest.mark.parametrize(("old", "new", "message"), [
    ('tasks = ["addition"]', 'path = "nowhere.jsonl"', "nowhere.jsonl: got an error from the system"),
    ('tasks = ["addition"]', 'tasks = ["cooking"]', "run.toml: data.tasks: got 'cooking'"),
    ("row_length = 128", "row_length = 16", "run.toml: data.row_length: got 16; allowed what example 0"),
    ('output = "out"', 'output = "run.toml/out"', "run.toml"),
    ("[data]", "[mesh]\ndata = 64\n[data]", "run.toml: mesh: got .* 64 devices"),
    ("[data]", '[model]\nsource = "absent"\n[data]', "absent"),
    ("steps = 2", "stepz = 2", "training.stepz: got a field that does not exist"),
])
def test_wrong_input_is_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    failed = train(tmp_path / "run.toml", RUN.replace(old, new))
    assert failed.exit_code == 2, failed.output
    lines = failed.output.strip().splitlines()
    assert len(lines) == 1, failed.output
    assert lines[0].startswith("djax: ")
    assert re.search(message, lines[0]), lines[0]


def test_a_missing_configuration(tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["train", str(tmp_path / "no.toml")])
    assert failed.exit_code == 2
    assert "no.toml: got an error from the system" in failed.output
