"""djax: a JAX engine for masked-diffusion language models.

    lm = djax.load("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", dtype="bfloat16")
    out = lm.generate(["..."], recipe=djax.recipes.dinfer(threshold=0.8))

`denoise` is the functional core, for use inside your own `jax.jit`. Names are imported on first use, so
that the command line can answer without jax.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax import (
        cache_policies,
        distributed,
        proposals,
        recipes,
        rl,
        schedules,
        sharding,
        smoothing,
        stopping,
        strategies,
        testing,
        transforms,
    )
    from djax.api import DiffusionLM, load
    from djax.canvas import Canvas
    from djax.denoise import denoise
    from djax.generation import Generation, StreamStep
    from djax.models.kernels import Kernels
    from djax.state import Parts, Result, StopReason

__version__ = "0.1.0"

__all__ = [
    "Canvas",
    "DiffusionLM",
    "Generation",
    "Kernels",
    "Parts",
    "Result",
    "StopReason",
    "StreamStep",
    "cache_policies",
    "denoise",
    "distributed",
    "load",
    "proposals",
    "recipes",
    "rl",
    "schedules",
    "sharding",
    "smoothing",
    "stopping",
    "strategies",
    "testing",
    "transforms",
]

_HOME = {"Canvas": "canvas", "DiffusionLM": "api", "Generation": "generation",
         "Kernels": "models.kernels", "Parts": "state", "Result": "state",
         "StopReason": "state", "StreamStep": "generation", "denoise": "denoise", "load": "api"}


class _Package(ModuleType):
    """Importing the module `djax.denoise` would put it in the place of the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.denoise if name == "denoise" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'djax' has no attribute {name!r}")
    home = importlib.import_module(f"djax.{_HOME.get(name, name)}")
    return getattr(home, name) if name in _HOME else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
