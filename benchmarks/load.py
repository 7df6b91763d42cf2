"""Loading: seconds and peak host memory for a synthetic LLaDA-MoE checkpoint, then one windowed forward.

    python -m benchmarks.load                 # a small checkpoint, seconds
    python -m benchmarks.load --full-size     # 14.7 GB in five shards; needs as much disk, and 18 GB of memory on CPU

The checkpoint has the published keys, shapes and dtype and random values. It is loaded in a fresh process,
so that the peak is the loader's. On CPU the parameters themselves are host memory: the bound is 1.15 times
their bytes. Results go to `benchmarks/results/load.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoint import COMMON, FULL_SIZE, SMALL, tensor_shapes

BOUND = 1.15
WINDOW, BLOCK = 96, 64
RESULTS = Path(__file__).parent / "results" / "load.json"


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: bytes, ones: bytes) -> None:
    """One safetensors file; matrices are windows of `noise` that start at changing places, norms are ones."""
    header, position = {}, 0
    for key, shape in tensors:
        end = position + 2 * elements(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (_, shape) in enumerate(tensors):
            left, start = 2 * elements(shape), 2 * (number * 7919 % 1000)
            while left:
                block = ones[:left] if len(shape) == 1 else noise[start : start + left]
                file.write(block)
                left -= len(block)
                start = 0


def write_checkpoint(directory: Path, config: dict[str, Any], *, shards: int) -> int:
    """A sharded checkpoint of `config`; returns its parameters' bytes."""
    import ml_dtypes
    import numpy as np

    tensors = list(tensor_shapes(config))
    total = sum(2 * elements(shape) for _, shape in tensors)
    values = 0.02 * np.random.default_rng(0).standard_normal(16 * 1024 * 1024, dtype=np.float32)
    noise = values.astype(ml_dtypes.bfloat16).tobytes()
    ones = np.ones(max(config["hidden_size"], 1024), ml_dtypes.bfloat16).tobytes()
    weight_map: dict[str, str] = {}
    shard: list[tuple[str, tuple[int, ...]]] = []
    written, number = 0, 1
    for position, (key, shape) in enumerate(tensors):
        shard.append((key, shape))
        written += 2 * elements(shape)
        if written >= total * number / shards or position == len(tensors) - 1:
            name = f"model-{number:05d}-of-{shards:05d}.safetensors"
            write_shard(directory / name, shard, noise, ones)
            weight_map |= {key: name for key, _ in shard}
            shard, number = [], number + 1
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(COMMON | config | {
        "moe_layer_freq": [1] * config["num_hidden_layers"]}))
    return total


