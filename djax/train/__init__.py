"""Training: losses of masked or block diffusion in a resumable loop on optax.

Names are imported on first use. `djax.train.tasks` is `djax.tasks`, by its former name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djax.train.block import BlockBatch, block_diffusion_loss, with_places
    from djax.train.checkpoints import Checkpoints
    from djax.train.config import TrainConfig, make_optimizer, read_config
    from djax.train.loop import Schedule, fit
    from djax.train.loss import Batch, Losses, LossWeights, masked_diffusion_loss, row_losses, sample_masks
    from djax.train.step import Report, TrainState, init_state, make_step

__all__ = [
    "Batch", "BlockBatch", "Checkpoints", "LossWeights", "Losses", "Report", "Schedule", "TrainConfig", "TrainState",
    "block_diffusion_loss", "fit", "init_state", "make_optimizer", "make_step", "masked_diffusion_loss", "read_config",
    "row_losses", "sample_masks", "with_places",
]

_HOME = {
    "BlockBatch": "block", "block_diffusion_loss": "block", "with_places": "block",
    "Checkpoints": "checkpoints", "TrainConfig": "config", "make_optimizer": "config", "read_config": "config",
    "Schedule": "loop", "fit": "loop", "Report": "step", "TrainState": "step", "init_state": "step",
    "make_step": "step",
}


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return importlib.import_module("djax.tasks")
    if name not in __all__:
        raise AttributeError(f"module 'djax.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"djax.train.{_HOME.get(name, 'loss')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
