"""One process of several on this machine, each with fake devices, joined by `jax.distributed` on the loopback.

    python -m tests.support.drivers.distributed PORT PROCESS COUNT TASK DIRECTORY

Prints one JSON object, the task's result. All processes of a task run the same code but where it says otherwise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from djax import distributed
from tests.conftest import GOLDENS

DEVICES = 4
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
MASKED = [5, 0, 7, 0, 0, 9]
MASK = [token == 0 for token in MASKED]
CALL = {"max_new_tokens": 12, "block_length": 8, "mask_id": 150}
HEARTBEAT = 10


def recipe() -> Any:
    """Vicinity refresh, soft tokens, credit: most of what a state can hold."""
    import djax

    return djax.recipes.dinfer_credit(threshold=0.02, smoothing=0.3)


def arrays(got: Any) -> dict[str, Any]:
    """A generation as JSON."""
    return {"tokens": [row.tolist() for row in got.tokens], "canvas": got.canvas.tolist(), "nfe": got.nfe.tolist(),
            "commit_step": got.commit_step.tolist()}


def message(call: Callable[[], Any]) -> str:
    """Of the ValueError that it raises."""
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What it returns, called from a worker thread."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@contextmanager
def counted(counts: list[int]) -> Iterator[None]:
    """Appends the bytes that the loader reads."""
    from convert.safetensors_io import SafetensorsReader

    read = SafetensorsReader.read_into

    def counting(self: Any, key: str, start: int, out: np.ndarray) -> None:
        counts.append(out.nbytes)
        read(self, key, start, out)

    SafetensorsReader.read_into = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        SafetensorsReader.read_into = read  # type: ignore[method-assign]


def bytes_held(params: Any) -> dict[str, int]:
    """Bytes of every parameter that this process's devices hold, copies counted once."""
    from djax.devices.sharding import named_leaves

    return {name: sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
            for name, leaf in named_leaves(params).items()}


def whole_generation(process: int, directory: Path) -> dict[str, Any]:
    """Load, generate, infill, stream, save, load again."""
    import convert
    import djax
    from djax.devices.sharding import make_mesh

    mesh = make_mesh({"expert": 2, "tensor": 4})
    read: list[int] = []
    with counted(read):
        lm = djax.load(GOLDENS, dtype="float32", mesh=mesh)
    own = bytes_held(lm.params)
    result: dict[str, Any] = {"devices": jax.device_count(), "read": sum(read), "held": sum(own.values())}
    arguments = {"recipe": recipe(), **CALL}
    result["all"] = arrays(lm.generate(PROMPTS, key=3, temperature=1.0, **arguments))
    compiled = lm.compile_count
    for source in (0, 1):
        given = PROMPTS if process == source else None
        result[f"only {source}"] = arrays(lm.generate(given, key=3, temperature=1.0, **arguments))
    result["compiled again"] = lm.compile_count - compiled
    result["errors"] = {
        "prompts": message(lambda: lm.generate([[1, 2, 3 + process]], **arguments)),
        "none": message(lambda: lm.generate(None, **arguments)),
        "key": message(lambda: lm.generate(PROMPTS, key=process, **arguments)),
        "recipe": message(lambda: lm.generate(
            PROMPTS, **(arguments | {"recipe": djax.recipes.fast_dllm(threshold=0.5 + process / 10)}))),
        "call": message(lambda: lm.generate(PROMPTS, **arguments) if process else lm.logits(PROMPTS)),
        "one fails": message(lambda: lm.generate([[1, 2, 999]] if process else PROMPTS, **arguments)),
        "both fail": message(lambda: lm.generate([[1, 2, 999]], **arguments))}
    infilled = lm.infill(MASKED if process else None, MASK if process else None, recipe=recipe(), block_length=8,
                         mask_id=150)
    result["infill"] = [row.tolist() for row in infilled.tokens]
    steps = list(lm.stream(None if process else PROMPTS, key=3, temperature=1.0, **arguments))
    result["stream"] = steps[-1].tokens.tolist()
    result["logits"] = lm.logits(None if process else PROMPTS[:1])[0, -1].tolist()
    result["threads"] = in_a_thread(lambda: arrays(lm.generate(PROMPTS, key=3, temperature=1.0, **arguments)))
    saved = convert.save(directory / "saved", lm.params, config=lm.config)
    result["save over"] = message(lambda: convert.save(directory / "saved", lm.params, config=lm.config))
    convert.convert(GOLDENS, directory / "converted", mesh=mesh)
    again = djax.load(saved, mesh=make_mesh({"data": 2, "tensor": 4}, axis_type=AxisType.Explicit))
    result["again"] = arrays(again.generate(PROMPTS, key=3, temperature=1.0, **arguments))
    return result


