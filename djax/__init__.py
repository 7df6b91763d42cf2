"""djax: a JAX engine for masked-diffusion language models.

    lm = djax.load("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", dtype="bfloat16")
    out = lm.generate(["..."], recipe=djax.recipes.dinfer(threshold=0.8))

`denoise` is the functional core, for use inside your own `jax.jit`. Names are imported on first use, so
that the command line can answer without jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax import plan, recipes, rl, tasks, testing, train
    from djax.api import DiffusionLM, load
    from djax.contracts import struct, types
    from djax.contracts.canvas import Canvas
    from djax.devices import distributed, sharding
    from djax.engine.options import Sampling
    from djax.engine.results import Generation
    from djax.engine.streaming import StreamStep
    from djax.loop.denoise import denoise
    from djax.loop.state import Parts, Result, StopReason
    from djax.models import Kernels
    from djax.parts import (
        cache_policies,
        proposals,
        schedules,
        smoothing,
        stopping,
        strategies,
        transforms,
    )

__version__ = "0.1.0"

__all__ = [
    "Canvas",
    "DiffusionLM",
    "Generation",
    "Kernels",
    "Parts",
    "Result",
    "Sampling",
    "StopReason",
    "StreamStep",
    "cache_policies",
    "denoise",
    "distributed",
    "load",
    "plan",
    "proposals",
    "recipes",
    "rl",
    "schedules",
    "sharding",
    "smoothing",
    "stopping",
    "strategies",
    "struct",
    "tasks",
    "testing",
    "train",
    "transforms",
    "types",
]

_HOME = {
    "Canvas": "contracts.canvas", "DiffusionLM": "api", "Generation": "engine.results", "Kernels": "models",
    "Parts": "loop.state", "Result": "loop.state", "Sampling": "engine.options",
    "StopReason": "loop.state", "StreamStep": "engine.streaming",
    "denoise": "loop.denoise", "load": "api"}
_ROOM = {
    "cache_policies": "parts", "proposals": "parts", "schedules": "parts", "smoothing": "parts", "stopping": "parts",
    "strategies": "parts", "transforms": "parts", "distributed": "devices", "sharding": "devices",
    "struct": "contracts", "types": "contracts"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'djax' has no attribute {name!r}")
    if name in _HOME:
        return getattr(importlib.import_module(f"djax.{_HOME[name]}"), name)
    return importlib.import_module(f"djax.{_ROOM[name]}.{name}" if name in _ROOM else f"djax.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
