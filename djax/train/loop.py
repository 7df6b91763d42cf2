"""The loop around the step: resume, log, save. Interrupted and resumed, a run gives the weights it would have given."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from djax.contracts.ambient import without_mesh
from djax.contracts.keys import as_key
from djax.contracts.types import Params
from djax.errors import ArgumentError, check_integer, shown
from djax.train.checkpoints import Checkpoints
from djax.train.loss import Batch
from djax.train.step import Report, Step, TrainState

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
Metrics = dict[str, float]
_SILENCE = 10.0
"""Seconds after which an update is reported though it is not logged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a run, and how often it reports. Counts are updates."""

    steps: int
    log_every: int = 10
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every"):
            check_integer(name, getattr(self, name), 1)

    def saves(self, done: int) -> bool:
        """Whether the state is saved after `done` updates."""
        return done % self.save_every == 0 or done == self.steps

    def logs(self, done: int) -> bool:
        """Whether metrics are due after `done` updates: what is saved is looked at first."""
        return done % self.log_every == 0 or self.saves(done)


@without_mesh()
def fit(
    state: TrainState,
    step: Step,
    batches: Callable[[int], Batch],
    key: int | Key[Array, ""],
    *,
    schedule: Schedule,
    directory: Path | None = None,
    keep: int = 2,
    meta: Mapping[str, Any] | None = None,
    report: Callable[[int, Metrics], None] | None = None,
) -> TrainState:
    """Train until `schedule.steps` updates are done, from the newest checkpoint in `directory` if there is one.

    Args:
        state: the start; donated.
        step: from `make_step`, not jitted.
        batches: the batch of update n, from n alone; this is what makes a resumed run the same run.
        key: seed or `jax.random` key of the noise.
        schedule: lengths and intervals.
        directory: for `checkpoints/` and `metrics.jsonl`; None keeps nothing.
        keep: checkpoints that stay.
        meta: JSON values that a resumed run has to share, such as its configuration.
        report: called with the number of updates done and the metrics, at every logged update, at the first one, and
            at least every ten seconds (or at every update, where one takes longer).

    Returns:
        The state after the last update.

    Raises:
        ValueError: the newest checkpoint is damaged or belongs to another configuration.
        FloatingPointError: the loss, the gradient or the weights are no longer finite; such weights are never saved.
        OSError: something cannot be written; earlier checkpoints are whole.
    """
    meta = dict(meta or {})
    checkpoints = None if directory is None else Checkpoints(directory / CHECKPOINTS_NAME, keep=keep)
    try:
        if checkpoints is not None:
            state = _resume(checkpoints, state, meta)
        run = jax.jit(step, donate_argnums=0)
        with _log(directory, upto=int(state.step)) as log:
            for done, latest, metrics in _updates(run, state, batches, as_key(key), schedule):
                state = latest
                if metrics is not None:
                    # lines between are for whoever watches: a resumed run's file is that of one that was not
                    if log is not None and schedule.logs(done):
                        log.write(json.dumps({"step": done, **metrics}) + "\n")
                        log.flush()
                    if report is not None:
                        report(done, metrics)
                if checkpoints is not None and schedule.saves(done):
                    if not _all_finite(state.params):
                        raise FloatingPointError(_not_finite("weights", "NaN or infinity", done))
                    checkpoints.save(state, meta)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return state


def _updates(
    run: Step, state: TrainState, batches: Callable[[int], Batch], key: Key[Array, ""], schedule: Schedule
) -> Iterator[tuple[int, TrainState, Metrics | None]]:
    """Every update's number and state, with metrics where they are due or nothing was heard for a while."""
    since, tokens = time.perf_counter(), jnp.int32(0)
    begun, heard = int(state.step), since
    for index in range(begun, schedule.steps):
        batch = batches(index)
        tokens += batch.valid.sum(dtype=jnp.int32)  # fetched with the metrics: here it would wait for every update
        state, told = run(state, batch, key)
        done, metrics = index + 1, None
        if schedule.logs(done) or index == begun or time.perf_counter() - heard > _SILENCE:
            metrics = _metrics(told)
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    raise FloatingPointError(_not_finite(name, metrics[name], done))
            now = time.perf_counter()
            metrics["tokens_per_second"] = int(tokens) / (now - since)
            heard = now
            if schedule.logs(done):
                since, tokens = now, jnp.int32(0)
        yield done, state, metrics


@jax.jit
def _all_finite(params: Params) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _not_finite(name: str, got: object, done: int) -> str:
    return (f"{name}: got {got} at update {done}; it must be finite; lower the learning rate, or clip the "
            "gradients' norm")


def _metrics(report: Report) -> Metrics:
    got = jax.device_get(report)
    return {
        "loss": float(got.losses.total), "diffusion": float(got.losses.diffusion),
        "balance": float(got.losses.balance), "router_z": float(got.losses.router_z),
        "grad_norm": float(got.grad_norm)}


def _resume(checkpoints: Checkpoints, state: TrainState, meta: Mapping[str, Any]) -> TrainState:
    restored = checkpoints.restore(state)
    if restored is None:
        return state
    found, before = restored
    now = json.loads(json.dumps(meta))
    for name in sorted({*now, *before}):
        if now.get(name) != before.get(name):
            raise ArgumentError(
                name, shown(now.get(name)), allowed=f"{shown(before.get(name))}, with which the run in this directory "
                "was started", advice="use that, or another directory")
    return found


@contextmanager
def _log(directory: Path | None, *, upto: int) -> Iterator[TextIO | None]:
    """The metrics' file, without the lines of updates that a killed run did and did not save."""
    if directory is None:
        yield None
        return
    path = directory / METRICS_NAME
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                if json.loads(line)["step"] <= upto:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)
    with path.open("a", encoding="utf-8") as file:
        yield file
