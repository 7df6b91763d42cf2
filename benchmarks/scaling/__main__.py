"""How generation scales over devices: checked on fake ones, compiled for real ones, predicted to 64, timed on a shard.

    python -m benchmarks.scaling                        # all that needs no accelerator; writes benchmarks/results/
    python -m benchmarks.scaling --only devices,strong  # parts of it; the others keep what is on record
    python -m benchmarks.scaling --shard 8              # on one GPU: one of 8 devices' program, collectives modelled

`devices` decodes a small model on 1, 2, 4 and 8 fake CPU devices, compares tokens with one device's, and counts
collectives. `plan` compiles the full-size programs for GPUs and TPUs (`djax plan`; needs the extra `aot`, minutes
each). `strong` is the roofline of one forward on 1 to 64 devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import report
from benchmarks.scaling import report as scaling_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("devices", "plan", "strong")
FAKE = (
    (1, "single"), (2, "tp"), (2, "ep"), (2, "dp"), (4, "tp"), (4, "ep"), (4, "tp_ep"), (4, "sp_tp"), (8, "tp"),
    (8, "ep"), (8, "tp_ep"), (8, "dp_tp_ep"))
"""Devices and preset."""
PLANS = (
    ("llada-moe", "h200:8", "tensor=4,expert=2"), ("llada-moe", "v5e:2x4", "tensor=4,expert=2"),
    ("llada-moe", "v6e:2x4", "tensor=4,expert=2"), ("llada-moe", "v5p:2x2x1", "tensor=4"),
    ("llada2-mini", "v5e:2x4", "tensor=4,expert=2"), ("llada2-flash", "v5e:4x4", "tensor=4,expert=4"),
    ("llada2-flash", "h200:2", "tensor=2"), ("llada2-flash", "v6e:2x4", "tensor=4,expert=2"),
    ("llada2-flash", "v5p:2x2x1", "tensor=4"))
"""Model, topology, mesh; those of LLaDA2-flash are the smallest of their kinds that hold it."""
MODELS = ("llada-moe", "llada2-mini", "llada2-flash")
KINDS = ("h200", "v5p", "v6e", "v5e")
COUNTS = (1, 2, 4, 8, 16, 32, 64)


# ---- fake devices


def on_fake_devices() -> list[dict[str, Any]]:
    """Every row of `FAKE`, in a process that sees eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.scaling.__main__ import decode_fake; decode_fake()"], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process with fake devices failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def decode_fake() -> None:
    """Print one JSON line a row of `FAKE`: equal tokens, commit steps and forwards, and what a step exchanges."""
    import jax
    import numpy as np

    from djax import recipes
    from djax.devices.sharding import make_mesh, preset_sizes
    from djax.engine.program import Program
    from djax.models import init_params
    from djax.plan.request import Request

    config = small_config()
    _, params = init_params(config, jax.random.key(3))
    expected: dict[str, np.ndarray] = {}
    request = Request.of(
        config, topology="h200:8", batch=2, prompt_length=9, max_new_tokens=16, block_length=8,
        recipe=recipes.dinfer(threshold=0.5, before=2, after=2, warmup=1), name="small")
    for count, preset in FAKE:
        program = Program(config, mesh=make_mesh(preset_sizes(preset, count)))
        rows = np.arange(request.canvas.batch, dtype=np.int32)
        arguments = (
            program.denoiser, program.place_params(params), program.place_rows(request.canvas),
            program.place(jax.random.key(0)), program.place(request.parts), program.place_rows(rows))
        compiled = program.denoise.lower(*arguments).compile()
        result = compiled(*arguments)
        found = {name: np.asarray(getattr(result, name)) for name in ("tokens", "commit_step", "nfe")}
        expected = expected or found
        print(json.dumps({
            "devices": count, "preset": preset, "mesh": preset_sizes(preset, count),
            "equal": {name: bool((found[name] == expected[name]).all()) for name in found},
            "forwards": found["nfe"].tolist(), "steps": exchanged(compiled.as_text())}), flush=True)


def small_config() -> Any:
    """Eight heads and experts, so that they divide over eight devices; float32."""
    from djax.models.config import LladaMoeConfig

    return LladaMoeConfig(
        vocab_size=128, hidden_size=32, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=8, num_experts=8,
        experts_per_token=2, expert_size=16, rms_norm_eps=1e-5, rope_theta=50000.0, max_positions=256, mask_id=2,
        eos_id=1, pad_id=1, dtype="float32")


