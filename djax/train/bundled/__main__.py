"""Rebuild the bundled checkpoints: `python -m djax.train.bundled DIRECTORY [--install]`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track

from convert import export, read_config
from djax import assets, tasks
from djax.api import DiffusionLM, load
from djax.engine.tokenizer import Tokenizer
from djax.models import init_params
from djax.models.config import ModelConfig
from djax.train.bundled import recipe
from djax.train.bundled.tokenizer import write_tokenizer
from djax.train.run import train
from djax.train.trajectory import Trajectories, compression_loss, concatenate, kept, trajectory_batches

_ROWS = 64
"""Prompts decoded together."""


def train_base(output: Path, *, stages: Sequence[recipe.Stage] = recipe.STAGES) -> Path:
    """Train the model from nothing, or go on where the directory stopped; `output/base`.

    Args:
        output: the build's directory.
        stages: the training; shorter ones give no model.

    Raises:
        OSError: something cannot be written.
        ValueError: as `djax.train.run.train`.
    """
    text = output / "text"
    text.mkdir(parents=True, exist_ok=True)
    recipe.write_config(text)
    write_tokenizer(text)
    model, tokenizer = read_config(text), Tokenizer.load(text)
    params: Any = init_params(model, jax.random.key(recipe.SEED))[1]
    for number, stage in enumerate(stages, start=1):
        config = recipe.stage_config(stage, number, output / "runs" / "base")
        params = train(params, model, config, recipe.stage_batches(stage, config, tokenizer, eos_id=model.eos_id))
    return _write(output / "base", params, model, text)


def is_right(example: tasks.Example, answer: str) -> bool:
    """The tasks' own verdict."""
    return tasks.TASKS[example.task].verify(example.prompt, answer)


def compress(
    output: Path, *, prompts: int | None = None, steps: int | None = None,
    accept: Callable[[tasks.Example, str], bool] = is_right,
) -> Path:
    """Sample the trajectories of `output/base`, unless they are there, and train on them; `output/compressed`.

    Args:
        output: the build's directory.
        prompts: prompts to decode; None is the recipe's.
        steps: updates; None is the recipe's.
        accept: which answers' trajectories are kept.

    Raises:
        OSError: something cannot be read or written.
        ValueError: as `djax.train.run.train`, or too few answers are accepted.
    """
    path = output / "trajectories.npz"
    lm = load(output / "base", dtype="float32")
    if not path.exists():
        _sample_to(path, lm, recipe.TRAJECTORIES if prompts is None else prompts, accept)
    config = recipe.compression_config(output / "runs" / "compressed", **({} if steps is None else {"steps": steps}))
    batches = trajectory_batches(
        Trajectories.load(path), batch_size=config.training.batch_size, seed=config.training.seed)
    compressed = train(lm.params, lm.config, config, batches, objective=compression_loss)
    return _write(output / "compressed", compressed, read_config(output / "base"), output / "base")


def sample(
    lm: DiffusionLM, prompts: int, *, seed: int, accept: Callable[[tasks.Example, str], bool] = is_right
) -> Iterator[Trajectories]:
    """Trajectories of the tasks' training prompts, the tasks in turn, whose answers are accepted; batch by batch."""
    stream = tasks.examples(None, split="train", seed=seed)
    for start in range(0, prompts, _ROWS):
        examples = list(itertools.islice(stream, min(_ROWS, prompts - start)))
        generation = lm.generate(
            [example.messages for example in examples], recipe=recipe.sampling_recipe(),
            max_new_tokens=recipe.ANSWER_LENGTH, block_length=recipe.BLOCK_LENGTH)
        yield kept(generation, [
            accept(example, answer) for example, answer in zip(examples, generation.text or (), strict=True)])


def _sample_to(
    path: Path, lm: DiffusionLM, prompts: int, accept: Callable[[tasks.Example, str], bool]
) -> None:
    found = concatenate(list(track(
        sample(lm, prompts, seed=recipe.SEED - 2, accept=accept), total=-(-prompts // _ROWS),
        description="trajectories", console=Console(stderr=True))))
    print(f"trajectories: {len(found)} of {prompts} answers accepted", file=sys.stderr)
    found.save(path)


def _write(directory: Path, params: Any, model: ModelConfig, text: Path) -> Path:
    dtype = jnp.dtype(model.dtype)
    return export(directory, jax.tree.map(lambda leaf: leaf.astype(dtype), params), config=model, text_files=text,
                  overwrite=True)


def main(
    directory: Annotated[Path, typer.Argument(help="Where the build is; one that was stopped goes on there.")],
    install: Annotated[bool, typer.Option(help="Put the result into djax/assets.")] = False,
) -> None:
    """Rebuild the model bundled with djax, and its compressed form."""
    try:
        train_base(directory)
        compress(directory)
        if install:
            for name in assets.NAMES:
                assets.path(name).mkdir(exist_ok=True)
                for file in (directory / name).iterdir():
                    (assets.path(name) / file.name).write_bytes(file.read_bytes())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
