"""A run is the same run however it is cut, placed or interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from djax.models import init_params
from djax.models.config import LladaMoeConfig
from djax.train import Batch, Checkpoints, Schedule, TrainState, fit, init_state, make_step, masked_diffusion_loss
from tests.support.drivers.train_run import CONFIG, digest, run

ROOT = Path(__file__).parents[2]
STEPS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run, and the digest of its weights."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, digest(run(directory, STEPS).params)


def metrics(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def start(directory: Path | str, *, steps: int = STEPS, devices: int = 1, limit: int = 0,
          objective: str = "masked") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.drivers.train_run", str(directory), str(steps), str(devices), str(limit),
         objective],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"})  # the same XLA_FLAGS: bits depend on the optimiser


@pytest.mark.slow
def test_a_run_cut_anywhere_and_resumed_gives_the_same_weights(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Cut after update 3 is logged and before it is saved, so that it is done again."""
    def cut(done: int, _: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, STEPS, report=cut)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves of a line
    assert digest(run(tmp_path, STEPS).params) == whole[1]
    assert metrics(tmp_path) == metrics(whole[0])


@pytest.mark.slow
def test_a_finished_run_does_nothing(whole: tuple[Path, str]) -> None:
    def refuse(done: int, _: Any) -> None:
        raise AssertionError(f"update {done} ran again")

    assert digest(run(whole[0], STEPS, report=refuse).params) == whole[1]


@pytest.mark.slow
def test_training_learns() -> None:
    losses: list[float] = []
    run(None, 60, report=lambda _, metrics: losses.append(metrics["diffusion"]))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["masked", "block"])
def test_one_and_eight_devices_have_the_same_loss_curve(objective: str) -> None:
    """Data parallel over four, experts over two; in processes of their own, where devices can be chosen."""
    runs = [start("-", devices=devices, objective=objective) for devices in (1, 8)]
    results = []
    for process in runs:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        results.append(json.loads(output.splitlines()[-1]))
    assert [result["devices"] for result in results] == [1, 8]
    np.testing.assert_allclose(results[1]["losses"], results[0]["losses"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_accumulation_is_the_mean_of_interleaved_microbatches() -> None:
    config = LladaMoeConfig(**CONFIG)
    graphdef, params = init_params(config, jax.random.key(0))
    params, optimizer = nnx.to_pure_dict(params), optax.sgd(1.0)
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(1, 63, (4, 10)), jnp.int32)
    batch = Batch(tokens=tokens, is_answer=jnp.arange(10)[None] >= jnp.asarray([[2], [3], [4], [5]]),
                  valid=jnp.ones((4, 10), bool))
    step = jax.jit(make_step(graphdef, optimizer, mask_id=63, accumulate=2))
    new, report = step(init_state(params, optimizer), batch, jax.random.key(7))
    key = jax.random.fold_in(jax.random.key(7), 0)
    gradient = jax.jit(jax.grad(
        lambda params, batch, key: masked_diffusion_loss(graphdef, params, batch, key, mask_id=63), has_aux=True))
    parts = [gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i::2], batch), jax.random.fold_in(key, i))
             for i in range(2)]
    expected = jax.tree.map(lambda old, a, b: old - (a + b) / 2, params, parts[0][0], parts[1][0])
    for got, wanted in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6)
    assert float(report.losses.total) == pytest.approx(float(parts[0][1].total + parts[1][1].total) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="accumulate: got 3; allowed a divisor of the batch's 4 rows"):
        make_step(graphdef, optimizer, mask_id=63, accumulate=3)(new, batch, key)


@pytest.mark.slow
def test_half_precision_keeps_master_weights() -> None:
    config = LladaMoeConfig(**CONFIG)
    graphdef, params = init_params(config, jax.random.key(0))
    params, optimizer = nnx.to_pure_dict(params), optax.adam(1e-5)
    batch = Batch(tokens=jnp.ones((2, 8), jnp.int32), is_answer=jnp.ones((2, 8), bool), valid=jnp.ones((2, 8), bool))
    step = make_step(graphdef, optimizer, mask_id=63, compute_dtype="bfloat16", remat=True)
    new, _ = jax.jit(step)(init_state(params, optimizer), batch, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, params)
    # an update of 1e-5 is lost in bfloat16 weights near 1
    assert all(0 < leaf < 2e-5 for leaf in jax.tree.leaves(moved)), moved
    assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_another_configuration_is_refused(whole: tuple[Path, str]) -> None:
    def step(state: TrainState, batch: Batch, key: Any) -> Any:
        raise AssertionError("trained")

    checkpoints = Checkpoints(whole[0] / "checkpoints")
    restored = checkpoints.restore(run_state())
    checkpoints.close()
    assert restored is not None
    assert int(restored[0].step) == STEPS
    with pytest.raises(ValueError, match=r"model: got None; allowed \{.*, with which the run in this directory"):
        fit(run_state(), step, lambda _: None, jax.random.key(0), schedule=Schedule(steps=9),  # type: ignore[arg-type]
            directory=whole[0])


def run_state() -> TrainState:
    """A state of the driver's shape, all zeros."""
    params = nnx.to_pure_dict(init_params(LladaMoeConfig(**CONFIG), jax.random.key(0))[1])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    return jax.tree.map(jnp.zeros_like, init_state(params, optimizer))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line(whole: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    for file in sorted(newest.rglob("*")):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{STEPS}: got a checkpoint that cannot be restored.*go on from step 4") as e:
        run(tmp_path / "run", STEPS)
    assert "\n" not in str(e.value)
    shutil.rmtree(newest)
    assert digest(run(tmp_path / "run", STEPS).params) == whole[1]


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before_it(whole: tuple[Path, str], tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk, from the second update on."""
    process = start(tmp_path, limit=2000)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    line = output.splitlines()[-1]
    assert line.startswith("OSError: ")
    assert "got a checkpoint that cannot be written" in line
    assert (tmp_path / "checkpoints" / "1").is_dir()
    assert digest(run(tmp_path, STEPS).params) == whole[1]


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run", 1)


def test_infinite_losses_stop_the_run(tmp_path: Path) -> None:
    optimizer = optax.sgd(1e30)
    graphdef, params = init_params(LladaMoeConfig(**CONFIG), jax.random.key(0))
    batch = Batch(tokens=jnp.ones((2, 8), jnp.int32), is_answer=jnp.ones((2, 8), bool), valid=jnp.ones((2, 8), bool))
    with pytest.raises(FloatingPointError, match=r"got .* at update .* lower the learning rate"):
        fit(init_state(nnx.to_pure_dict(params), optimizer), make_step(graphdef, optimizer, mask_id=63),
            lambda _: batch, jax.random.key(0), directory=tmp_path,
            schedule=Schedule(steps=20, log_every=1, save_every=1))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    restored = checkpoints.restore(init_state(nnx.to_pure_dict(params), optimizer))
    assert restored is None or all(np.isfinite(jax.device_get(leaf)).all() for leaf in jax.tree.leaves(restored[0]))
    checkpoints.close()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Killed six times, each in its own sixth of the moment after the first new update."""
    rng = random.Random(11)
    for kill in rng.sample(range(6), 6):
        process = start(tmp_path)
        assert process.stdout is not None
        if not process.stdout.readline().startswith("update"):
            break  # all are done
        time.sleep((kill + rng.random()) * 0.2 / 6)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    final, errors = start(tmp_path).communicate(timeout=300)
    assert json.loads(final.splitlines()[-1])["digest"] == whole[1], errors[-2000:]