def exchanged(text: str) -> dict[str, Any]:
    """Collectives of each kind of step, and of one layer in it."""
    from djax.plan import hlo

    steps = hlo.generation_steps(hlo.read_module(text), cached=True)
    found = {name: step.pass_collectives() for name, step in steps.items()}
    return {name: {"all": hlo.count(mine), "layer": hlo.count([one for one in mine if one.layer == 0])}
            for name, mine in found.items()}


# ---- real hardware that is not here


def compiled_plan(model: str, topology: str, mesh: str) -> dict[str, Any]:
    """`djax plan` of a full-size model, as JSON; what does not fit or cannot be compiled says so."""
    from djax.models.families import published
    from djax.plan.planner import plan
    from djax.plan.topology import missing_compiler

    asked = {"model": model, "topology": topology, "mesh": mesh}
    reason = missing_compiler(topology)
    if reason is not None:
        return {"asked": asked, "skipped": reason}
    try:
        return {"asked": asked, "plan": plan(published()[model], topology=topology, mesh=mesh, name=model).to_json()}
    except ValueError as error:
        return {"asked": asked, "refused": str(error)}


def estimated_again(row: dict[str, Any]) -> dict[str, Any]:
    """A row on record with today's estimates and roofline beside what the compiler said then."""
    from djax.models.families import published
    from djax.plan.planner import plan

    if "plan" not in row:
        return row
    old, asked = row["plan"], row["asked"]
    new = plan(published()[asked["model"]], topology=asked["topology"], mesh=asked["mesh"], name=asked["model"],
               compiled=False).to_json()
    read = ("collectives", "layer_collectives", "kernels")
    steps = {name: step | {field: old["steps"][name][field] for field in read} for name, step in new["steps"].items()}
    kept = {name: old[name] for name in ("compiled", "compile_seconds", "compiler_flops", "compiler_bytes")}
    return row | {"plan": new | kept | {"steps": steps}}


def strong_scaling() -> list[dict[str, Any]]:
    """The roofline of one windowed forward of one row on 1 to 64 devices, each time on the fastest mesh."""
    from djax.models.families import published
    from djax.plan.request import Request

    rows = []
    for model in MODELS:
        for kind in KINDS:
            request = Request.of(
                published()[model], topology=f"{kind}:1", batch=1, prompt_length=176, max_new_tokens=1024, name=model)
            rows += [fastest(request, kind, count) for count in COUNTS]
    return rows


