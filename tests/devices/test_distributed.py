"""Several processes: the tokens of one device, each its part of the weights, and no wait without an end."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from djax import distributed, recipes
from djax.devices.sharding import named_leaves
from tests.conftest import GOLDENS
from tests.support import builders, golden
from tests.support.drivers import distributed as driver

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 90
"""For a process to notice that another is gone: the driver's heartbeat and shutdown timeouts, and some more."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def start_both(task: str, directory: Path) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    return [start(["-m", "tests.support.drivers.distributed", port, str(process), "2", task, str(directory)])
            for process in (0, 1)]


def finish_both(running: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    results = []
    for process in running:
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def both(place: Path) -> list[dict[str, Any]]:
    """What the two processes of the driver's `whole` task report."""
    return finish_both(start_both("whole", place))


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_device(both, golden_lm):
    arguments = {"recipe": driver.recipe(), **driver.CALL}
    one = driver.arrays(golden_lm.generate(driver.PROMPTS, key=3, temperature=1.0, **arguments))
    filled = golden_lm.infill(driver.MASKED, driver.MASK, recipe=driver.recipe(), block_length=8, mask_id=150)
    logits = golden_lm.logits(driver.PROMPTS[:1])[0, -1]
    for result in both:
        assert result["devices"] == 8
        for name in ("all", "only 0", "only 1", "threads", "again"):
            assert result[name] == one, name
        assert result["compiled again"] == 0
        assert result["stream"] == one["canvas"]
        assert result["infill"] == [row.tolist() for row in filled.tokens]
        np.testing.assert_allclose(result["logits"], logits, atol=1e-4)


@pytest.mark.slow
def test_wrong_calls_are_errors_on_every_process(both):
    first, second = (result["errors"] for result in both)
    for name in ("prompts", "none", "key", "recipe", "call", "both fail"):
        assert first[name] == second[name], name
    assert first["prompts"].startswith("ArgumentError: prompts: got different ones on processes 0 and 1; allowed")
    assert first["none"].startswith("ArgumentError: prompts: got them on no process of 0, 1; allowed all or one")
    for name in ("key", "recipe", "call"):
        assert first[name].startswith(f"ArgumentError: {name}: got different values on processes 0 and 1"), name
    reason = "prompts[0]: got token id 999; allowed 0 to 159, the model's vocabulary"
    assert first["both fail"] == second["one fails"] == f"ArgumentError: {reason}"
    assert first["one fails"] == f"PeerError: process 1 of 2: {reason}"
    assert both[0]["save over"].startswith("DestinationError: ")
    assert "exists already" in both[0]["save over"]
    assert both[1]["save over"].startswith("DestinationError: ")
    assert "process 0 of 2" in both[1]["save over"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", "converted"])
def test_what_two_processes_write_is_the_checkpoint(both, place, name):
    convert.verify(place / name)
    config, params = convert.load_params(place / name)
    assert dataclasses.replace(config, mask_id=None) == dataclasses.replace(
        convert.load_params(GOLDENS)[0], mask_id=None)
    builders.tree_equal(params, {key: np.asarray(value) for key, value in named_leaves(golden.parameters()).items()})
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_each_process_reads_its_part_only(both, place):
    """Bytes that the loader asks of the files are those of the process's shards, however these are cut out."""
    stored = builders.tensors()
    rng = np.random.default_rng(1)
    for key, value in stored.items():
        if ".experts." in key:
            shape = tuple(2048 if size == builders.FFN else size for size in value.shape)
            stored[key] = rng.standard_normal(shape).astype(np.float32)
    builders.write(place / "long", stored, shards=2, config=builders.CONFIG | {"expert_intermediate_size": 2048})
    np.savez(place / "expected.npz", **builders.parameters(stored))
    shutil.rmtree(place / "converted")
    convert.convert(place / "long", place / "converted")
    for result in both:
        assert result["read"] == result["held"]
    for result in finish_both(start_both("reading", place)):
        assert result["equal"]
        # rows of `attention.output` are shorter than a page: they are read whole
        assert result["read"] == result["held"] + result["short rows"]
        assert result["held"] < 0.51 * result["whole"]
        # Orbax reads its own metadata too, and a chunk again for every device that holds it
        assert result["restore read"] < 1.25 * result["restore held"] + 200_000 < 0.7 * result["whole"]


@pytest.mark.slow
def test_the_host_needs_no_more_than_the_largest_part_on_top(tmp_path):
    """Peak memory of each process, less what it held before and the parameters that it holds now."""
    from benchmarks import load_mesh

    config = load_mesh.SMALL | {"num_experts": 64}
    results = load_mesh.run(config, "tensor=4,expert=2", 2, directory=tmp_path)
    assert load_mesh.within_bounds(results)
    for row in results["safetensors"]:
        assert row["held_bytes"] < 0.51 * row["whole_bytes"]
        # a process that read everything would need the other half, too
        assert row["on_top_bytes"] < 0.25 * row["held_bytes"]


def run_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(process.communicate()[1][-2000:])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "victim"), [
    ("forever", 1), ("forever", 0), ("waiting", 1), ("waiting", 0)])
