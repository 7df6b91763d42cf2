"""The kernel benchmarks: their arithmetic by hand, what becomes of cases that fail or hang, and a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks.forward import loop
from benchmarks.forward.network import VARIANTS, Network, windowed_forward
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report as gpu_report
from benchmarks.harness import timing
from benchmarks.harness.cases import BROKEN, FULL, TINY, Case, Journal, Unsupported, in_progress, run_cases
from benchmarks.harness.ceilings import Ceilings, moe_cost
from benchmarks.kernels import baselines, checks
from benchmarks.kernels.ops import Drawn, attention_op, chained, moe_op
from djax.plan import roofline
from djax.plan.roofline import Cost
from kernels_pallas import attention, moe
from kernels_pallas.testing import attention_cases, moe_cases, unembed_cases

ROOT = Path(__file__).parents[2]
GB, GFLOP = 1e9, 1e9


# ---- roofline: LLaDA-MoE by hand


def test_a_forward_of_96_positions_is_14_gigabytes_and_283_gflop() -> None:
    """The count that the targets rest on: everything on all 96 positions, float32 logits in memory."""
    cost = roofline.total(
        roofline.forward_parts(FULL.config, batch=1, window=96, context=1200, head_rows=96).values())
    experts = 16 * 64 * 3 * 1024 * 2048 * 2
    attention_weights = 16 * 4 * 2048 * 2048 * 2
    cache, head, logits = 16 * 2 * 1200 * 2048 * 2, 157184 * 2048 * 2, 2 * 4 * 96 * 157184
    assert cost.bytes == pytest.approx(experts + attention_weights + cache + head, rel=5e-3)
    assert (cost.bytes + logits) / GB == pytest.approx(14.35, abs=0.06)
    assert cost.flops / GFLOP == pytest.approx(283, abs=1)


def test_the_head_is_644_megabytes() -> None:
    cost = roofline.unembed(FULL.config, 64)
    assert cost.bytes == pytest.approx(643.8e6, rel=1e-3)
    assert cost.flops == 2 * 64 * 157184 * 2048
    smoothed = roofline.unembed(FULL.config, 64, expected=True)
    assert smoothed.bytes == pytest.approx(2 * 643.8e6, rel=1e-3)
    assert smoothed.flops == 2 * cost.flops


def test_eight_bit_experts_are_half_the_bytes_and_their_scales() -> None:
    wide, narrow = (moe_cost(FULL.config, 96, weight_bytes=size) for size in (2, 1))
    assert wide.flops == narrow.flops == 96 * 8 * 3 * 2 * 1024 * 2048
    scales = 64 * (2 * 1024 + 2048) * 4
    rows = 2 * 96 * 2048 * 2
    assert narrow.bytes - rows - scales == pytest.approx((wide.bytes - rows) / 2, rel=1e-4)


def test_few_rows_read_few_experts() -> None:
    assert roofline.experts_read(1, num_experts=64, experts_per_token=8) == pytest.approx(8)
    assert 63.99 < roofline.experts_read(96, num_experts=64, experts_per_token=8) < 64
    rng = np.random.default_rng(3)
    drawn = [len({e for _ in range(5) for e in rng.choice(64, 8, replace=False)}) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(roofline.experts_read(5, num_experts=64, experts_per_token=8), abs=0.2)


def test_attention_reads_the_cache_and_its_own_rows() -> None:
    cost = roofline.attention(FULL.config, 4, 96, 1200)
    assert cost.bytes == 2 * 2 * 4 * (1200 + 96) * 2048
    assert cost.flops == 2 * 2 * 4 * 16 * 96 * 1200 * 128


def test_shares_say_what_binds() -> None:
    ceilings = Ceilings(bytes_per_second=100.0, flops_per_second=1000.0)
    shares = ceilings.shares(Cost(bytes=50.0, flops=100.0), 1.0)
    assert shares == {"share_of_copy_bandwidth": 0.5, "share_of_matmul_rate": 0.1, "bound": "memory",
                      "share_of_floor": 0.5}
    assert ceilings.floor_seconds(Cost(bytes=50.0, flops=100.0)) == 0.5
    assert ceilings.shares(Cost(bytes=1.0, flops=900.0), 1.0)["bound"] == "arithmetic"


# ---- timing


def test_a_sample_waits_once_for_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of its own clock: queueing costs 1, a call 10, and each wait 5 more."""
    now = {"host": 0.0, "device": 0.0}
    calls: list[int] = []

    def queue(number: int) -> int:
        calls.append(number)
        now["host"] += 1
        now["device"] = max(now["device"], now["host"]) + 10
        return number

    def wait(last: int) -> None:
        assert last == calls[-1]
        now["host"] = max(now["host"], now["device"]) + 5

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["host"])
    taken = timing.measure(queue, wait, timing.Budget(sample_seconds=160.0, samples=3, max_calls=100))
    assert taken.calls == 10  # 160 of the 16 that one call takes alone
    assert taken.seconds.median == pytest.approx((1 + 10 * 10 + 5) / 10)
    assert taken.host_share == pytest.approx(10 / 106)
    assert calls == list(range(2 + 10 * 4)), "operands are rotated by the number of the call"
    assert taken.per(2)["seconds"]["median"] == pytest.approx(taken.seconds.median / 2)


