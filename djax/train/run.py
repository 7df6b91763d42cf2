"""A configuration, a model and examples to trained weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from djax.contracts.keys import as_key
from djax.contracts.types import Params
from djax.devices.sharding import shardings
from djax.engine.tokenizer import Tokenizer
from djax.errors import ArgumentError
from djax.models import build, logical_axes
from djax.models.config import ModelConfig
from djax.train.block import block_diffusion_loss, with_places
from djax.train.config import TrainConfig, make_optimizer
from djax.train.data import FixedSource, Source, TaskSource, batcher, read_jsonl
from djax.train.loop import Metrics, Schedule, fit
from djax.train.loss import Batch, LossWeights, masked_diffusion_loss
from djax.train.step import Objective, init_state, make_step


def train(
    params: Params, model: ModelConfig, config: TrainConfig, batches: Callable[[int], Batch], *,
    mesh: Mesh | None = None, objective: Objective | None = None,
) -> dict[str, Any]:
    """Train from `params` as a configuration says, or go on where its output stopped.

    Args:
        params: the start, an `nnx.State` or a pure dict. Pass the only reference: where the run is resumed it is
            not needed beside the master weights.
        model: what the parameters belong to; it has a mask id.
        config: the run.
        batches: the batch of update n, as from `batcher`.
        mesh: devices to train on; with an axis "data".
        objective: the loss, as in `make_step`; None is the configuration's.

    Returns:
        The trained parameters, float32, as a pure dict.

    Raises:
        ValueError: the model has no mask id, a checkpoint in the output is damaged or another run's, or training
            diverged.
        OSError: the output cannot be written.
    """
    if model.mask_id is None:
        raise ArgumentError("model.source", "a checkpoint without a mask id", allowed="one that has it")
    training = config.training
    axes = logical_axes(model)
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), pure)
    placed = None if mesh is None else shardings(axes, params, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, training.steps, axes=axes)
    step = make_step(
        nnx.split(build(model))[0], optimizer, mask_id=model.mask_id,
        weights=LossWeights(balance=training.balance, router_z=training.router_z), accumulate=training.accumulate,
        remat=training.remat, vocab_chunk=training.vocab_chunk, compute_dtype=training.compute_dtype or model.dtype,
        objective=objective or (block_diffusion_loss if training.objective == "block" else masked_diffusion_loss))
    batches = _announced(batches, f"training to {training.steps} updates in {Path(training.output)}")
    with _progress(training.steps) as report:
        try:
            state = fit(
                init_state(params, optimizer, shardings=placed), step, _on(mesh, batches),
                as_key(training.seed, name="training.seed"), directory=Path(training.output), keep=training.keep,
                schedule=Schedule(steps=training.steps, log_every=training.log_every, save_every=training.save_every),
                meta=config.identity(), report=report)
        except FloatingPointError as error:
            raise ArgumentError("optimizer.learning_rate", f"{config.optimizer.learning_rate:g}, with which training "
                                f"diverged ({error})", allowed="one that it converges with",
                                advice="lower it, or raise optimizer.warmup_steps") from error
    return state.params


def make_source(config: TrainConfig, tokenizer: Tokenizer) -> Source:
    """The examples of a configuration. Raises OSError or ValueError as they are read."""
    if config.data.path is not None:
        return FixedSource(read_jsonl(Path(config.data.path), tokenizer), config.training.seed)
    return TaskSource(config.data.tasks, tokenizer, config.training.seed)


def make_batches(config: TrainConfig, source: Source, *, eos_id: int) -> Callable[[int], Batch]:
    """The batches of a configuration, of any examples."""
    data, training = config.data, config.training
    batches = batcher(
        source, batch_size=training.batch_size, row_length=data.row_length, eos_id=eos_id,
        longest_tail=data.longest_tail, seed=training.seed, group=data.group, given=data.given)
    return with_places(batches) if training.objective == "block" else batches


def _on(mesh: Mesh | None, batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Batches with their rows split over the data axis."""
    if mesh is None:
        return batches
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return lambda update: jax.device_put(batches(update), rows)


def _announced(batches: Callable[[int], Batch], what: str) -> Callable[[int], Batch]:
    """Pass the batches on. Training begins with the first, which is said where no progress bar shows it."""
    if sys.stderr.isatty():
        return batches
    begun = False

    def made(update: int) -> Batch:
        nonlocal begun
        batch = batches(update)  # a wrong example is an error, and nothing was announced
        if not begun:
            print(f"{what}; the first one compiles", file=sys.stderr, flush=True)
            begun = True
        return batch

    return made


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, Metrics], None]]:
    """A progress bar on standard error, or a line for each report where that is no terminal."""
    def line(metrics: Metrics) -> str:
        return f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s"

    if not sys.stderr.isatty():
        yield lambda done, metrics: print(f"{done}/{steps}: {line(metrics)}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda done, metrics: bar.update(task, completed=done, description=line(metrics))
