"""`djax train`: a configuration to a trained model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from djax.api import DiffusionLM, load
from djax.contracts.keys import as_key
from djax.contracts.types import Params
from djax.devices.sharding import make_mesh
from djax.errors import ArgumentError
from djax.models import init_params
from djax.train import TrainConfig, read_config
from djax.train.config import field_names
from djax.train.loop import CHECKPOINTS_NAME
from djax.train.run import make_batches, make_source, train

MODEL_NAME = "model"
"""Directory of the trained model in a run's output."""


def run(path: Path) -> Path:
    """Train as a configuration says, or go on where it stopped; returns the trained model's directory.

    Raises:
        OSError: the configuration or the data cannot be read, or the output cannot be written.
        ValueError: a field, an example or a checkpoint is wrong; one line that names it.
    """
    config = read_config(path)
    try:
        return _run(config)
    except ArgumentError as error:
        raise error.renamed(_in_file(path, error.name)) from error


def _in_file(path: Path, name: str) -> str:
    """The field of the configuration that an argument of the library came from; other names as they are."""
    name = {"task": "data.tasks", "source": "model.source"}.get(name, name)
    sections = [field.name for field in dataclasses.fields(TrainConfig)]
    if name.split(".")[0] in sections:
        return f"{path}: {name}"
    owners = [section for section in sections if f"{section}.{name}" in field_names()]
    return f"{path}: {owners[0]}.{name}" if owners else name


def _run(config: TrainConfig) -> Path:
    from convert import resolve_source
    from convert.checkpoint import save
    from djax import assets

    output = Path(config.training.output)
    output.mkdir(parents=True, exist_ok=True)
    mesh = None if config.mesh is None else make_mesh(dataclasses.asdict(config.mesh))
    source = resolve_source(assets.resolve(config.model.source))
    lm = load(source, mesh=mesh)
    if lm.tokenizer is None or lm.config.mask_id is None:
        raise ArgumentError("model.source", "a checkpoint without a tokenizer or a mask id", allowed="one with both")
    model = lm.config
    batches = make_batches(config, make_source(config, lm.tokenizer), eos_id=model.eos_id)
    trained = train(_start(lm, config), model, config, batches, mesh=mesh)
    dtype = jnp.dtype(model.dtype)
    return save(
        output / MODEL_NAME, jax.tree.map(lambda leaf: leaf.astype(dtype), trained), config=model, overwrite=True,
        text_files=source)


def reached(path: Path) -> str:
    """Say what an interrupted run has kept, and how to go on."""
    directory = Path(read_config(path).training.output) / CHECKPOINTS_NAME
    steps = [int(entry.name) for entry in directory.glob("*") if entry.name.isdecimal()]
    kept = f"a checkpoint of update {max(steps)} is kept" if steps else "no checkpoint was written yet"
    return f"interrupted; {kept} in {directory.parent}; the same command goes on from there"


def _start(lm: DiffusionLM, config: TrainConfig) -> Params:
    """Starting weights of a training; `lm` gives its own up, since nobody needs them beside the master weights."""
    params, lm.params = lm.params, None
    key = as_key(config.training.seed, name="training.seed")
    return init_params(lm.config, key)[1] if config.model.random else params