def test_operands_rotate_beyond_the_cache() -> None:
    assert timing.copies_beyond_cache(805e6) == 1
    assert timing.copies_beyond_cache(10 * 2**20) * 10 * 2**20 >= 4 * timing.CACHE_BYTES
    assert timing.copies_beyond_cache(1) == 64


# ---- the run of cases


def make(
    name: str, act: Callable[[], dict[str, Any]] = dict, *, priority: int = 0, error: Exception | None = None
) -> Case:
    def prepare() -> Callable[[], dict[str, Any]]:
        if error is not None:
            raise error
        return act

    return Case(group="g", implementation=name, shape={"rows": 1}, prepare=prepare, priority=priority)


def fail() -> dict[str, Any]:
    raise RuntimeError("the kernel " + "x" * 5000)


def status(journal: Journal) -> dict[str, str]:
    return {record["implementation"]: record["status"] for record in journal.results()}


def test_a_failing_case_is_written_down_and_the_run_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl")
    cases = [make("late", priority=2), make("bad", fail), make("no", error=Unsupported("too wide")),
             make("broken_build", error=ValueError("ptxas")), make("wrong", lambda: {"status": "wrong"}), make("good")]
    assert run_cases(cases, journal, seconds=60, together=2, alive=lambda: True) == 0
    assert status(journal) == {"bad": "failed", "no": "unsupported", "broken_build": "failed", "wrong": "wrong",
                               "good": "ok", "late": "ok"}
    assert [record["implementation"] for record in journal.results()][-1] == "late"
    reasons = {record["implementation"]: record.get("reason", "") for record in journal.results()}
    assert reasons["no"] == "too wide"
    assert reasons["bad"].startswith("RuntimeError: the kernel")
    assert len(reasons["bad"]) < 700
    assert in_progress(journal.read()) == []


def test_what_does_not_fit_is_skipped_and_runs_the_next_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl")
    ran: list[str] = []

    def slow(name: str) -> Case:
        def act() -> dict[str, Any]:
            ran.append(name)
            time.sleep(0.2)
            return {}
        return make(name, act)

    cases = [slow("a"), slow("b"), slow("c")]
    assert run_cases(cases, journal, seconds=0.25, together=1, alive=lambda: True) == 0
    assert status(journal) == {"a": "ok", "b": "skipped", "c": "skipped"}
    assert run_cases(cases, journal, seconds=60, together=3, alive=lambda: True) == 0
    assert ran == ["a", "b", "c"]
    assert set(status(journal).values()) == {"ok"}


def test_a_broken_device_ends_the_process_behind_the_case_that_broke_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl")
    cases = [make("bad", fail), make("next")]
    assert run_cases(cases, journal, seconds=60, together=2, alive=lambda: False) == BROKEN
    assert status(journal) == {"bad": "failed"}
    assert run_cases(cases, journal, seconds=60, together=2, alive=lambda: True) == 0
    assert status(journal) == {"bad": "failed", "next": "ok"}


