"""One training step as a pure function: gradients over microbatches, any optax optimizer, any sharding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from djax.contracts import struct
from djax.contracts.ambient import without_mesh
from djax.contracts.keys import as_key
from djax.contracts.types import Params
from djax.errors import ArgumentError
from djax.train.loss import Batch, Losses, LossWeights, masked_diffusion_loss


@struct.dataclass
class TrainState:
    """All that a run needs to go on: with the data's index and the key, which follow from `step`."""

    params: Params
    """Master weights: a pure dict (`nnx.to_pure_dict`), float32 unless the user wants it otherwise."""
    opt_state: Any
    step: Int[Array, ""]
    """Updates done so far."""


@struct.dataclass
class Report:
    """Report of a step, float32 scalars; the mean over its microbatches."""

    losses: Losses
    grad_norm: Float[Array, ""]
    """Global norm before the optimizer's own clipping."""


Step = Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Report]]
Objective = Callable[..., tuple[Float[Array, ""], Losses]]


@without_mesh()
def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, shardings: Any | None = None
) -> TrainState:
    """The state before the first step; what the optimizer keeps for a parameter is sharded as the parameter.

    Args:
        params: a pure dict of arrays.
        optimizer: any optax transformation.
        shardings: a tree like `params` of `NamedSharding`; None leaves everything where `params` are.
    """
    step = jnp.zeros((), jnp.int32)
    if shardings is None:
        return TrainState(params=params, opt_state=jax.jit(optimizer.init)(params), step=step)
    mesh = jax.tree.leaves(shardings)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, jax.eval_shape(optimizer.init, params), shardings,
        transform_non_params=lambda _: everywhere)
    params = jax.device_put(params, shardings)
    return TrainState(
        params=params, opt_state=jax.jit(optimizer.init, out_shardings=placed)(params),
        step=jax.device_put(step, everywhere))


def make_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    *,
    mask_id: int,
    weights: LossWeights = LossWeights(),
    accumulate: int = 1,
    remat: bool = False,
    vocab_chunk: int = 8192,
    compute_dtype: jax.typing.DTypeLike | None = None,
    objective: Objective = masked_diffusion_loss,
) -> Step:
    """A step `(state, batch, key) -> (state, report)`, to be jitted (donate the state).

    The noise of update n follows from `fold_in(key, n)`, so a resumed run draws what the first one would have.

    Args:
        graphdef: of the model.
        optimizer: as given to `init_state`.
        mask_id: what a masked token is replaced by.
        weights: of the router's losses.
        accumulate: microbatches per update; it divides the batch's rows. Row i is in microbatch i % accumulate,
            so that a batch split over devices stays where it is.
        remat, vocab_chunk: see `masked_diffusion_loss`.
        compute_dtype: parameters are cast to it for the forward and backward pass; None computes in their own.
        objective: the loss; it has the arguments of `masked_diffusion_loss`.

    Raises:
        ValueError: (when traced) `accumulate` does not divide the rows.
    """

    def loss(params: Params, batch: Any, key: Key[Array, ""]) -> tuple[Float[Array, ""], Losses]:
        if compute_dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        return objective(
            graphdef, params, batch, key, mask_id=mask_id, weights=weights, remat=remat, vocab_chunk=vocab_chunk)

    def step(state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Report]:
        key = jax.random.fold_in(as_key(key), state.step)
        gradients, losses = _accumulated(
            jax.grad(loss, has_aux=True), state.params, batch, key, accumulate=accumulate)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax relies on
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        new = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
        return new, Report(losses=losses, grad_norm=optax.tree.norm(gradients))

    return step


def _accumulated(
    gradient: Callable[..., tuple[Params, Losses]], params: Params, batch: Batch, key: Key[Array, ""], *,
    accumulate: int,
) -> tuple[Params, Losses]:
    """Mean gradient and losses over microbatches."""
    if accumulate == 1:
        return gradient(params, batch, key)
    rows = batch.tokens.shape[0]
    if rows % accumulate:
        raise ArgumentError("accumulate", accumulate, allowed=f"a divisor of the batch's {rows} rows")
    micro = jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf.reshape(rows // accumulate, accumulate, *leaf.shape[1:]), 0, 1), batch)

    def add(total: tuple[Params, Losses], part: tuple[Batch, Array]) -> tuple[tuple[Params, Losses], None]:
        batch, index = part
        return jax.tree.map(jnp.add, total, gradient(params, batch, jax.random.fold_in(key, index))), None

    first = partial(jax.tree.map, lambda leaf: leaf[0])
    shapes = jax.eval_shape(gradient, params, first(micro), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = lax.scan(add, zeros, (micro, jnp.arange(accumulate, dtype=jnp.int32)))
    return jax.tree.map(lambda leaf: leaf / accumulate, total)
