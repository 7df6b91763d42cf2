"""The run of `benchmarks.rl`: what it checks on itself, its files, and (slow) a small run of each trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import djax
from benchmarks.rl import __main__ as rl
from benchmarks.rl import report as rl_report
from benchmarks.rl.task import PLACEMENTS, TRAINERS, Compilations, Prompts, Run, Settings, meshes, rewards, weakened

ROOT = Path(__file__).parents[2]


def a_model(value=1.0, programs=1):
    return SimpleNamespace(params={"w": np.full(3, value, np.float32)}, compile_count=programs)


def test_a_run_that_is_out_of_sync_stops(tmp_path):
    trained = {"w": np.ones(3, np.float32)}
    with Run(tmp_path / "a-trace-b.jsonl", Settings(updates=3), title="run") as run:
        run.add(0, {"held_out": 0.25, "greedy": 0.5}, lm=a_model(), params=trained)
        run.check(0, a_model().params, params=trained)
        with pytest.raises(RuntimeError, match="update 1: 1 parameters of trainer and rollouts differ"):
            run.check(1, a_model(value=1 + 1e-7).params, params=trained)
        assert run.checked == {0}
        run.add(1, {}, lm=a_model(programs=2), params=trained)  # still warming up
        run.add(2, {}, lm=a_model(programs=3), params={"w": np.asarray([1, 4, 5], np.float32)})
        with pytest.raises(RuntimeError, match="update 3: the rollout model has compiled 4 programs, 3 after two"):
            run.add(3, {}, lm=a_model(programs=4), params=trained)
    lines = [json.loads(line) for line in (tmp_path / "a-trace-b.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert lines[0]["held_out"] == 0.25
    assert [line["distance"] for line in lines] == [0, 0, 5]


def test_a_run_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "a-trace-b.jsonl"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="stop"), Run(path, Settings(), title="run") as run:  # noqa: PT012
        run.add(0, {}, lm=a_model(), params=a_model().params)
        raise RuntimeError("stop")
    assert path.read_text() == "before"
    assert json.loads((tmp_path / "a-trace-b.jsonl.partial").read_text())["update"] == 0
    with Run(path, Settings(), title="run") as run:
        run.add(0, {}, lm=a_model(), params=a_model().params)
    assert json.loads(path.read_text())["update"] == 0
    assert sorted(tmp_path.iterdir()) == [path]


def test_runs_are_kept_and_reported(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'djax[plot]'")
    for trainer, last in (("optax", 0.75), ("tunix", 0.7)):
        path = tmp_path / f"{trainer}-trace-colocated.jsonl"
        with Run(path, Settings(updates=2), title=trainer) as run:
            for update, reward in enumerate((0.25, None, last)):
                metrics = {} if reward is None else {"held_out": reward, "greedy": reward / 2}
                run.check(update, a_model().params, params=a_model().params)
                run.add(update, metrics, lm=a_model(), params=a_model().params)
        rl_report.keep(path, run, Settings(updates=2), devices=1)
    assert rl.main(["--report", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "rl.md").read_text()
    assert "| optax | trace | colocated | 1 | 2 | 25.0 → 75.0 | 12.5 → 37.5 |" in text
    assert "| tunix | trace | colocated | 1 | 2 | 25.0 → 70.0 | 12.5 → 35.0 |" in text
    assert (tmp_path / "rl.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "rl.json").read_text())["runs"]
    assert list(kept) == ["optax-trace-colocated", "tunix-trace-colocated"]
    assert kept["optax-trace-colocated"]["syncs_checked"] == 2
    assert kept["optax-trace-colocated"]["settings"]["noise"] == Settings().noise
    assert "other settings" not in text
    kept["tunix-trace-colocated"]["settings"] |= {"noise": 0.5, "seed": 3}
    one, other = rl_report.markdown(kept).splitlines()[-2:]
    assert one.endswith("| 0 |  |")
    assert other.endswith("| 0 | noise 0.5, seed 3 |")


def test_the_kept_runs_learn_and_trainers_agree():
    """Of the committed results: at least 20 points in under 15 minutes, and one curve whoever trains."""
    runs = json.loads((rl.RESULTS / "rl.json").read_text())["runs"]
    for placement in PLACEMENTS:
        curves = []
        for trainer in TRAINERS:
            run = runs[f"{trainer}-trace-{placement}"]
            assert run["held_out"][1] - run["held_out"][0] >= 0.20
            assert run["seconds"] < 15 * 60
            assert run["syncs_checked"] == run["updates"]
            records = [json.loads(line) for line in (rl.RESULTS / run["metrics"]).read_text().splitlines()]
            points = {record["update"]: record["held_out"] for record in records if "held_out" in record}
            assert [points[0], points[run["updates"]]] == run["held_out"]
            curves.append(points)
        assert curves[0] == pytest.approx(curves[1], abs=0.02)


def test_the_start_is_always_the_same():
    lm = djax.load(dtype="float32")
    one, other = (weakened(lm.params, 1.0) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    head = np.asarray(lm.params["head"][...])
    assert np.std(np.asarray(one["head"]) - head) == pytest.approx(head.std(), rel=0.01)
    jax.tree.map(np.testing.assert_array_equal, one | {"head": head}, weakened(lm.params, 0.0))
    settings = Settings(prompts=3, held_out=4)
    prompts = Prompts(settings, lm)
    assert prompts.of(2) == prompts.of(2) != prompts.of(3)
    assert not {example.prompt for example in prompts.held_out} & {example.prompt for example in prompts.of(0)}
    examples = prompts.of(0)
    answers = [example.answer for example in examples]
    np.testing.assert_array_equal(rewards(examples, answers), 1.0)
    np.testing.assert_array_equal(rewards(examples, answers[1:] + answers[:1]), 0.0)
    encoded = lm.tokenizer.encode(prompts.text(examples[0]), allow_special_tokens=True)
    assert encoded == lm.tokenizer.apply_chat(examples[0].messages)


def test_compilations_are_counted():
    counted, function = Compilations(), jax.jit(lambda x: 3 * x)
    function(np.ones(7))
    assert counted.count == 1
    function(np.ones(7))
    assert counted.count == 1


def test_meshes_and_wrong_options(capsys, tmp_path):
    trainer, rollouts = meshes("colocated", 1)
    assert trainer == rollouts
    with pytest.raises(ValueError, match="devices: got 1 with disjoint"):
        meshes("disjoint", 1)
    for arguments, said in ((["--updates", "0"], "--updates: got 0; allowed at least 1"),
                            (["--devices", "0"], "--devices: got 0"), (["--trainer", "trl"], "invalid choice: 'trl'"),
                            (["--trainer", "tunix", "--method", "espo"],
                             "--method: got espo with --trainer tunix; allowed trace, diffu")):
        with pytest.raises(SystemExit):
            rl.main([*arguments, "--output", str(tmp_path)])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SMALL = ["--updates", "3", "--held-out", "16", "--evaluate-every", "3", "--prompts", "4", "--samples", "4",
         "--noise", "1.0"]


def run_small(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rl", *SMALL, *arguments, "--output", str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads((tmp_path / "rl.json").read_text())["runs"]
    return {name: (run, [json.loads(line) for line in (tmp_path / run["metrics"]).read_text().splitlines()])
            for name, run in runs.items()}


def assert_moved(records):
    """Some answers were right, and the weights are not those of the start."""
    assert max(record.get("reward", 0.0) for record in records) > 0
    assert records[0]["distance"] == 0
    assert records[-1]["distance"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trace", "diffu", "espo"])
def test_optax_trains(tmp_path, method):
    run, records = run_small(tmp_path, "--method", method)[f"optax-{method}-colocated"]
    assert run["syncs_checked"] == 3
    assert_moved(records)
    assert max(record.get("grad_norm", 0.0) for record in records) > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tunix") is None,
                    reason="google-tunix is not installed: pip install 'djax[rl]'")
def test_both_trainers_give_one_curve(tmp_path):
    """On halves of four devices: the same prompts, samples, loss and optimizer."""
    for trainer in ("optax", "tunix"):
        runs = run_small(tmp_path, "--trainer", trainer, "--placement", "disjoint", "--devices", "4")
    (one, curve), (other, expected) = (runs[f"{trainer}-trace-disjoint"] for trainer in ("tunix", "optax"))
    assert [record.get("reward") for record in curve] == [record.get("reward") for record in expected]
    assert one["held_out"] == other["held_out"]
    assert one["syncs_checked"] == other["syncs_checked"] == 3
    assert_moved(curve)
    assert curve[-1]["distance"] == pytest.approx(expected[-1]["distance"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tunix") is None,
                    reason="google-tunix is not installed: pip install 'djax[rl]'")
@pytest.mark.parametrize("method", ["trace", "diffu"])
def test_tunix_trains_on_one_mesh(tmp_path, method):
    run, records = run_small(tmp_path, "--trainer", "tunix", "--method", method)[f"tunix-{method}-colocated"]
    assert run["syncs_checked"] == 3
    assert_moved(records)
