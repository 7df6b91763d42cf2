"""Mosaic GPU kernels on a CPU."""

from __future__ import annotations

from typing import Any


def gpu_interpreter(interpret: bool) -> Any:
    """The value of `interpret` for `plgpu.kernel`: None compiles."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public since jax 0.11 only

    return InterpretGPUParams()
