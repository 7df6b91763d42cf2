"""The architectures, and how a model becomes a denoiser. Names are imported on first use: flags need none of jax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax.devices.parallel import Parallel, parallel_on
    from djax.models.builder import abstract_params, build, init_params, logical_axes
    from djax.models.denoiser import Guided, ModelDenoiser
    from djax.models.kernels import Kernels, kernels_on
    from djax.models.llada2_moe import Llada2Moe
    from djax.models.llada_moe import LladaMoe

_HOME = {
    "Guided": "djax.models.denoiser", "Kernels": "djax.models.kernels", "Llada2Moe": "djax.models.llada2_moe",
    "LladaMoe": "djax.models.llada_moe", "ModelDenoiser": "djax.models.denoiser", "Parallel": "djax.devices.parallel",
    "abstract_params": "djax.models.builder", "build": "djax.models.builder", "init_params": "djax.models.builder",
    "kernels_on": "djax.models.kernels", "logical_axes": "djax.models.builder", "parallel_on": "djax.devices.parallel"}

__all__ = [
    "Guided", "Kernels", "Llada2Moe", "LladaMoe", "ModelDenoiser", "Parallel", "abstract_params", "build",
    "init_params", "kernels_on", "logical_axes", "parallel_on",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'djax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