def test_half_a_line_is_not_a_result(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl")
    journal.write({"event": "start", "phase": "compile", "keys": ["a", "b"]})
    journal.write(make("a").record("ok") | {"key": "a"})
    with journal.path.open("a") as file:
        file.write('{"event": "result", "key": "b", "sta')
    assert journal.done() == {"a"}
    assert in_progress(journal.read()) == ["b"]


SUPERVISED = """
import os, sys, time
from pathlib import Path
from benchmarks.harness import command
from benchmarks.harness.cases import Case, Journal, run_cases

def crash(): os._exit(9)
def hang(): time.sleep(600)

def case(name, act=dict, prepare=None):
    return Case(group="g", implementation=name, shape={"rows": 1}, prepare=prepare or (lambda: act))

found = command.parse(command.options("supervised", "", ["g"]), None, ["g"])
cases = [case("first"), case("crashes", crash), case("hangs", hang), case("dies_compiling", prepare=crash),
         case("last")]
sys.exit(run_cases(cases, Journal(found.output / "results.jsonl"), seconds=found.seconds, together=found.together,
                   alive=lambda: True))
"""


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "supervised.py").write_text(textwrap.dedent(SUPERVISED))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(gpu, "RUN_HANG_SECONDS", 2.0)
    options = gpu.parse(["--output", str(tmp_path / "out"), "--budget", "600"])
    options.output.mkdir()
    console = Console(quiet=True)
    with Progress(console=console) as show:
        running = gpu.Run(options, console, tmp_path)
        stage = gpu.Stage(module="supervised", groups=("g",), priorities=(0,), seconds=500, together=5)
        running.stage(stage, show)
    assert status(running.journal) == {"first": "ok", "crashes": "crashed", "hangs": "hung",
                                       "dies_compiling": "crashed", "last": "ok"}


def test_stages_put_the_targets_first_and_take_only_what_is_asked_for() -> None:
    every = gpu.stages(gpu.GROUPS, tiny=False)
    first = gpu.stages(gpu.GROUPS, tiny=True)
    assert every[: len(first)] == first
    assert all(stage.priorities == (0,) for stage in first)
    assert {group for stage in first for group in stage.groups} == set(gpu.GROUPS)
    assert {priority for stage in every[len(first):] for priority in stage.priorities} == {0, 1, 2}
    only = gpu.stages(["moe"], tiny=True)
    assert [stage.groups for stage in only] == [("moe",)]


# ---- what is computed from the figures


def test_two_generations_tell_refreshes_from_window_steps() -> None:
    refresh, window, blocks = 0.03, 0.004, 16
    seconds = tuple(blocks * (refresh + (steps - 1) * window) for steps in (8, 16))
    assert loop.split(seconds, (8, 16), blocks) == pytest.approx((refresh, window))
    # 16 steps for 64 tokens are 4 tokens a forward
    rate = loop.tokens_per_second(refresh, window, block=64, tokens_per_forward=4.0)
    assert rate == pytest.approx(64 / (refresh + 15 * window))


def result(group: str, implementation: str, shape: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"event": "result", "key": f"{group}/{implementation}", "group": group, "implementation": implementation,
            "shape": shape, "status": "ok"} | fields


def test_targets_take_the_best_figure_and_say_what_is_missing() -> None:
    results = [
        result("forward", "djax", gpu_report.MAIN, seconds={"median": 3.8e-3}),
        result("forward", "xla", gpu_report.MAIN, seconds={"median": 1e-3}),
        result("forward", "djax.int8", gpu_report.MAIN, seconds={"median": 2.6e-3}),
        result("forward", "djax.float8_e4m3fn", gpu_report.MAIN, seconds={"median": 2.3e-3}),
        result("moe", "mosaic_gpu", {"rows": 96}, share_of_copy_bandwidth=0.79),
        result("moe", "mosaic_gpu", {"rows": 96, "weights": "int8"}, share_of_copy_bandwidth=0.99),
        result("unembed", "mosaic_gpu", {"rows": 64}, status="hung", reason="no word"),
        result("loop", "djax", gpu_report.LOOP, loop_overhead=0.03, tokens_per_second={"3.87": 950.0, "5.67": 1200.0}),
        result("loop", "djax", gpu_report.LOOP | {"command_buffers": "none"}, loop_overhead=0.5,
               tokens_per_second={"3.87": 5e3, "5.67": 5e3}),
    ]
    outcome = {entry["name"]: (entry["reached"], entry["figure"]) for entry in gpu_report.targets(results)}
    assert outcome["windowed forward, 96 of 1200"] == (True, pytest.approx(3.8))
    assert outcome["windowed forward, 96 of 1200, goal"] == (False, pytest.approx(3.8))
    assert outcome["windowed forward, 8-bit experts"] == (True, pytest.approx(2.3))
    assert outcome["decode MoE layer, 96 rows"] == (False, pytest.approx(79))
    assert outcome["head, 64 rows"] == (None, None)
    assert outcome["loop overhead per window step"] == (True, pytest.approx(3))
    assert outcome["TPS at TPF 3.87, one full refresh per block"] == (True, 950.0)
    (head,) = (entry for entry in gpu_report.targets(results) if entry["name"].startswith("head"))
    assert "hung: no word" in gpu_report.verdict(head)


