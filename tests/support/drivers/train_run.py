"""A small training run in a process of its own, which tests may kill, starve of disk, or give more devices.

    python -m tests.support.drivers.train_run DIRECTORY STEPS DEVICES LIMIT [OBJECTIVE]

Prints the digest of the final weights and the losses. DIRECTORY "-" keeps nothing; LIMIT bounds the bytes of any
file written after the first checkpoint (0 is no bound). OBJECTIVE is "masked" or "block".
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jax

CONFIG = {
    "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "num_experts": 4, "experts_per_token": 2, "expert_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_positions": 64, "mask_id": 63, "eos_id": 0, "pad_id": 0, "dtype": "float32"}


def digest(params: Any) -> str:
    """One string for all weights, bit for bit."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        total.update(jax.device_get(leaf).tobytes())
    return total.hexdigest()


def run(directory: Path | None, steps: int, *, devices: int = 1, report: Any = None, accumulate: int = 1,
        objective: str = "masked") -> Any:
    """The final state."""
    import numpy as np
    import optax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from djax.devices.sharding import shardings
    from djax.models import init_params, logical_axes
    from djax.models.config import LladaMoeConfig
    from djax.train import (
        Schedule,
        block_diffusion_loss,
        fit,
        init_state,
        make_step,
        masked_diffusion_loss,
        with_places,
    )
    from djax.train.data import FixedSource, batcher

    config = LladaMoeConfig(**CONFIG)
    graphdef, params = init_params(config, jax.random.key(0))
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 63, 4).tolist(), rng.integers(1, 63, int(rng.integers(3, 9))).tolist())
             for _ in range(40)]
    batches = batcher(
        FixedSource(pairs, seed=1), batch_size=16, row_length=32, eos_id=0, longest_tail=4, seed=2)
    if objective == "block":
        batches = with_places(batches)
    placed = None
    if devices > 1:
        mesh = jax.make_mesh((devices // 2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        placed = shardings(logical_axes(config), params, mesh=mesh)
        rows, host = NamedSharding(mesh, PartitionSpec("data")), batches
        batches = lambda update: jax.device_put(host(update), rows)  # noqa: E731
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    step = make_step(graphdef, optimizer, mask_id=63, accumulate=accumulate, objective={
        "masked": masked_diffusion_loss, "block": block_diffusion_loss}[objective])
    return fit(
        init_state(params, optimizer, shardings=placed), step, batches, jax.random.key(7), directory=directory,
        schedule=Schedule(steps=steps, log_every=1, save_every=1), meta={"model": CONFIG}, report=report)


def main() -> None:
    directory, steps, devices, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    objective = (sys.argv[5:] or ["masked"])[0]
    jax.config.update("jax_num_cpu_devices", devices)
    losses = []

    def report(done: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        print(f"update {done}", flush=True)
        if limit and done == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    try:
        state = run(None if directory == "-" else Path(directory), steps, devices=devices, report=report,
                    objective=objective)
    except OSError as error:
        print(f"OSError: {error}")
        return
    print(json.dumps({"digest": digest(state.params), "losses": losses, "devices": jax.device_count()}))


if __name__ == "__main__":
    main()
