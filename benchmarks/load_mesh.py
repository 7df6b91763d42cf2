"""Loading onto a mesh: what each process reads, holds, and needs on top, for a synthetic LLaDA-MoE checkpoint.

    python -m benchmarks.load_mesh                                       # 1 GB, two processes of four devices each
    python -m benchmarks.load_mesh --mesh expert=8 --processes 4
    python -m benchmarks.load_mesh --full-size --mesh tensor=4,expert=2

The devices are fake ones on the CPU, so that parameters are host memory: what a process needs on top of those it holds
is compared with its part of the largest tensor. Both formats are loaded, the safetensors files and what `djax convert`
writes, each in fresh processes that `jax.distributed` joins on the loopback. Results go to
`benchmarks/results/load_mesh.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoint import FULL_SIZE, SMALL
from benchmarks.load import commit, machine, peak_bytes, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "load_mesh.json"
MEDIUM = SMALL | {
    "vocab_size": 65536, "hidden_size": 1024, "num_hidden_layers": 8, "num_experts": 32,
    "expert_intermediate_size": 512}
SPARE_BYTES = 64 * 2**20
"""Beside the largest tensor's part: a chunk of 16 MiB on its way from a file, and the allocator's leftovers."""
ORBAX_BYTES = 256 * 2**20
"""That Orbax may have on its way from the disk, or the largest tensor in float32 if that is more."""


def bytes_read() -> int:
    """By this process so far, from the disk or from the system's memory of it."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def resident_bytes() -> int:
    """Now, after telling the system to forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measure(directory: Path, mesh: str, *, process: int, processes: int, port: int) -> dict[str, Any]:
    """Load in this process, one of several."""
    import jax

    from djax import distributed
    from djax.devices.sharding import make_mesh, named_leaves, parse_mesh

    sizes = parse_mesh(mesh, devices=0) if "=" in mesh else {}
    devices = math.prod(sizes.values())
    if not sizes or devices % processes:
        raise ValueError(f"mesh: got {mesh!r} for {processes} processes; allowed axes whose sizes multiply to a "
                         "multiple of these, such as tensor=4,expert=2")
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
    import convert

    made = make_mesh(sizes)
    convert.describe(directory)
    jax.block_until_ready(jax.device_put(0.0, jax.local_devices()[0]))
    before, read_before, started = resident_bytes(), bytes_read(), time.perf_counter()
    _, params = convert.load_params(directory, mesh=made)
    jax.block_until_ready(params)
    seconds, read, peak = time.perf_counter() - started, bytes_read() - read_before, peak_bytes()
    leaves = named_leaves(params).values()
    own = [sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values()) for leaf in leaves]
    return {
        "process": process, "devices": len(jax.local_devices()), "whole_bytes": sum(leaf.nbytes for leaf in leaves),
        "held_bytes": sum(own), "read_bytes": read, "largest_part_bytes": max(own),
        "largest_in_float32_bytes": max(4 * leaf.size for leaf in leaves), "resident_before_bytes": before,
        "peak_bytes": peak, "on_top_bytes": peak - before - sum(own), "load_seconds": seconds}


def load_in_processes(directory: Path, mesh: str, processes: int) -> list[dict[str, Any]]:
    """Measurements of so many fresh processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load_mesh", "--measure", str(directory), "--mesh", mesh, "--processes",
             str(processes), "--process", str(process), "--port", str(port)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        for process in range(processes)]
    results = []
    for child in running:
        out, _ = child.communicate()
        if child.returncode:
            raise RuntimeError(f"a process ended with {child.returncode}; its message is above")
        results.append(json.loads(out.splitlines()[-1]))
    return results


def within_bounds(results: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether no process needed more on top of its parameters than its part of the largest tensor; with Orbax, than
    what it may have on its way."""
    direct = all(row["on_top_bytes"] <= row["largest_part_bytes"] + SPARE_BYTES for row in results["safetensors"])
    orbax = all(row["on_top_bytes"] <= max(row["largest_in_float32_bytes"], ORBAX_BYTES) + SPARE_BYTES
                for row in results["converted"])
    return direct and orbax


def run(config: dict[str, Any], mesh: str, processes: int, *, directory: Path | None) -> dict[str, Any]:
    """Write a checkpoint, convert it in a process of its own, and load both."""
    place = Path(tempfile.mkdtemp(prefix="djax-load-", dir=directory))
    try:
        source = place / "source"
        source.mkdir()
        write_checkpoint(source, config, shards=5)
        subprocess.run([sys.executable, "-m", "convert", str(source), str(place / "converted")], check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        return {name: load_in_processes(path, mesh, processes)
                for name, path in (("safetensors", source), ("converted", place / "converted"))}
    finally:
        shutil.rmtree(place)


def show(results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """A row for each format and process."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("MB", "process", "whole", "held", "read", "largest part", "on top", "seconds"):
        table.add_column(name, justify="left" if name == "MB" else "right", no_wrap=True)
    for name, rows in results.items():
        for row in rows:
            numbers = [f"{row[f'{key}_bytes'] / 1e6:,.0f}"
                       for key in ("whole", "held", "read", "largest_part", "on_top")]
            table.add_row(name, str(row["process"]), *numbers, f"{row['load_seconds']:.1f}")
    Console().print(table)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_mesh", description="Load onto a mesh.")
    parser.add_argument("--full-size", action="store_true", help="LLaDA-MoE-7B-A1B's shapes (14.7 GB, twice)")
    parser.add_argument("--mesh", default="tensor=4,expert=2", help="default tensor=4,expert=2")
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    parser.add_argument("--directory", type=Path, help="where to write the checkpoints (default: the temp directory)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    for name, kind in (("--measure", Path), ("--process", int), ("--port", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.mesh, process=arguments.process,
                                 processes=arguments.processes, port=arguments.port)))
        return 0
    results = run(FULL_SIZE if arguments.full_size else MEDIUM, arguments.mesh, arguments.processes,
                  directory=arguments.directory)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({
        "size": "full" if arguments.full_size else "medium", "mesh": arguments.mesh, **results,
        "within_bounds": within_bounds(results), "python": platform.python_version(), "machine": machine(),
        "commit": commit(), "command": " ".join(["python -m benchmarks.load_mesh", *sys.argv[1:]])}, indent=1) + "\n")
    show(results, f"{arguments.mesh} in {arguments.processes} processes")
    if not within_bounds(results):
        print("a process needed more host memory than its bound", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