def test_speed_is_compared_with_the_fastest_baseline_on_the_same_shape() -> None:
    def timed(name: str, milliseconds: float, **shape: Any) -> dict[str, Any]:
        return result("moe", name, shape, seconds={"median": milliseconds}) | {"key": f"{name} {shape}"}

    faster = gpu_report.speedups([
        timed("mosaic_gpu", 2.0, rows=96), timed("xla_dense", 3.0, rows=96), timed("lax.ragged_dot", 9.0, rows=96),
        timed("mosaic_gpu", 1.0, rows=96, weights="int8"), timed("mosaic_gpu", 1.0, rows=32)])
    assert faster == {"mosaic_gpu {'rows': 96}": 1.5, "mosaic_gpu {'rows': 96, 'weights': 'int8'}": 3.0}


# ---- what is measured is what it says


@pytest.mark.slow
def test_the_windowed_forward_is_the_models_and_eight_bits_come_near() -> None:
    network = Network(TINY)
    length = TINY.main[1]
    read = {}
    for name in ("djax", "xla.no_cudnn", "djax.int8"):
        variant = VARIANTS[name]
        run = jax.jit(windowed_forward(network.graphdef(variant), variant, TINY, length))
        _, read[name] = run(network.cache(1, length), network.params, network.quantized(variant.experts),
                            *network.window(1, length, length))
    from flax import nnx

    model = nnx.merge(network.graphdef(VARIANTS["djax"]), network.params)
    tokens = jnp.full((1, length), TINY.config.mask_id)
    hidden, _ = model(
        model.embed_tokens(tokens), positions=jnp.arange(length)[None], key_mask=jnp.ones((1, length), bool),
        window_start=jnp.int32(0), write=jnp.ones((1, length), bool), cache=None)
    logits = model.unembed(hidden)[0]
    allowed = jnp.arange(TINY.config.vocab_size) < TINY.config.vocab_size - 1
    best = jnp.where(allowed.at[TINY.config.mask_id].set(False), logits, -jnp.inf)
    expected = best.max(-1) - jax.nn.logsumexp(best, axis=-1)
    np.testing.assert_allclose(read["djax"][1], expected, atol=0.05)
    np.testing.assert_allclose(read["xla.no_cudnn"][1], expected, atol=0.05)
    np.testing.assert_allclose(read["djax.int8"][1], expected, atol=0.3)


@pytest.mark.slow
def test_experts_read_are_counted_layer_by_layer() -> None:
    counts = Network(TINY).experts_read(TINY.windows)
    assert set(counts) == set(TINY.windows)
    for read in counts.values():
        assert len(read) == TINY.config.num_layers
        assert all(TINY.config.experts_per_token <= count <= TINY.config.num_experts for count in read)


@pytest.mark.slow
def test_ragged_dot_computes_the_op() -> None:
    op = moe_op(Drawn(TINY), 8, 0)
    operands = op.draw()[0]
    expected, got = moe(*operands, implementation="reference"), baselines.moe_ragged_dot(*operands)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=3e-2)


