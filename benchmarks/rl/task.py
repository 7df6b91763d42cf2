"""The task of both trainers of `benchmarks.rl`: the weakened model, the prompts, the rewards, the log of a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import djax
from djax import recipes, tasks
from djax.contracts.types import Params
from djax.recipes import Recipe
from djax.rl import Rollout, rollout

TRAINERS, PLACEMENTS = ("optax", "tunix"), ("colocated", "disjoint")
TUNIX_METHODS = ("trace", "diffu")
"""Learners of Tunix: `TraceGRPOLearner`, and the unmodified `GRPOLearner`, whose prompts are not masked."""
EVALUATION_KEY, NOISE_KEY = 2**31 - 1, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A run, but for who trains and where."""

    task: str = "record"
    method: str = "trace"
    noise: float = 1.2
    """Standard deviation of the noise on the output matrix, in that of the matrix's own entries."""
    updates: int = 40
    prompts: int = 8
    """Prompts an update."""
    samples: int = 8
    """Completions of each prompt."""
    steps: int = 4
    """Denoising steps of a completion: with fewer, more tokens are drawn at once, and the answer is harder to get."""
    length: int = 64
    """Positions generated, one block."""
    learning_rate: float = 1e-4
    clip_norm: float = 1.0
    held_out: int = 128
    """Prompts that the policy is measured on, never trained on."""
    evaluate_every: int = 5
    seed: int = 0

    def recipe(self) -> Recipe:
        """A fixed number of steps, most confident first, no cache: what `trace_states` replays exactly."""
        return recipes.llada(steps_per_block=self.steps)


