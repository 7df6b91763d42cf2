"""Trajectory compression (dInfer, arXiv 2510.08666, appendix C.1): a model learns to take several of its steps at once.

The model decodes prompts and keeps the runs whose answer a verifier accepts. Each is a sequence of states, from all
masked to all known. Training draws two of them and asks, at the earlier, for the tokens known at the later.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import struct
from djax.contracts.types import Params
from djax.engine.results import Generation
from djax.errors import check_integer
from djax.train.loss import Batch, Losses, LossWeights, losses_at

NEVER = -1
"""`commit_step` of what no step has decoded: the prompt, and what a row that stopped early left masked."""


@struct.dataclass
class TrajectoryBatch(Batch):
    """Decoded rows: `tokens` as they ended, `is_answer` where the canvas was open."""

    commit_step: Int[Array, "B T"]
    """The row's step, from 0, that decoded each token; `NEVER` for others."""


def draw_states(
    key: Key[Array, ""], commit_step: Int[Array, "B T"], is_answer: Bool[Array, "B T"]
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """The positions masked at a random state of each row, and those of them known at a random later one.

    The earlier state is uniform over a row's steps, the later one uniform over what follows it, the end included.
    A row without steps has nothing to learn.
    """
    first_key, second_key = jax.random.split(key)
    steps = jnp.max(jnp.where(is_answer, commit_step, NEVER), axis=1) + 1

    def below(key: Key[Array, ""], limit: Int[Array, " B"]) -> Int[Array, " B"]:
        place = jax.random.uniform(key, limit.shape, jnp.float32) * limit.astype(jnp.float32)
        return jnp.floor(place).astype(jnp.int32)

    first = below(first_key, steps)
    further = below(second_key, steps - first) + 1
    decoded = is_answer & (commit_step >= 0)
    open_still = decoded & (commit_step >= first[:, None])
    masked = open_still | (is_answer & ~decoded)
    return masked, open_still & (commit_step < (first + further)[:, None])


def compression_loss(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: TrajectoryBatch,
    key: Key[Array, ""],
    *,
    mask_id: int | Int[Array, ""],
    weights: LossWeights = LossWeights(),
    remat: bool = False,
    vocab_chunk: int = 8192,
) -> tuple[Float[Array, ""], Losses]:
    """The loss at random pairs of states: mean over rows of a row's mean cross-entropy, nats per token.

    Arguments and result as of `masked_diffusion_loss`, with which `make_step` can exchange it; `diffusion` is the
    cross-entropy, of the tokens between the two states (dInfer, equation of appendix C.1).
    """
    masked, asked = draw_states(key, batch.commit_step, batch.is_answer & batch.valid)
    counts = jnp.maximum(asked.sum(axis=1, dtype=jnp.float32), 1.0)
    return losses_at(
        graphdef, params, batch, masked,
        lambda log_probs: -jnp.sum(jnp.where(asked, log_probs, 0.0), axis=1) / counts,
        mask_id=mask_id, weights=weights, remat=remat, vocab_chunk=vocab_chunk)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Decoded rows of one length, on the host. Columns as of `Generation`: left padding, prompt, answer."""

    tokens: Int[np.ndarray, "N T"]
    is_answer: Bool[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    commit_step: Int[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.tokens)

    def save(self, path: Path) -> None:
        """Write an .npz file, complete or not at all. Raises OSError if it cannot be."""
        fresh = path.with_name(path.name + ".new")
        with fresh.open("wb") as file:
            np.savez_compressed(file, **vars(self))
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read what `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged; names the file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{name: file[name] for name in ("tokens", "is_answer", "valid", "commit_step")})
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: got no trajectories ({error}); allowed a file of this program; remove it to "
                             "sample again") from error


def kept(generation: Generation, accepted: Sequence[bool]) -> Trajectories:
    """The rows of a generation whose answer was accepted.

    Args:
        generation: from a recipe that only commits.
        accepted: a verdict for each row.

    Raises:
        ValueError: the number of verdicts is not the number of rows.
    """
    if len(accepted) != len(generation.tokens):
        raise ValueError(f"accepted: got {len(accepted)} verdicts; allowed one for each of the "
                         f"{len(generation.tokens)} rows")
    rows = np.asarray(accepted, bool)
    return Trajectories(
        tokens=generation.canvas[rows], is_answer=generation.is_open[rows], valid=generation.canvas_mask[rows],
        commit_step=generation.commit_step[rows])


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """One set of several, the rows padded on the left to the longest.

    Raises:
        ValueError: there is not one row.
    """
    length = max((part.tokens.shape[1] for part in parts if len(part)), default=0)
    if not length:
        raise ValueError("trajectories: got none; allowed at least one accepted answer; train the model further, or "
                         "sample more prompts")

    def joined(name: str, fill: int) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate([
            np.pad(array, ((0, 0), (length - array.shape[1], 0)), constant_values=fill) for array in arrays])

    return Trajectories(tokens=joined("tokens", 0), is_answer=joined("is_answer", False),
                        valid=joined("valid", False), commit_step=joined("commit_step", NEVER))


def trajectory_batches(
    trajectories: Trajectories, *, batch_size: int, seed: int
) -> Callable[[int], TrajectoryBatch]:
    """The batch of update n, from n alone: pass after pass over the rows, each shuffled anew.

    Raises:
        ValueError: there are fewer rows than `batch_size`.
    """
    count = len(trajectories)
    check_integer("batch_size", batch_size, 1, count, advice="there are as many trajectories")
    per_pass = count // batch_size

    def batch(update: int) -> TrajectoryBatch:
        number, place = divmod(update, per_pass)
        order = np.random.default_rng([seed, number]).permutation(count)
        rows = order[place * batch_size : (place + 1) * batch_size]
        return TrajectoryBatch(**{name: jnp.asarray(array[rows]) for name, array in vars(trajectories).items()})

    return batch