def test_a_chain_of_attention_feeds_every_link() -> None:
    op = attention_op(Drawn(TINY), 8, 16, 1, 0)
    query, mask, *caches = op.draw()[0]
    assert len(caches) == 2 * op.units
    attend = lambda q, k, v, mask: attention(q, k, v, key_mask=mask)  # noqa: E731
    expected = query
    for link in range(op.units):
        expected = attend(expected, caches[2 * link], caches[2 * link + 1], mask)
    np.testing.assert_array_equal(chained(attend)(query, mask, *caches), expected)


def test_a_wrong_kernel_fails_its_check() -> None:
    case = checks.check("moe", "case", "mosaic_gpu", lambda x: x + 0.1, lambda: (jnp.ones(4),),
                        lambda got, operands: checks.near(got, np.ones(4), 2e-2))
    assert case.prepare()()["status"] == "wrong"
    assert checks.judge(float("nan"), 1.0)["status"] == "wrong"
    assert checks.judge(1e-3, 1e-2)["status"] == "ok"


@pytest.mark.slow
def test_the_tests_tables_are_checks() -> None:
    """Every case of every table, and one of each is right on this machine."""
    cases = list(checks.tables())
    of = lambda op: [case for case in cases if case.shape["op"] == op and case.implementation == "reference"]  # noqa: E731
    for op, table in (("moe", moe_cases), ("attention", attention_cases), ("unembed", unembed_cases)):
        assert [case.shape["case"] for case in of(op)] == [case.name for case in table.CASES]
        assert of(op)[1].prepare()()["status"] == "ok"


@pytest.mark.slow
def test_torch_runs_the_same_forward() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is measured where it is (pip install djax[oracle])")
    from benchmarks.torch_moe import TorchNetwork

    window, context, batch = TINY.main
    network = TorchNetwork(TINY)
    with torch.inference_mode():
        token, log_prob = network.forward(window, context, batch, "eager")()
        again, _ = network.forward(window, context, batch, "batched_mm")()
    assert token.shape == again.shape == (batch, TINY.block(window))
    assert (log_prob < 0).all()


# ---- the command


@pytest.mark.slow
def test_tiny_run_writes_everything(tmp_path: Path) -> None:
    """As a user calls it: a process of its own that starts another."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "out"), "--tiny", "--only", "unembed",
               "--budget", "540"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    smoothed, found = ({entry["implementation"]: entry for entry in record["results"]
                        if ("expected" in entry["shape"]) == expected} for expected in (True, False))
    assert smoothed["xla_stream"]["bytes"] > 1.9 * found["xla_stream"]["bytes"]
    assert found["reference"]["status"] == found["xla_stream"]["status"] == "ok"
    assert found["reference"]["seconds"]["median"] > 0
    assert found["reference"]["bytes"] == roofline.unembed(TINY.config, 4).bytes
    assert found["mosaic_gpu"]["status"] == "unsupported"
    assert found["mosaic_gpu"]["reason"]
    assert "benchmarks.gpu" in record["command"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["ceilings"][0]["copy"]["bytes_per_second"] > 0
    assert {entry["reached"] for entry in record["targets"]} == {None}
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "## unembed" in text
    assert "| xla_stream | rows 4 |" in text


def test_a_report_shows_the_loop(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    journal.write(result(
        "loop", "djax", gpu_report.LOOP, generations=[
            {"steps_per_block": steps, "forwards_per_second": 200.0 + steps} for steps in (8, 16)],
        window_seconds=3.6e-3, back_to_back={"seconds": {"median": 3.5e-3}}, loop_overhead=0.0286,
        refresh_seconds=0.02, tokens_per_second={"3.87": 901.0, "5.67": 1100.0}, compile_seconds=40.0))
    record = gpu.write(gpu.parse(["--output", str(tmp_path), "--commit", "abc"]), {"name": "NVIDIA H200"})
    text = (tmp_path / "gpu.md").read_text()
    assert "| 208 | 216 | 3.600 | 3.500 | 2.9 % | 20.00 | 901 | 1100 | 40 |" in text
    assert "reached: 901.00 tokens/s (djax)" in gpu_report.summary(record)
    assert record["commit"]


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpu_facts", dict)
    assert gpu.main(["--output", str(tmp_path)]) == gpu.NO_GPU
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("no GPU")
    assert "\n" not in printed


def test_unknown_groups_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--output", str(tmp_path), "--only", "moe,conv"])
    assert "conv" in capsys.readouterr().err
