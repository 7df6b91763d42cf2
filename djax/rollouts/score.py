"""The scorer: log-probs of a rollout's tokens at given masked states, differentiable, never [B, T, V]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from djax.contracts.ambient import on_device, without_mesh
from djax.contracts.types import Denoiser, Hidden, Params
from djax.engine.weights import check_alive
from djax.errors import check_choice
from djax.models import ModelDenoiser
from djax.models.layers.log_probs import token_log_probs
from djax.parts.transforms import ForbidTokens
from djax.rollouts.types import MaskedStates, Rollout

Reduce = Literal["token", "sequence", "none"]
POSITION_CHUNK = 128
"""Positions whose logits are held at once, for denoisers that can only give logits of the whole vocabulary."""


@without_mesh()
def score(
    denoiser: nnx.GraphDef[Any] | Denoiser,
    params: Params,
    rollout: Rollout,
    states: MaskedStates,
    *,
    temperature: float | Float[Array, ""] | None = None,
    vocab_chunk: int = 8192,
    reduce: Reduce = "token",
    remat: bool = True,
) -> Float[Array, "B T"] | Float[Array, " B"] | Float[Array, "B n T"]:
    """Weighted log-probs of a rollout's tokens at masked states, float32.

    Pure and traceable: differentiate it, jit it, run it on arrays split over a mesh with Auto or Explicit axes (XLA
    then partitions the plain model: build it with `djax.models.kernels_on(mesh)`). States are scored one after another,
    so memory is that of one forward of the rows; a state in which no row has weight costs nothing. A row is only shown
    in states where it has weight, so one that is NaN elsewhere (`StopReason.NAN`) leaves values and gradients alone.
    What the sampler could not draw (`rollout.forbidden`) is outside of the distribution here too.

    Args:
        denoiser: the model's graphdef (`nnx.split`), or any `djax.contracts.types.Denoiser`.
        params: its weights.
        rollout: the tokens.
        states: from `trace_states`, `masked_states`, or made by hand.
        temperature: divides the logits; None is the rollout's, at which `rollout.log_prob` is. 0 counts as 1.
        vocab_chunk: columns of the vocabulary whose logits are held at once.
        reduce: "token" sums over states, "sequence" over states and positions, "none" over nothing.
        remat: compute activations again in the backward pass, of each state and in it of each layer. False keeps them
            all, and runs empty states too.

    Returns:
        [B, T], [B] or [B, n, T]; 0 where nothing has weight. -inf for a forbidden token that has.

    Raises:
        ValueError: an unknown `reduce`, or states of other rows or another length.
    """
    check_choice("reduce", reduce, get_args(Reduce))
    if states.masks.shape != states.weights.shape or states.masks.shape[::2] != rollout.tokens.shape:
        raise ValueError(
            f"states: got masks {states.masks.shape} and weights {states.weights.shape} for tokens "
            f"{rollout.tokens.shape}; both must be [rows, states, positions] of these tokens")
    heat = rollout.temperature if temperature is None else temperature
    arguments = on_device((denoiser, check_alive(params), rollout, states, heat))
    return _program(*arguments, vocab_chunk=vocab_chunk, reduce=reduce, remat=remat)


# one jitted function: called outside of the caller's own, it is compiled once for each structure and shape
@partial(jax.jit, static_argnames=("vocab_chunk", "reduce", "remat"))
def _program(
    denoiser: nnx.GraphDef[Any] | Denoiser, params: Params, rollout: Rollout, states: MaskedStates,
    temperature: float | Float[Array, ""], *, vocab_chunk: int, reduce: Reduce, remat: bool,
) -> Array:
    heat = jnp.asarray(temperature, jnp.float32)
    heat = jnp.where(heat > 0, heat, 1.0)
    ask = partial(_score, denoiser, vocab_chunk=vocab_chunk, reduce=reduce, remat=remat)
    return _partitioned(ask, params, rollout, states, heat)


def _score(
    denoiser: nnx.GraphDef[Any] | Denoiser, params: Params, rollout: Rollout, states: MaskedStates,
    temperature: Float[Array, ""], *, vocab_chunk: int, reduce: Reduce, remat: bool,
) -> Array:
    first = rollout.first_block
    log_probs = _asker(denoiser, params, temperature, vocab_chunk=vocab_chunk, remat=remat)

    def weigh(mask: Bool[Array, "B T"], weights: Float[Array, "B O"]) -> Float[Array, "B O"]:
        # a row without weight runs as a copy of one with weight, and all masked if none has: were it NaN, a `where`
        # would keep it out of the sum, but not out of the gradient
        has = (weights != 0).any(axis=1)
        rows = jnp.where(has, jnp.arange(has.size, dtype=jnp.int32), lax.argmax(has, 0, jnp.int32))
        shown = rollout.take(rows)
        found = log_probs(shown, jnp.where(mask[rows] | ~has.any(), rollout.mask_id, shown.tokens))
        return jnp.where(weights != 0, weights * jnp.where(weights != 0, found, 0.0), 0.0)

    def unless_empty(mask: Bool[Array, "B T"], weights: Float[Array, "B O"]) -> Float[Array, "B O"]:
        return lax.cond((weights != 0).any(), weigh, lambda _, weights: jnp.zeros_like(weights), mask, weights)

    # without the checkpoint around it, the condition of every state would keep its own copy of the parameters
    ask = jax.checkpoint(unless_empty) if remat else weigh

    def one(total: Float[Array, "B O"], state: tuple[Array, Array]) -> tuple[Array, Array | None]:
        found = ask(*state)
        return (total, found) if reduce == "none" else (total + found, None)

    weights = states.weights[:, :, first:].astype(jnp.float32)
    total, each = lax.scan(
        one, jnp.zeros_like(weights[:, 0]), (states.masks.swapaxes(0, 1), weights.swapaxes(0, 1)))
    if reduce == "sequence":
        return total.sum(axis=1)
    if reduce == "token":
        return jnp.pad(total, ((0, 0), (first, 0)))
    return jnp.pad(cast(Array, each).swapaxes(0, 1), ((0, 0), (0, 0), (first, 0)))


def _asker(
    denoiser: nnx.GraphDef[Any] | Denoiser, params: Params, temperature: Float[Array, ""], *, vocab_chunk: int,
    remat: bool,
) -> Callable[[Rollout, Int[Array, "B T"]], Float[Array, "B O"]]:
    """A function from a rollout and the tokens shown to the log-probs of its tokens from the first block on."""
    if isinstance(denoiser, nnx.GraphDef | ModelDenoiser):
        model = nnx.merge(denoiser.graphdef if isinstance(denoiser, ModelDenoiser) else denoiser, params)

        def by_vocabulary(rollout: Rollout, shown: Int[Array, "B T"]) -> Float[Array, "B O"]:
            first = rollout.first_block
            hidden, _ = model.hidden_and_router(
                shown, positions=rollout.positions, key_mask=rollout.valid, remat=remat)
            return token_log_probs(hidden[:, first:], model.head[...], rollout.tokens[:, first:],
                                   temperature=temperature, forbidden=rollout.forbidden, vocab_chunk=vocab_chunk)

        return by_vocabulary
    other = denoiser

    def by_position(rollout: Rollout, shown: Int[Array, "B T"]) -> Float[Array, "B O"]:
        first = rollout.first_block
        hidden, _ = other.apply(
            params, other.embed(params, shown), positions=other.prepare_positions(params, rollout.positions),
            key_mask=rollout.valid, window_start=jnp.int32(0), write=rollout.valid, cache=None)
        hidden = jax.tree.map(lambda leaf: leaf[:, first:], hidden)
        return _by_position(other, params, hidden, rollout.tokens[:, first:], rollout, temperature)

    return by_position


def _by_position(
    denoiser: Denoiser, params: Params, hidden: Hidden, target: Int[Array, "B O"], rollout: Rollout,
    temperature: Float[Array, ""],
) -> Float[Array, "B O"]:
    """Log-probs from logits of the whole vocabulary, a chunk of positions at a time."""
    forbid = ForbidTokens(rollout.forbidden.ids, rollout.forbidden.limit)
    width = target.shape[1]
    chunk = min(POSITION_CHUNK, width)

    def cut(leaf: Array) -> Array:
        padded = jnp.pad(leaf, ((0, 0), (0, -width % chunk), *((0, 0),) * (leaf.ndim - 2)))
        return jnp.moveaxis(padded.reshape(leaf.shape[0], -1, chunk, *leaf.shape[2:]), 1, 0)

    @jax.checkpoint
    def ask(part: tuple[Hidden, Int[Array, "B c"]]) -> Float[Array, "B c"]:
        logits = denoiser.unembed(params, part[0])
        best = lax.stop_gradient(forbid.step(logits, part[1] >= 0, ())[0].max(axis=-1, keepdims=True))
        # tempered before anything is forbidden: -inf divided by the temperature has no derivative; and the difference
        # is divided, since a logit overflows at low temperatures
        logits, _ = forbid.step((logits - best) / temperature, part[1] >= 0, ())
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(log_probs, part[1][..., None], axis=-1)[..., 0]

    found = jnp.moveaxis(lax.map(ask, (jax.tree.map(cut, hidden), cut(target))), 0, 1)
    return found.reshape(target.shape[0], -1)[:, :width]


def _partitioned(function: Callable[..., Array], params: Params, rollout: Rollout, *rest: Any) -> Array:
    """The function's value where XLA may partition it: on a mesh with Explicit axes, as if they were Auto.

    The mesh is that of the arguments; rows of the result are split as the rollout's.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((params, rollout, *rest))]
    explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return function(params, rollout, *rest)
    rows = PartitionSpec(*jax.typeof(rollout.tokens).sharding.spec[:1])
    with jax.sharding.use_abstract_mesh(explicit[0]):
        return jax.sharding.auto_axes(function, out_sharding=NamedSharding(explicit[0], rows))(params, rollout, *rest)
