"""Hardware that is not here: devices to compile for ahead of time, on a machine that has none of them.

Compiled programs say how much memory they take, which kernels and collectives they hold, and whether a kernel is
accepted; they cannot be run. The compilers come with the extra `aot`.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from djax.errors import ArgumentError, shown

GPUS = ("h200",)
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")

CORES_PER_CHIP = {"v4": 2, "tpu7x": 2}
"""Devices of one chip, as JAX counts them here; one for all others."""
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
SIZES = {"h200": ("1", "2", "4", "8"), "v5e": _PLANES, "v6e": _PLANES, "v4": _CUBES, "v5p": _CUBES, "tpu7x": _CUBES}
"""Usual sizes of every kind, the smallest first. There are no others of a TPU, but for cubes of 4x4x4 chips."""

_NAME = re.compile(r"(?P<kind>[a-z0-9]+):(?P<shape>[1-9][0-9]*(x[1-9][0-9]*)*)")


def missing_compiler(name: str) -> str | None:
    """The reason why programs for this topology cannot be compiled here, or None if they can.

    Raises:
        ValueError: not the name of a topology.
    """
    kind, _ = _parse(name)
    if kind in TPUS:
        return None if importlib.util.find_spec("libtpu") else "libtpu is not installed: pip install 'djax[aot]'"
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "JAX's CUDA plugin is not installed: pip install 'djax[aot]'"
    if jax.config.jax_platforms not in ("cpu", "cuda") and jax.default_backend() != "gpu":  # type: ignore[attr-defined]
        return "JAX looks for the CUDA plugin only where a GPU is, or with JAX_PLATFORMS=cpu"
    return None


def device_count(name: str) -> int:
    """Devices of a topology. Needs no compiler.

    Raises:
        ValueError: not the name of a topology.
    """
    kind, shape = _parse(name)
    return math.prod(map(int, shape.split("x"))) * CORES_PER_CHIP.get(kind, 1)


def larger_than(name: str) -> tuple[str, ...]:
    """Topologies of the same kind with more devices, the smallest first.

    Raises:
        ValueError: not the name of a topology.
    """
    kind, count = _parse(name)[0], device_count(name)
    return tuple(larger for size in SIZES[kind] if device_count(larger := f"{kind}:{size}") > count)


@functools.cache
def devices(name: str) -> tuple[Any, ...]:
    """The devices of a topology: "h200:8" (GPUs of one process), "v5e:2x4", "v5p:2x2x1" (chips of a pod's slice).

    Raises:
        ValueError: not the name of a topology, or the compiler has no such slice.
        RuntimeError: its compiler is not installed (`missing_compiler` says so beforehand).
    """
    kind, shape = _parse(name)
    reason = missing_compiler(name)
    if reason is not None:
        raise RuntimeError(f"topology {name!r}: {reason}")
    if kind in GPUS:
        target = importlib.resources.files("djax.assets").joinpath("targets", f"{kind}.pbtxt").read_text("utf-8")
        return tuple(topologies.get_topology_desc(
            platform="cuda", topology_name=f"1x1x{shape}", topology=f"1x1x{shape}", target_config=target).devices)
    # libtpu asks a cloud's metadata server who it is unless it is told
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                            ("TPU_ACCELERATOR_TYPE", "v5litepod-8"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(variable, value)
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **one_chip).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ArgumentError("topology", f"{shown(name)}, which libtpu cannot lay out ({str(error).splitlines()[0]})",
                            allowed="a slice that it knows", advice="update libtpu, or take another one") from error


def compile_for(
    device: Any, function: Callable[..., Any], operands: Sequence[Any], *, donate: tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """`function` compiled for one device of a topology.

    Args:
        device: from `devices`.
        function: traceable. What it asks of the platform (`implementation=None`) is answered for this device.
        operands: trees of arrays, or of anything with a `shape` and a `dtype`.
        donate: positions of operands whose memory the results may use.
        options: XLA's compiler options.

    Returns:
        A `jax.stages.Compiled`: `memory_analysis()`, `as_text()`.
    """
    place = SingleDeviceSharding(device)
    shaped = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tuple(operands))
    with jax.default_device(device):
        lowered = jax.jit(function, donate_argnums=donate, out_shardings=place).lower(*shaped)
        return lowered.compile(compiler_options=options)


def _parse(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in (*GPUS, *TPUS) or (match["kind"] in GPUS and "x" in match["shape"]):
        raise ArgumentError(
            "topology", shown(name), allowed=f"one of {', '.join(GPUS)} with a number of devices, or one of "
            f"{', '.join(TPUS)} with a slice", advice="such as h200:8 or v5e:2x4")
    kind, shape = match["kind"], match["shape"]
    if kind in TPUS and shape not in SIZES[kind] and not _is_of_cubes(kind, shape):
        more = ", or three multiples of 4" if SIZES[kind] is _CUBES else ""
        raise ArgumentError("topology", f"{shown(name)}, a slice that there is not",
                            allowed=f"{kind} with {', '.join(SIZES[kind])}{more}", advice="pick one of them")
    return kind, shape


def _is_of_cubes(kind: str, shape: str) -> bool:
    """Whether a slice is made of whole racks, which optical switches put together."""
    sides = [int(side) for side in shape.split("x")]
    return SIZES[kind] is _CUBES and len(sides) == 3 and all(side % 4 == 0 for side in sides)