def meshes(placement: str, devices: int) -> tuple[Mesh, Mesh]:
    """The trainer's mesh and that of the rollouts: the same devices, or half of them each.

    Raises:
        ValueError: there are too few.
    """
    found = jax.devices()
    if devices > len(found) or (placement == "disjoint" and (devices < 2 or devices % 2)):
        raise ValueError(f"devices: got {devices} with {placement}; allowed up to {len(found)} here, an even "
                         "number for disjoint halves")

    def mesh(some: Sequence[jax.Device]) -> Mesh:
        return jax.make_mesh((len(some),), ("data",), devices=some, axis_types=(AxisType.Auto,))

    if placement == "colocated":
        both = mesh(found[:devices])
        return both, both
    return mesh(found[: devices // 2]), mesh(found[devices // 2 : devices])


def weakened(params: Params, noise: float) -> dict[str, Any]:
    """A pure dict of the weights with noise on the output matrix: always the same, so every run starts alike."""
    pure = dict(nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params)
    head = np.asarray(pure["head"])
    drawn = np.random.default_rng(NOISE_KEY).normal(size=head.shape).astype(np.float32)
    return pure | {"head": jnp.asarray(head + noise * head.std() * drawn)}


def load(settings: Settings, mesh: Mesh) -> djax.DiffusionLM:
    """The bundled model in float32, weakened, on the mesh of the rollouts."""
    lm = djax.load(dtype="float32", mesh=mesh)
    lm.update_params(weakened(lm.params, settings.noise))
    return lm


class Prompts:
    """Training prompts by update, and the held-out ones."""

    def __init__(self, settings: Settings, lm: djax.DiffusionLM) -> None:
        self._settings, self._tokenizer = settings, lm.tokenizer
        self.held_out = tasks.held_out_set(settings.task, settings.held_out)

    def of(self, update: int) -> list[tasks.Example]:
        """The examples of an update, from its number alone."""
        count = self._settings.prompts
        stream = tasks.examples(self._settings.task, split="train", seed=self._settings.seed, start=update * count)
        return list(itertools.islice(stream, count))

    def text(self, example: tasks.Example) -> str:
        """A prompt as the model reads it."""
        return self._tokenizer.chat_text(example.messages)


def rewards(examples: Sequence[tasks.Example], texts: Sequence[str]) -> np.ndarray:
    """1 for the whole worked answer, to the letter; else 0."""
    return np.asarray([tasks.TASKS[example.task].verify(example.prompt, text)
                       for example, text in zip(examples, texts, strict=True)], np.float32)


def texts(lm: djax.DiffusionLM, got: Rollout) -> list[str]:
    """The completions without EOS."""
    return [lm.tokenizer.decode(row[row != lm.config.eos_id]) for row in got.completions()]


def evaluate(lm: djax.DiffusionLM, settings: Settings, prompts: Prompts) -> dict[str, float]:
    """Mean reward on the held-out prompts: of one sample each, as in training, and of the greedy answer."""
    found = {}
    for name, temperature in (("held_out", 1.0), ("greedy", 0.0)):
        got = rollout(lm, [example.messages for example in prompts.held_out], key=EVALUATION_KEY,
                      recipe=settings.recipe(), max_new_tokens=settings.length, block_length=settings.length,
                      temperature=temperature)
        found[name] = float(rewards(prompts.held_out, texts(lm, got)).mean())
    return found


def differences(one: Params, other: Params) -> int:
    """How many parameters of the rollout model are not those of the trainer, bit by bit."""
    mine, theirs = (jax.device_get(jax.tree.leaves(tree)) for tree in (one, other))
    return sum(not np.array_equal(left, right) for left, right in zip(mine, theirs, strict=True))


def distance(one: Params, other: Params) -> float:
    """Euclidean distance of all parameters."""
    mine, theirs = (jax.device_get(jax.tree.leaves(tree)) for tree in (one, other))
    return math.sqrt(sum(float(((left - right) ** 2).sum()) for left, right in zip(mine, theirs, strict=True)))


class Compilations:
    """Counts every program that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _: float, **__: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Run:
    """The log of a run: a line of metrics an update, a progress bar, and what must hold after every sync.

    The file has its name when the run is over; until then, and for good if it fails, it ends in .partial.
    """

    def __init__(self, path: Path, settings: Settings, *, title: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._partial, self._settings = path, path.with_name(path.name + ".partial"), settings
        self._file = self._partial.open("w", encoding="utf-8")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[said]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(title, total=settings.updates, said="")
        self._started, self._compilations, self._settled = time.perf_counter(), Compilations(), None
        self._start: Params | None = None
        self.records: list[dict[str, Any]] = []
        self.checked: set[int] = set()
        """Updates after which the rollouts' weights were found to be the trainer's."""

    def __enter__(self) -> Run:
        self._bar.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._bar.stop()
        self._file.close()
        if failed is None:
            os.replace(self._partial, self._path)

    def due(self, update: int) -> bool:
        """Whether the policy is measured after so many updates."""
        return update % self._settings.evaluate_every == 0 or update == self._settings.updates

    def check(self, update: int, used: Params, *, params: Params) -> None:
        """Compare the weights of the rollouts after `update` updates with the trainer's.

        Raises:
            RuntimeError: they differ.
        """
        unequal = differences(used, params)
        if unequal:
            raise RuntimeError(f"update {update}: {unequal} parameters of trainer and rollouts differ after the sync")
        self.checked.add(update)

    def add(self, update: int, metrics: dict[str, Any], *, lm: djax.DiffusionLM, params: Params) -> None:
        """Log what is known after `update` updates: `params` are the trainer's.

        Raises:
            RuntimeError: a program of the rollout model was compiled again after the first two updates.
        """
        if self._start is None:
            self._start = jax.tree.map(np.array, params)  # copies: trainers donate theirs
        if update == 2:
            self._settled = lm.compile_count
        if self._settled is not None and lm.compile_count != self._settled:
            raise RuntimeError(f"update {update}: the rollout model has compiled {lm.compile_count} programs, "
                               f"{self._settled} after two updates")
        record = {"update": update, **metrics, "distance": distance(params, self._start),
                  "rollout_programs": lm.compile_count, "compilations": self._compilations.count,
                  "seconds": time.perf_counter() - self._started}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        known = next((one for one in reversed(self.records) if "held_out" in one), None)
        said = f"held-out reward {known['held_out']:.2f}" if known else ""
        self._bar.update(self._task, completed=update, said=said)
        if not sys.stderr.isatty():
            print(f"{update}/{self._settings.updates}: {said}, reward {metrics.get('reward', float('nan')):.2f}",
                  file=sys.stderr)


def batches(settings: Settings, prompts: Prompts) -> Iterator[tuple[int, list[tasks.Example]]]:
    """Every update's number and examples."""
    return ((update, prompts.of(update)) for update in range(settings.updates))


Trainer = Callable[[Settings, Run, Mesh, Mesh], None]
