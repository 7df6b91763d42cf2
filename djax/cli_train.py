"""`djax train`: a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from djax.api import DiffusionLM, load
from djax.models import init_params, logical_axes
from djax.sharding import shardings
from djax.text import Tokenizer
from djax.train import LossWeights, Schedule, TrainConfig, fit, init_state, make_optimizer, make_step, read_config
from djax.train.config import MeshSection
from djax.train.data import FixedSource, Source, TaskSource, batcher, read_jsonl
from djax.train.loop import Metrics
from djax.train.loss import Batch

MODEL_NAME = "model"
"""Where in a run's output the trained model is."""


def run(path: Path) -> Path:
    """Train as a configuration says, or go on where it stopped; returns the trained model's directory.

    Raises:
        OSError: the configuration or the data cannot be read, or the output cannot be written.
        ValueError: a field, an example or a checkpoint is wrong; one line that names it.
    """
    from convert import resolve_source
    from convert.checkpoint import save
    from djax import assets

    config = read_config(path)
    output = Path(config.training.output)
    output.mkdir(parents=True, exist_ok=True)
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    source = resolve_source(assets.path() if config.model.source is None else config.model.source)
    lm = load(source, mesh=mesh)
    if lm.tokenizer is None or lm.config.mask_id is None:
        raise ValueError("model.source: got a checkpoint without a tokenizer or a mask id; allowed one with both")
    trained = train(lm, config, mesh=mesh, tokenizer=lm.tokenizer)
    dtype = jnp.dtype(lm.config.dtype)
    return save(
        output / MODEL_NAME, jax.tree.map(lambda leaf: leaf.astype(dtype), trained), config=lm.config, overwrite=True,
        text_files=source)


def train(lm: DiffusionLM, config: TrainConfig, *, mesh: Mesh | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The trained parameters, float32, as a pure dict."""
    training = config.training
    params = init_params(lm.config, jax.random.key(training.seed))[1] if config.model.random else lm.params
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.to_pure_dict(params))
    placed = None if mesh is None else shardings(logical_axes(lm.config), params, mesh=mesh)
    lm.params = None  # the weights it came with are not needed beside the master weights
    optimizer = make_optimizer(config.optimizer, training.steps)
    step = make_step(
        lm.denoiser.graphdef, optimizer, mask_id=lm.config.mask_id or 0,
        weights=LossWeights(balance=training.balance, router_z=training.router_z), accumulate=training.accumulate,
        remat=training.remat, vocab_chunk=training.vocab_chunk,
        compute_dtype=training.compute_dtype or lm.config.dtype)
    batches = batcher(
        make_source(config, tokenizer), batch_size=training.batch_size, row_length=config.data.row_length,
        eos_id=lm.config.eos_id, longest_tail=config.data.longest_tail, seed=training.seed)
    with _progress(training.steps) as report:
        try:
            state = fit(
                init_state(params, optimizer, shardings=placed), step, _on(mesh, batches),
                jax.random.key(training.seed), directory=Path(training.output), keep=training.keep,
                schedule=Schedule(steps=training.steps, log_every=training.log_every, save_every=training.save_every),
                meta=config.identity(), report=report)
        except FloatingPointError as error:
            raise ValueError(f"optimizer.learning_rate: {error}") from error
    return state.params


def make_mesh(section: MeshSection) -> Mesh:
    """The mesh of a configuration. Raises ValueError if there are too few devices."""
    sizes = dataclasses.asdict(section)
    needed = section.data * section.expert * section.tensor
    if needed > jax.device_count():
        raise ValueError(f"mesh: got {sizes}, {needed} devices; allowed {jax.device_count()} here; use fewer")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[:needed])


def make_source(config: TrainConfig, tokenizer: Tokenizer) -> Source:
    """The examples of a configuration. Raises OSError or ValueError as they are read."""
    if config.data.path is not None:
        return FixedSource(read_jsonl(Path(config.data.path), tokenizer), config.training.seed)
    return TaskSource(config.data.tasks, tokenizer, config.training.seed)


def _on(mesh: Mesh | None, batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Batches with their rows split over the data axis."""
    if mesh is None:
        return batches
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return lambda update: jax.device_put(batches(update), rows)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, Metrics], None]]:
    """A progress bar on standard error, or a line for each report where that is no terminal."""
    def line(metrics: Metrics) -> str:
        return f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s"

    if not sys.stderr.isatty():
        yield lambda done, metrics: print(f"{done}/{steps}: {line(metrics)}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda done, metrics: bar.update(task, completed=done, description=line(metrics))
