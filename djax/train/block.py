"""Block diffusion as a training loss (BD3-LM, arXiv 2503.09573): every answer token of a row is learned in one pass.

The masked-diffusion loss learns from the few positions that a draw masks and that what is left can tell. Here a row is
read twice: as it is, and with its answer cut into blocks and noised. A noised block sees the row before it as it is and
itself as noised, so that each block of an answer is learned as generation block by block would meet it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import struct
from djax.contracts.types import Params
from djax.train.data import BUCKET
from djax.train.loss import SMALLEST_NOISE, Batch, Losses, LossWeights, router_losses, spread_evenly

LONGEST_BLOCK = 32
"""Bound on the mean length of a row's blocks, which is drawn from 1 to it, its logarithm uniform."""


@struct.dataclass
class BlockBatch(Batch):
    """Rows, and where their answers are."""

    places: Int[Array, "B A"]
    """The positions of a row's answer tokens in rising order; T behind the last."""


def with_places(batches: Callable[[int], Batch]) -> Callable[[int], BlockBatch]:
    """Add the places of what is learned to rows; A is rounded up to a multiple of `BUCKET`."""
    def batch(update: int) -> BlockBatch:
        rows = batches(update)
        is_answer = np.asarray(rows.is_answer)
        length = is_answer.shape[1]
        most = max(int(is_answer.sum(axis=1).max()), 1)
        ordered = np.sort(np.where(is_answer, np.arange(length), length), axis=1)[:, : -(-most // BUCKET) * BUCKET]
        return BlockBatch(tokens=rows.tokens, is_answer=rows.is_answer, valid=rows.valid,
                          places=jnp.asarray(ordered.astype(np.int32)))

    return batch


@struct.dataclass
class Blocks:
    """A draw of blocks and noise for the answer tokens of each row."""

    number: Int[Array, "B A"]
    """Block of each token, from 1."""
    noise: Float[Array, "B A"]
    """Its block's noise level."""
    masked: Bool[Array, "B A"]


def draw_blocks(key: Key[Array, ""], is_token: Bool[Array, "B A"], *, longest: int = LONGEST_BLOCK) -> Blocks:
    """Blocks that end at each token with one probability a row, a noise level t ~ U(0, 1) for each, and the masks."""
    rows, tokens = is_token.shape
    for_rate, for_ends, for_levels, for_masks = jax.random.split(key, 4)
    rate = longest ** -spread_evenly(for_rate, rows)[:, None]
    ends = jax.random.uniform(for_ends, is_token.shape, jnp.float32) < rate
    number = 1 + jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends.astype(jnp.int32)
    levels = SMALLEST_NOISE + (1 - SMALLEST_NOISE) * jax.random.uniform(for_levels, (rows, tokens + 1), jnp.float32)
    noise = jnp.take_along_axis(levels, number, axis=1)
    chance = jax.random.uniform(for_masks, is_token.shape, jnp.float32)
    return Blocks(number=number, noise=noise, masked=is_token & (chance < noise))


def block_mask(valid: Bool[Array, "B T"], places: Int[Array, "B A"], number: Int[Array, "B A"]) -> Bool[Array, "B Q Q"]:
    """Attention between a row and its noised answer (Q = T + A, in this order): True where a query sees a key.

    A token as it is sees what is not in a later block, itself as it is; the prompt is before all blocks. A noised one
    sees the row as it is before its block, and its block as noised.
    """
    rows, length = valid.shape
    real = places < length
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    clean = jnp.zeros((rows, length), jnp.int32).at[row, places].set(number, mode="drop")
    clean = jax.lax.cummax(clean, axis=1)  # what is given between answers belongs to the block before it
    from_clean = (clean[:, :, None] >= clean[:, None, :]) & valid[:, None, :]
    from_noised = (number[:, :, None] > clean[:, None, :]) & valid[:, None, :]
    among = (number[:, :, None] == number[:, None, :]) & real[:, None, :]
    return jnp.concatenate([
        jnp.concatenate([from_clean, jnp.zeros((rows, length, places.shape[1]), bool)], axis=2),
        jnp.concatenate([from_noised, among], axis=2)], axis=1)


def noised_log_probs(
    model: Any, batch: BlockBatch, blocks: Blocks, *, mask_id: int | Int[Array, ""], remat: bool = False,
    vocab_chunk: int = 8192,
) -> tuple[Float[Array, "B A"], Float[Array, "N B Q E"]]:
    """The log-prob of each answer token as its noised block tells it, and the router's logits of both readings."""
    length = batch.tokens.shape[1]
    read = lambda values: jnp.take_along_axis(values, batch.places, axis=1, mode="clip")  # noqa: E731
    targets = read(batch.tokens)
    hidden, logits = model.hidden_and_router(
        jnp.concatenate([batch.tokens, jnp.where(blocks.masked, mask_id, targets)], axis=1),
        positions=jnp.concatenate([batch.positions, read(batch.positions)], axis=1),
        key_mask=block_mask(batch.valid, batch.places, blocks.number), remat=remat)
    return model.log_probs(hidden[:, length:], targets, vocab_chunk=vocab_chunk), logits


def block_diffusion_loss(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: BlockBatch,
    key: Key[Array, ""],
    *,
    mask_id: int | Int[Array, ""],
    weights: LossWeights = LossWeights(),
    remat: bool = False,
    vocab_chunk: int = 8192,
    longest: int = LONGEST_BLOCK,
) -> tuple[Float[Array, ""], Losses]:
    """The loss of a batch at random blocks, noise levels and masks; nats per token (BD3-LM, equation 8).

    Other arguments and result as of `masked_diffusion_loss`, with which `make_step` can exchange it.

    Args:
        longest: bound on the mean length of a row's blocks; 1 makes each token a block, and the loss that of a model
            that writes from left to right.
    """
    real = batch.places < batch.tokens.shape[1]
    blocks = draw_blocks(key, real, longest=longest)
    model = nnx.merge(graphdef, params)
    log_probs, logits = noised_log_probs(
        model, batch, blocks, mask_id=mask_id, remat=remat, vocab_chunk=vocab_chunk)
    rows = -jnp.sum(jnp.where(blocks.masked, log_probs / blocks.noise, 0.0), axis=1)
    diffusion = jnp.mean(rows / jnp.maximum(real.sum(axis=1, dtype=jnp.float32), 1.0))
    balance, router_z = router_losses(
        logits, jnp.concatenate([batch.valid, real], axis=1), experts_per_token=model.config.experts_per_token)
    total = diffusion + weights.balance * balance + weights.router_z * router_z
    return total, Losses(total=total, diffusion=diffusion, balance=balance, router_z=router_z)
