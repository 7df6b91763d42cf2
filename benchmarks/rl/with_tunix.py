"""The same run in google-tunix's loop: its trainer, its worker thread, its weight sync."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from tunix.rl import function_registry, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.rl.task import Prompts, Run, Settings, batches, evaluate, load, rewards
from benchmarks.rl.with_optax import METHODS, optimizer
from djax import tasks
from djax.contracts.types import Params
from djax.models import kernels_on
from djax.rl.advantages import group_advantages
from djax.rl.policy import DiffusionPolicy, diffusion_policy
from djax.rl.tunix import DiffusionRollout, TraceGRPOConfig, TraceGRPOLearner, adapter

PROMPT_LENGTH = 48
DIFFU_ADVANTAGES = "benchmark_diffu"
"""Name of `diffu_advantages` in Tunix's registry."""


@function_registry.register_advantage_estimator(DIFFU_ADVANTAGES)
def diffu_advantages(rewards: Float[np.ndarray, " B"], num_generations: int) -> Float[np.ndarray, " B"]:
    """The optax run's settings."""
    return np.asarray(group_advantages(
        jnp.asarray(rewards, jnp.float32), num_generations, scale=METHODS["diffu"].scale))


def train(settings: Settings, run: Run, trainer: Mesh, rollouts: Mesh) -> None:
    """Let Tunix train one of `TUNIX_METHODS`; a look at the policy before every batch."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    lm = load(settings, rollouts)
    prompts = Prompts(settings, lm)
    policy = diffusion_policy(lm, completion_length=settings.length, mesh=trainer, kernels=kernels_on(trainer))
    role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=policy, tokenizer=adapter(lm),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role.ACTOR: trainer, role.REFERENCE: trainer, role.ROLLOUT: rollouts},
            rollout_engine=functools.partial(
                DiffusionRollout, lm=lm, recipe=settings.recipe(), block_length=settings.length),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(settings), eval_every_n_steps=settings.updates + 1,
                max_steps=settings.updates, mini_batch_size=settings.prompts, train_micro_batch_size=settings.prompts,
                data_sharding_axis=("data",)),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=settings.length, max_prompt_length=PROMPT_LENGTH, temperature=1.0, top_p=None,
                seed=jax.random.key(settings.seed))))
    seen: dict[str, Any] = {}

    def trained() -> Params:
        actor: DiffusionPolicy = cluster.actor_trainer.model
        return nnx.to_pure_dict(nnx.state(actor.model, nnx.Param))

    def reward(prompts: Sequence[str], completions: Sequence[str], question: Any, **_: Any) -> list[float]:
        # between sampling and training: the rollout model still has the weights that sampled
        run.check(seen["update"], lm.params, params=trained())
        found = rewards([tasks.TASKS[settings.task].example(str(text)) for text in question], completions)
        seen["reward"] = float(found.mean())
        return found.tolist()

    def look(update: int) -> None:
        """After `update` updates and Tunix's sync: measure and log."""
        metrics = {name: value for name, value in seen.items() if name != "update"}
        if run.due(update):
            cluster.rollout.refresh()
            run.check(update, lm.params, params=trained())
            metrics |= evaluate(lm, settings, prompts)
        run.add(update, metrics, lm=lm, params=trained())
        seen["update"] = update

    def data() -> Iterator[dict[str, np.ndarray]]:
        for update, examples in batches(settings, prompts):
            look(update)
            yield {"prompts": np.asarray([prompts.text(example) for example in examples]),
                   "question": np.asarray([example.prompt for example in examples])}

    if settings.method == "trace":
        config: GRPOConfig = TraceGRPOConfig(
            num_generations=settings.samples, beta=0.0, num_states=settings.steps)
        learner: GRPOLearner = TraceGRPOLearner(cluster, config, reward)
    else:
        config = GRPOConfig(num_generations=settings.samples, beta=0.0, advantage_estimator=DIFFU_ADVANTAGES)
        learner = GRPOLearner(cluster, config, reward)
    learner.train(data())
    look(settings.updates)
