"""The same run in google-tunix's loop: its trainer, its worker thread, its weight sync."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.rl_optax import optimizer
from benchmarks.rl_task import Prompts, Run, Settings, batches, evaluate, kernels, load, rewards
from djax.rl.policy import DiffusionPolicy, diffusion_policy
from djax.rl.tunix import GROUP_ADVANTAGES, DiffusionRollout, TraceGRPOConfig, TraceGRPOLearner, adapter
from djax.train import tasks

METHODS = ("trace", "diffu")
"""What runs in Tunix: `TraceGRPOLearner`, and the unmodified `GRPOLearner` on the causal view."""

PROMPT_LENGTH = 48


def train(settings: Settings, run: Run, trainer: Mesh, rollouts: Mesh) -> None:
    """Let Tunix train; a look at the policy before every batch.

    Raises:
        ValueError: a method that does not run in Tunix.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method: got {settings.method!r}; with tunix allowed {', '.join(METHODS)}")
    logging.getLogger("absl").setLevel(logging.ERROR)
    lm = load(settings, rollouts)
    prompts = Prompts(settings, lm)
    policy = diffusion_policy(lm, completion_length=settings.length, mesh=trainer, kernels=kernels(trainer))
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

    def reward(prompts: Sequence[str], completions: Sequence[str], question: Any, **_: Any) -> list[float]:
        found = rewards([tasks.TASKS[settings.task].example(str(text)) for text in question], completions)
        seen["reward"] = float(found.mean())
        return found.tolist()

    def look(update: int) -> None:
        """After `update` updates and Tunix's sync: measure and log."""
        cluster.rollout.refresh()
        metrics, seen_now = dict(seen), run.due(update)
        if seen_now:
            metrics |= evaluate(lm, settings, prompts)
        trained: DiffusionPolicy = cluster.actor_trainer.model
        run.add(update, metrics, lm=lm, params=nnx.to_pure_dict(nnx.state(trained.model, nnx.Param)))

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
        config = GRPOConfig(num_generations=settings.samples, beta=0.0, advantage_estimator=GROUP_ADVANTAGES)
        learner = GRPOLearner(cluster, config, reward)
    learner.train(data())
    look(settings.updates)