def test_a_process_that_dies_ends_the_other(task, victim, tmp_path):
    """Killed within a generation, or while the other waits for its prompts: an error that says so, soon."""
    running = start_both(task, tmp_path)
    try:
        for process in running:
            run_until(process, "generated")
        running[victim].kill()
        other = running[1 - victim]
        _, error = other.communicate(timeout=LONGEST_SECONDS)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert other.returncode not in (0, -9)
    assert "another task died" in error


@pytest.mark.slow
def test_a_process_that_gives_up_ends_the_other(tmp_path):
    """It raises an error of its own and leaves, while the other waits for it."""
    running = start_both("leaving", tmp_path)
    try:
        errors = [process.communicate(timeout=LONGEST_SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode not in (0, -9) for process in running] == [True, True]
    assert "this one has had enough" in errors[1]


@pytest.mark.slow
def test_a_start_without_the_others_ends():
    code = ("import sys; from djax import distributed; "
            "distributed.initialize(sys.argv[1], num_processes=2, process_id=0, initialization_timeout=2)")
    begun = time.monotonic()
    process = start(["-c", code, f"127.0.0.1:{free_port()}"])
    _, error = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode != 0
    assert error.startswith("djax: not all processes came within 2 seconds (initialization_timeout); each must")
    assert time.monotonic() - begun < LONGEST_SECONDS


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "coordinator_address: got coordinator_address=None, num_processes=None, process_id=None"),
    ({"coordinator_address": "localhost:1", "num_processes": 2}, "coordinator_address: got coordinator_address=local"),
    ({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2}, "coordinator_address: got "),
    ({"initialization_timeout": 0}, "initialization_timeout: got 0; allowed an integer of at least 1; give whole"),
    ({"heartbeat_timeout": -1}, "heartbeat_timeout: got -1"),
    ({"shutdown_timeout": 0}, "shutdown_timeout: got 0"),
])
def test_wrong_starts_are_named(monkeypatch, arguments, message):
    # as in a fresh process, outside of any cluster
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=r".") as caught:
        distributed.initialize(**arguments, cluster_detection_method="deactivate")
    assert str(caught.value).startswith(message)


def test_slurm_needs_no_arguments(monkeypatch):
    """What `srun` sets is enough: the first node's name, the task's number, and one device for each task."""
    seen: dict[str, Any] = {}

    def initialize(self: Any, *arguments: Any, **rest: Any) -> None:
        from jax._src import clusters

        seen["got"] = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)

    for name, value in {"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "16",
                        "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr("jax._src.distributed.State.initialize", initialize)
    distributed.initialize()
    address, count, index, local = seen["got"]
    assert address.startswith("gpu03:")
    assert (count, index, local) == (16, 11, [3])


def test_one_process_shares_nothing():
    value = object()
    assert distributed.share(lambda: value, devices=jax.devices(), name="value") is value
    assert not distributed.spans_processes(None)
    with pytest.raises(KeyError):
        distributed.share(lambda: {}["x"], devices=jax.devices(), name="value")


@dataclasses.dataclass
class _Device:
    id: int
    process_index: int


def test_a_mesh_without_this_process_is_refused():
    with pytest.raises(ValueError, match=r"mesh: got devices of processes 3, 4; .* this is process 0 and has none"):
        distributed.share(lambda: 1, devices=[_Device(1, 4), _Device(0, 3)], name="value")  # type: ignore[list-item]


def test_a_mesh_of_some_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"mesh: got devices of processes 0, 2 of 3; allowed .* of every process"):
        distributed.share(lambda: 1, devices=[_Device(1, 2), _Device(0, 0)], name="value")  # type: ignore[list-item]


SAME = [
    lambda: recipes.dinfer(), lambda: recipes.dinfer_hierarchical(high=0.9, low=0.4), lambda: jax.random.key(3),
    lambda: {"b": 1, "a": [np.arange(3), None, "text"]}, lambda: jnp.float32(0.5), lambda: object]


@pytest.mark.parametrize("make", SAME)
def test_equal_values_have_equal_digests(make):
    np.testing.assert_array_equal(distributed.digest(make()), distributed.digest(make()))


def test_different_values_have_different_digests():
    values = [
        recipes.dinfer(), recipes.dinfer(threshold=0.7), recipes.fast_dllm(cache="prefix"),
        recipes.fast_dllm(cache="dual"), jax.random.key(0), jax.random.key(1), 0, 1, None, "a", "b", [0, 1], [0, 2],
        np.zeros(2), np.zeros(3), np.zeros(2, np.int32)]
    assert len({tuple(distributed.digest(value).tolist()) for value in values}) == len(values)


def test_addresses_do_not_tell_processes_apart():
    """A function in a part prints with its address, which is another one in every process."""
    one, two = (eval("lambda x: x") for _ in range(2))
    assert repr(one) != repr(two)
    np.testing.assert_array_equal(distributed.digest([one]), distributed.digest([two]))
