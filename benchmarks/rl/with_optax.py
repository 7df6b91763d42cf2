"""GRPO on rollouts in plain optax: what a researcher would copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

import djax
from benchmarks.rl.task import Prompts, Run, Settings, batches, evaluate, load, rewards, texts, weakened
from djax.contracts.types import Params
from djax.devices.sharding import shardings
from djax.models import build, kernels_on, logical_axes
from djax.rl import Rollout, masked_states, rollout, score, trace_states
from djax.rl.advantages import Scale, group_advantages
from djax.rl.losses import (
    PolicyReport,
    coupled_grpo_loss,
    diffu_grpo_loss,
    espo_loss,
    gdpo_loss,
    trace_grpo_loss,
)
from djax.rollouts.types import PER_ROW
from djax.train.step import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method: at which masked states it scores, how it scales rewards, and its loss."""

    scheme: str | None
    """Scheme of `masked_states`; None is the trace of the sampler."""
    loss: Callable[..., tuple[Float[Array, ""], PolicyReport]]
    scale: Scale = "std"
    prompt_mask_probability: float = 0.0
    by_sequence: bool = False


METHODS = {
    "trace": Method(None, trace_grpo_loss),
    "diffu": Method("one_step", diffu_grpo_loss, "none", prompt_mask_probability=0.15),
    "coupled": Method("coupled", coupled_grpo_loss, "leave_one_out"),
    "gdpo": Method("gauss", gdpo_loss, "none", by_sequence=True),
    "espo": Method("fixed_k", espo_loss, by_sequence=True),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The same for both trainers."""
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(settings.learning_rate))


def make_update(
    graphdef: nnx.GraphDef[Any], tx: optax.GradientTransformation, settings: Settings
) -> Callable[..., tuple[TrainState, PolicyReport, Float[Array, ""]]]:
    """One update of the policy from a batch of rollouts, to be jitted."""
    method = METHODS[settings.method]

    def objective(
        params: Params, got: Rollout, advantages: Float[Array, " B"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], PolicyReport]:
        if method.scheme is None:
            states = trace_states(got, num_states=settings.steps)
            return method.loss(score(graphdef, params, got, states), advantages, mask=got.is_completion,
                               old=got.log_prob)
        states = masked_states(
            got, key, scheme=method.scheme,  # type: ignore[arg-type]
            prompt_mask_probability=method.prompt_mask_probability)
        if method.by_sequence:
            return method.loss(score(graphdef, params, got, states, reduce="sequence"), advantages, lengths=got.lengths)
        return method.loss(score(graphdef, params, got, states), advantages, mask=got.is_completion)

    def update(
        state: TrainState, got: Rollout, reward: Float[Array, " B"], key: Key[Array, ""]
    ) -> tuple[TrainState, PolicyReport, Float[Array, ""]]:
        advantages = group_advantages(reward, settings.samples, scale=method.scale)
        gradients, report = jax.grad(objective, has_aux=True)(state.params, got, advantages, key)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        new = TrainState(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
        return new, report, optax.tree.norm(gradients)

    return update


def placed(got: Rollout, mesh: Mesh) -> Rollout:
    """A rollout on the trainer's mesh, its rows split over it."""
    everywhere = jax.device_put(got, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return dataclasses.replace(everywhere, **{name: jax.device_put(getattr(got, name), rows) for name in PER_ROW})


def train(settings: Settings, run: Run, trainer: Mesh, rollouts: Mesh) -> None:
    """Rollout, reward, update, sync; again."""
    lm: djax.DiffusionLM = load(settings, rollouts)
    prompts = Prompts(settings, lm)
    params = weakened(djax.load(dtype="float32").params, settings.noise)
    state = init_state(params, optimizer(settings), shardings=shardings(logical_axes(lm.config), params, mesh=trainer))
    graphdef = nnx.split(build(lm.config, kernels=kernels_on(trainer)))[0]
    # what comes out lies as what went in: else the second update would be compiled anew
    update = jax.jit(make_update(graphdef, optimizer(settings), settings),
                     out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None, None))
    run.check(0, lm.params, params=state.params)
    run.add(0, evaluate(lm, settings, prompts), lm=lm, params=state.params)
    for index, examples in batches(settings, prompts):
        key = jax.random.fold_in(jax.random.key(settings.seed), index)
        got = rollout(lm, [example.messages for example in examples], key=key, num_samples=settings.samples,
                      recipe=settings.recipe(), max_new_tokens=settings.length, block_length=settings.length)
        repeated = [example for example in examples for _ in range(settings.samples)]
        reward = rewards(repeated, texts(lm, got))
        state, report, norm = update(state, placed(got, trainer), jnp.asarray(reward), key)
        lm.update_params(state.params)
        run.check(index + 1, lm.params, params=state.params)
        metrics: dict[str, Any] = {
            "reward": float(reward.mean()), "loss": float(report.loss), "ratio": float(report.ratio),
            "clip_fraction": float(report.clip_fraction), "grad_norm": float(norm), "forwards": float(got.nfe.mean())}
        if run.due(index + 1):
            metrics |= evaluate(lm, settings, prompts)
        run.add(index + 1, metrics, lm=lm, params=state.params)