def fastest(request: Any, kind: str, count: int) -> dict[str, Any]:
    """Choose among all meshes of two axes, tensor and expert, that divide the model."""
    found = []
    for tensor in (size for size in range(1, count + 1) if count % size == 0):
        sizes = {"tensor": tensor, "expert": count // tensor}
        try:
            shared = request.on_mesh(sizes)
        except ValueError:
            continue
        found.append((shared.steps["window"][1].seconds, sizes, shared))
    if not found:
        return {"model": request.name, "kind": kind, "devices": count, "mesh": None}
    _, sizes, shared = min(found, key=lambda entry: entry[0])
    window, refresh = shared.steps["window"][1], shared.steps["refresh"][1]
    return {
        "model": request.name, "kind": kind, "devices": count, "mesh": sizes,
        "fits": shared.memory.total <= request.machine.memory_bytes, "bytes_per_device": shared.memory.total,
        "window_seconds": window.seconds, "window_compute_seconds": window.compute_seconds,
        "window_exchange_seconds": window.exchange_seconds, "refresh_seconds": refresh.seconds}


# ---- one shard on one device


def time_shard(count: int, *, tiny: bool, kind: str) -> dict[str, Any]:
    """Seconds of one device's part of a generation, its collectives left out, and the modelled ones added.

    What it computes is wrong, because sums are missing; shapes, kernels and the number of steps are those of the mesh.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AbstractMesh

    from benchmarks.forward import loop
    from benchmarks.harness.cases import FULL, TINY
    from benchmarks.scaling.shard import lone_shard
    from djax import cache_policies, strategies
    from djax.devices.sharding import preset_sizes
    from djax.plan.request import Request
    from djax.recipes import Recipe

    sizes, cases = preset_sizes("tp", count), TINY if tiny else FULL
    window, _, batch = cases.main
    block, around = cases.block(window), cases.around
    request = Request.of(
        cases.config, topology=f"{kind}:{count}", batch=batch, prompt_length=cases.prompt,
        max_new_tokens=cases.generated, block_length=block, name="shard", recipe=Recipe(
            strategy=strategies.Quota(steps=1), cache_policy=cache_policies.Vicinity(around // 2, around // 2)))
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    denoise, local_params = lone_shard(cases.config, mesh)
    leaves, structure = jax.tree.flatten(local_params)
    params = jax.tree.unflatten(structure, [
        (0.02 * jax.random.normal(jax.random.key(index), leaf.shape, jnp.float32)).astype(leaf.dtype)
        for index, leaf in enumerate(leaves)])
    rows = np.arange(batch, dtype=np.int32)

    def generate(steps: int) -> float:
        parts = dataclasses.replace(request.parts, strategy=strategies.Quota(steps=np.int32(steps)))
        taken = []
        for _ in range(loop.REPEATS + 1):
            started = time.perf_counter()
            jax.block_until_ready(denoise(params, request.canvas, jax.random.key(0), parts, rows))
            taken.append(time.perf_counter() - started)
        return report.Spread.of(taken[1:]).median

    seconds = tuple(generate(steps) for steps in cases.steps_per_block)
    refresh, alone = loop.split((seconds[0], seconds[1]), cases.steps_per_block, request.canvas.num_blocks)
    modelled = {name: step.exchange_seconds for name, (_, step) in request.on_mesh(sizes).steps.items()}
    return {
        "devices": count, "mesh": sizes, "kind": kind, "tiny": tiny, "device": jax.devices()[0].device_kind,
        "programs": denoise._cache_size(), "generation_seconds": seconds,
        "steps_per_block": cases.steps_per_block, "window_compute_seconds": alone, "refresh_compute_seconds": refresh,
        "modelled_exchange_seconds": modelled, "window_seconds": alone + modelled["window"],
        "tokens_per_second": {
            str(rate): loop.tokens_per_second(
                refresh + modelled["refresh"], alone + modelled["window"], block=block, tokens_per_forward=rate,
                batch=batch) for rate in loop.TOKENS_PER_FORWARD}}


# ---- the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--match", default="", metavar="TEXT", help="compile the plans with this in their names; the "
                        "others on record are estimated again")
    parser.add_argument("--shard", type=int, metavar="N", help="time the program of one of N devices, here, and stop")
    parser.add_argument("--kind", default="h200", choices=KINDS, help="with --shard: whose collectives are modelled")
    parser.add_argument("--tiny", action="store_true", help="with --shard: toy shapes, no figures worth quoting")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory (default benchmarks/results)")
    found = parser.parse_args(arguments)
    parts = [name for name in found.only.split(",") if name]
    if set(parts) - set(PARTS) or (found.shard is not None and found.shard < 2):
        parser.error(f"--only takes {', '.join(PARTS)}; --shard a number of at least 2")
    source = report.provenance("benchmarks.scaling")
    if found.shard is not None:
        shard = time_shard(found.shard, tiny=found.tiny, kind=found.kind) | {"source": source}
        report.save(found.output / f"scaling-shard-{found.shard}.json", shard)
        print(scaling_report.shard_text(shard))
        return 0
    path = found.output / "scaling.json"
    measured = {"devices": on_fake_devices, "strong": strong_scaling}
    for name in (name for name in PARTS if name in parts):
        if name != "plan":
            keep(path, name, {"source": source, "rows": measured[name]()})
            continue
        keep(path, name, [estimated_again(row) for row in on_record(path).get(name, [])])
        for entry in (entry for entry in PLANS if found.match in "/".join(entry)):
            planned = compiled_plan(*entry) | {"source": source}
            keep(path, name, merged(on_record(path).get(name, []), planned))
    record = on_record(path)
    scaling_report.write(found.output, record)
    print(scaling_report.markdown(record))
    return 0


def on_record(path: Path) -> dict[str, Any]:
    """Contents of a file so far."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record


def keep(path: Path, name: str, part: Any) -> None:
    """Replace a part of the record at once; another run may have written others meanwhile."""
    report.save(path, on_record(path) | {name: part})


def merged(rows: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row in place of the one that asked the same, in the order of `PLANS`."""
    order = {entry: index for index, entry in enumerate(PLANS)}
    kept = [old for old in rows if old["asked"] != row["asked"]]
    return sorted([*kept, dict(row)], key=lambda one: order.get(tuple(one["asked"].values()), math.inf))


if __name__ == "__main__":
    sys.exit(main())