def reading(process: int, directory: Path) -> dict[str, Any]:
    """Bytes that this process reads of a checkpoint whose rows are long enough to be cut, and of a converted one."""
    import convert
    from djax.devices.sharding import make_mesh, named_leaves

    read: list[int] = []
    with counted(read):
        _, params = convert.load_params(directory / "long", mesh=make_mesh({"tensor": 2, "expert": 4}))
    held = bytes_held(params)
    leaves = named_leaves(params)
    short = sum(leaf.nbytes - held[name] for name, leaf in leaves.items() if name.endswith("attention.output"))
    with np.load(directory / "expected.npz") as expected:
        equal = all(np.array_equal(np.asarray(shard.data), expected[name][shard.index])
                    for name, leaf in leaves.items() for shard in leaf.addressable_shards)
    # a chunk that two devices hold is read once if they ask at the same time: the least of several is what is needed
    reads = []
    for _ in range(4):
        before = bytes_by_tensorstore()
        _, restored = convert.load_params(directory / "converted", mesh=make_mesh({"expert": 4, "tensor": 2}))
        jax.block_until_ready(restored)
        reads.append(bytes_by_tensorstore() - before)
    return {"read": sum(read), "held": sum(held.values()), "short rows": short, "equal": equal,
            "whole": sum(leaf.nbytes for leaf in leaves.values()), "restore read": min(reads),
            "restore held": sum(bytes_held(restored).values())}


def bytes_by_tensorstore() -> int:
    """Bytes of arrays saved by Orbax that this process has read so far, by the count of TensorStore itself."""
    import tensorstore

    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def forever(process: int, directory: Path) -> dict[str, Any]:
    """Generate until the process dies."""
    import djax
    from djax.devices.sharding import make_mesh

    lm = djax.load(GOLDENS, dtype="float32", mesh=make_mesh({"expert": 2, "tensor": 4}))
    while True:
        lm.generate(PROMPTS, recipe=djax.recipes.llada(), max_new_tokens=32, block_length=32, mask_id=150)
        print("generated", flush=True)


def waiting(process: int, directory: Path) -> dict[str, Any]:
    """Process 0 waits for prompts that process 1 never gives."""
    import djax
    from djax.devices.sharding import make_mesh

    lm = djax.load(GOLDENS, dtype="float32", mesh=make_mesh({"expert": 2, "tensor": 4}))
    print("generated", flush=True)
    if process:
        time.sleep(600)
    lm.generate(None, recipe=djax.recipes.llada(), **CALL)
    return {}


def leaving(process: int, directory: Path) -> dict[str, Any]:
    """Process 0 waits for prompts; process 1 raises an error and ends."""
    import djax
    from djax.devices.sharding import make_mesh

    lm = djax.load(GOLDENS, dtype="float32", mesh=make_mesh({"expert": 2, "tensor": 4}))
    if process:
        raise KeyError("this one has had enough")
    lm.generate(None, recipe=djax.recipes.llada(), **CALL)
    return {}


TASKS = {"whole": whole_generation, "reading": reading, "forever": forever, "waiting": waiting,
         "leaving": leaving}


def main() -> None:
    port, process, count, task, directory = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", DEVICES)
    distributed.initialize(
        f"127.0.0.1:{port}", num_processes=int(count), process_id=int(process), initialization_timeout=60,
        heartbeat_timeout=HEARTBEAT, shutdown_timeout=20)
    result = TASKS[task](int(process), Path(directory))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
