"""The networks as denoisers. Names are imported on first use: flags need none of jax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax.devices.parallel import Parallel, parallel_on
    from djax.models.builder import abstract_params, build, init_params, logical_axes
    from djax.models.denoiser import Guided, ModelDenoiser
    from djax.models.layers.kernels import Kernels, kernels_on

_HOME = {
    "Guided": "models.denoiser", "Kernels": "models.layers.kernels", "ModelDenoiser": "models.denoiser",
    "Parallel": "devices.parallel", "abstract_params": "models.builder", "build": "models.builder",
    "init_params": "models.builder",
    "kernels_on": "models.layers.kernels", "logical_axes": "models.builder", "parallel_on": "devices.parallel"}

__all__ = [
    "Guided", "Kernels", "ModelDenoiser", "Parallel", "abstract_params", "build", "init_params", "kernels_on",
    "logical_axes", "parallel_on",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'djax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"djax.{_HOME[name]}"), name)