def peak_bytes() -> int:
    """The largest resident size that this process has had (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report VmHWM")


def windowed_forward(config: Any, params: Any, canvas: int) -> dict[str, Any]:
    """One forward of `WINDOW` positions against a cache of `canvas`, with logits of a block."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from djax.models import ModelDenoiser, build

    denoiser = ModelDenoiser(nnx.split(build(config))[0])

    def step(params: Any, tokens: jax.Array, cache: Any) -> jax.Array:
        start = jnp.int32(canvas - WINDOW)
        hidden, _ = denoiser.apply(
            params, denoiser.embed(params, tokens),
            positions=denoiser.prepare_positions(params, start + jnp.arange(WINDOW)[None]),
            key_mask=jnp.ones((1, canvas), bool), window_start=start, write=jnp.ones((1, WINDOW), bool), cache=cache)
        logits = denoiser.unembed(params, hidden[:, :BLOCK])
        return jnp.stack([jnp.min(logits), jnp.max(logits)])

    tokens = jnp.arange(WINDOW, dtype=jnp.int32)[None] % config.vocab_size
    cache = jax.block_until_ready(denoiser.init_cache(params, 1, canvas))
    started = time.perf_counter()
    # XLA's default CPU schedule keeps float32 copies of every layer's experts alive at once.
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    compiled = jax.jit(step).lower(params, tokens, cache).compile(compiler_options=options)
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        low, high = (float(value) for value in compiled(params, tokens, cache))
        seconds.append(time.perf_counter() - started)
    if not (abs(low) < 1e4 and abs(high) < 1e4):
        raise RuntimeError(f"the logits span [{low}, {high}]: something was not loaded")
    return {
        "canvas": canvas, "window": WINDOW, "compile_seconds": compile_seconds, "first_seconds": seconds[0],
        "second_seconds": seconds[1], "logits": [low, high],
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def measure(directory: Path, canvas: int) -> dict[str, Any]:
    """Load in this (fresh) process and measure."""
    import jax

    from convert import load_params
    from djax.devices.sharding import named_leaves

    device = jax.devices()[0]
    before = peak_bytes()
    started = time.perf_counter()
    config, params = load_params(directory, dtype="bfloat16")
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    leaves = named_leaves(params).values()
    nbytes = sum(leaf.nbytes for leaf in leaves)
    return {
        "device": f"{device.platform} {device.device_kind}", "jax": jax.__version__,
        "parameters": sum(leaf.size for leaf in leaves), "parameter_bytes": nbytes,
        "load_seconds": seconds, "gigabytes_per_second": nbytes / seconds / 1e9,
        "host_peak_before_bytes": before, "host_peak_bytes": peak, "host_peak_ratio": peak / nbytes,
        "forward": windowed_forward(config, params, canvas), "host_peak_with_forward_bytes": peak_bytes(),
    }


def machine() -> str:
    """Processor and memory of this machine."""
    from benchmarks.harness import report  # not above: what measures imports as little as it can

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{report.machine()}, {memory / 2**30:.0f} GiB"


def commit() -> str | None:
    """The commit of this checkout, if it is one."""
    from benchmarks.harness import report

    return report.commit()["commit"]


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    forward = result["forward"]
    table = Table(title=f"load: {result['size']} on {result['device']}")
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in (
            ("parameters", f"{result['parameters']:,}"),
            ("parameter bytes", f"{result['parameter_bytes'] / 1e9:.2f} GB"),
            ("shards", str(result["shards"])),
            ("load", f"{result['load_seconds']:.1f} s ({result['gigabytes_per_second']:.2f} GB/s)"),
            ("peak host memory", f"{result['host_peak_bytes'] / 1e9:.2f} GB"),
            ("... / parameter bytes", f"{result['host_peak_ratio']:.3f} (bound {BOUND})"),
            ("forward, compile", f"{forward['compile_seconds']:.1f} s"),
            (f"forward, {forward['window']} of {forward['canvas']}",
             f"{forward['first_seconds']:.2f} s, again {forward['second_seconds']:.2f} s"),
            ("logits", "{:.3f} to {:.3f}".format(*forward["logits"]))):
        table.add_row(what, value)
    Console().print(table)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Load a synthetic checkpoint.")
    parser.add_argument("--full-size", action="store_true", help="LLaDA-MoE-7B-A1B's shapes (14.7 GB)")
    parser.add_argument("--directory", type=Path, help="where to write the checkpoint (default: the temp directory)")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--canvas", type=int, default=1200, help="cache length of the forward (default 1200)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.canvas)))
        return 0
    config = FULL_SIZE if arguments.full_size else SMALL
    directory = Path(tempfile.mkdtemp(prefix="djax-load-", dir=arguments.directory))
    try:
        started = time.perf_counter()
        write_checkpoint(directory, config, shards=arguments.shards)
        write_seconds = time.perf_counter() - started
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.load", "--measure", str(directory), "--canvas", str(arguments.canvas)],
            stdout=subprocess.PIPE, text=True, check=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(directory)
    result = {
        "size": "full" if arguments.full_size else "small", "shards": arguments.shards,
        **json.loads(child.stdout.splitlines()[-1]), "write_seconds": write_seconds, "bound": BOUND,
        "python": platform.python_version(), "machine": machine(), "commit": commit(),
        "command": " ".join(["python -m benchmarks.load", *sys.argv[1:]]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    # A small checkpoint is dwarfed by the interpreter itself: the bound is about the full size.
    if arguments.full_size and result["device"].startswith("cpu") and result["host_peak_ratio"] > BOUND:
        print(f"peak host memory is {result['host_peak_ratio']:.3f} x the parameters, above {BOUND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
