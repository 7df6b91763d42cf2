"""djax inside google-tunix: the engine, the causal view in its learner, trace-exact GRPO, and the traps between."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import djax
from djax import recipes, rl
from djax.models import init_params
from djax.rl.losses import grpo_loss, trace_grpo_loss
from djax.rl.policy import PAD_ID, diffusion_policy

pytest.importorskip("tunix", reason="google-tunix is not installed: pip install 'djax[rl]'")

import optax
from tunix.rl import rl_cluster
from tunix.rl import utils as tunix_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout.base_rollout import RolloutConfig

from djax.rl import tunix as adapter

LENGTH, WIDTH, SAMPLES = 8, 12, 4
ROLE = rl_cluster.Role
CONFIG = RolloutConfig(max_tokens_to_generate=LENGTH, max_prompt_length=WIDTH, temperature=0.9, top_p=None, seed=3)
TEXTS = ["Add 1 2.", "Sort 9"]
BATCH = TEXTS * 4
RECIPE = recipes.llada(steps_per_block=3)


def make_lm(mesh):
    """The bundled tokenizer, whose EOS is the padding id too, and a model that compiles fast."""
    bundled = djax.load(dtype="float32")
    config = dataclasses.replace(
        bundled.config, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=2,
        experts_per_token=1, expert_size=8)
    assert config.pad_id == config.eos_id
    params = init_params(config, jax.random.key(0))[1]
    # masks look all the same, and say EOS about every fourth time: answers of many lengths
    pure = nnx.to_pure_dict(params)
    pure["embed"] = pure["embed"].at[config.mask_id].set(1.0)
    pure["head"] = (10 * pure["head"]).at[config.eos_id].set(5.5 / config.hidden_size)
    nnx.replace_by_pure_dict(params, pure)
    return djax.DiffusionLM(config, params, tokenizer=bundled.tokenizer, mesh=mesh)


def make_cluster(lm, mesh, *, actor=None, rollouts=None, micro=2):
    """Trainer and rollouts on one mesh, or on two."""
    make = functools.partial(diffusion_policy, lm, completion_length=LENGTH, mesh=mesh)
    return rl_cluster.RLCluster(
        actor=actor or make(), reference=make(), tokenizer=adapter.adapter(lm),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={ROLE.ACTOR: mesh, ROLE.REFERENCE: mesh, ROLE.ROLLOUT: rollouts or mesh},
            rollout_engine=functools.partial(
                adapter.DiffusionRollout, lm=lm, recipe=RECIPE, block_length=LENGTH),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(0.5), eval_every_n_steps=100, max_steps=2, mini_batch_size=2,
                train_micro_batch_size=micro, data_sharding_axis=("data",)),
            rollout_config=CONFIG))


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:1]), ("data",))


@pytest.fixture(scope="module")
def lm(mesh):
    return make_lm(mesh)


@pytest.fixture(scope="module")
def cluster(lm, mesh):
    return make_cluster(lm, mesh)


def lengths_as_rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trace_learner(cluster, reward=lengths_as_rewards, **options):
    options = {"num_generations": SAMPLES, "beta": 0.0, "num_states": 3, **options}
    learner = adapter.TraceGRPOLearner(cluster, adapter.TraceGRPOConfig(**options), reward)
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = len(TEXTS)  # what `train` sets
    return learner


def inputs():
    return {"prompts": np.repeat(TEXTS, SAMPLES), "trajectory_ids": np.arange(len(TEXTS) * SAMPLES)}


@pytest.fixture(scope="module")
def example(cluster):
    """As the learner makes it."""
    return trace_learner(cluster, beta=0.1)._generate_and_compute_advantage(inputs())


# --- traps of the engine ---


def test_calls_with_the_same_seed_draw_anew(cluster):
    """Tunix's seed is the same at every step."""
    prompts = [TEXTS[0]] * 8
    calls = [[tuple(row.tolist()) for row in cluster.generate(prompts).tokens] for _ in range(3)]
    long = [[row for row in call if len(row) > 2] for call in calls]  # short ones may be equal by chance
    assert all(long)
    assert len({row for call in long for row in call}) == sum(map(len, long))


def test_the_same_calls_of_a_new_engine_draw_the_same(cluster, lm, mesh):
    make = functools.partial(
        adapter.DiffusionRollout, rollout_actor=cluster.actor_trainer.model, tokenizer=None, mesh=mesh,
        rollout_config=CONFIG, lm=lm, recipe=RECIPE, block_length=LENGTH)
    one, other = make(), make()
    for _ in range(2):
        left, right = (engine.generate(BATCH, CONFIG) for engine in (one, other))
        assert all(np.array_equal(a, b) for a, b in zip(left.tokens, right.tokens, strict=True))
    for seed in (jax.random.PRNGKey(3), jax.random.key(3), np.asarray([0, 3], np.uint32)):
        again = make().generate(BATCH, dataclasses.replace(CONFIG, seed=seed))
        fresh = make().generate(BATCH, CONFIG)
        assert again.text == fresh.text


def test_a_thread_without_a_mesh_gives_the_same(cluster, lm, mesh):
    """Tunix rolls out in a worker thread; contexts are not seen there."""
    make = functools.partial(
        adapter.DiffusionRollout, rollout_actor=cluster.actor_trainer.model, tokenizer=None, mesh=mesh,
        rollout_config=CONFIG, lm=lm, recipe=RECIPE, block_length=LENGTH)
    with mesh:
        here = make().generate(BATCH, CONFIG)
    found = []
    thread = threading.Thread(target=lambda: found.append(make().generate(BATCH, CONFIG)))
    thread.start()
    thread.join()
    assert found[0].text == here.text


def test_threads_record_their_own_rollouts(cluster):
    """Tunix evaluates in one thread while another rolls out."""
    engine = cluster.rollout
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(60)
        engine.generate(BATCH, CONFIG)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with engine.record() as rollouts:
        inside.set()
        assert done.wait(60)
        engine.generate(BATCH, CONFIG)
    thread.join()
    assert [part.batch for part in rollouts] == [8]
    engine.generate(BATCH, CONFIG)
    assert len(rollouts) == 1


def test_shared_weights_are_never_stale(cluster):
    """Tunix does not call `update_params` where trainer and rollout are one module."""
    learner = trace_learner(cluster)
    assert not learner.should_sync_weights
    assert cluster.rollout.model() is cluster.actor_trainer.model
    engine, trained = cluster.rollout, cluster.actor_trainer.model
    before = jax.tree.map(lambda leaf: leaf + 0, nnx.state(trained, nnx.Param))
    nnx.update(trained, jax.tree.map(lambda leaf: leaf * 0.5, before))
    try:
        engine.generate(BATCH, CONFIG)
        for mine, theirs in zip(jax.tree.leaves(engine._lm.params), jax.tree.leaves(nnx.state(trained, nnx.Param)),
                                strict=True):
            np.testing.assert_array_equal(mine, theirs)
    finally:
        nnx.update(trained, before)
        engine.refresh()


def test_the_sync_moves_nothing_through_the_host(cluster, lm):
    """Tunix forbids transfers while it syncs; `update_params` of another tree says which leaf."""
    count, steps = lm.compile_count, cluster.global_steps
    cluster.sync_weights()
    cluster.global_steps = steps
    assert lm.compile_count == count
    wrong = nnx.to_pure_dict(nnx.state(cluster.actor_trainer.model, nnx.Param))
    del wrong["model"]["norm"]
    with pytest.raises(ValueError, match="1 missing, the first is norm"):
        cluster.rollout.update_params(wrong)


def test_prompts_and_answers_come_back_whole(cluster, lm):
    """EOS is this model's padding id: `ids != pad_id` must not lose it."""
    got = cluster.generate(BATCH)
    eos = lm.config.eos_id
    assert cluster.rollout.pad_id() == PAD_ID != cluster.rollout.eos_id() == eos
    ended = [row for row in got.tokens if row[-1] == eos]
    assert ended
    assert all((row[:-1] != eos).all() for row in got.tokens)
    for row, text in zip(got.tokens, got.text, strict=True):
        assert text == lm.tokenizer.decode(row[row != eos])
    assert [len(row) for row in got.logprobs] == [len(row) for row in got.tokens]
    for row, text in zip(got.left_padded_prompt_tokens, BATCH, strict=True):
        ids = lm.tokenizer.encode(text)
        assert row.tolist() == [PAD_ID] * (WIDTH - len(ids)) + ids


def test_wrong_arguments_are_named(cluster, lm, mesh):
    engine = cluster.rollout
    with pytest.raises(ValueError, match="max_prompt_length: got 2; a prompt has"):
        engine.generate(TEXTS, dataclasses.replace(CONFIG, max_prompt_length=2))
    with pytest.raises(ValueError, match="max_tokens_to_generate: got 9; the policy was made with"):
        engine.generate(TEXTS, dataclasses.replace(CONFIG, max_tokens_to_generate=9))
    with pytest.raises(ValueError, match="top_p: got 7"):
        engine.generate(TEXTS, dataclasses.replace(CONFIG, top_p=7.0))
    arguments = {"tokenizer": None, "mesh": mesh, "rollout_config": CONFIG, "lm": lm}
    with pytest.raises(ValueError, match="rollout_actor: got a Transformer; allowed a DiffusionPolicy"):
        adapter.DiffusionRollout(rollout_actor=cluster.actor_trainer.model.model, **arguments)
    with pytest.raises(ValueError, match="filter_types: got LoRAParam; allowed Param"):
        engine.update_params({}, (nnx.LoRAParam,))
    policy = diffusion_policy(lm, completion_length=LENGTH, mesh=mesh)
    policy.model.lora = nnx.LoRAParam(jnp.zeros(2))
    with pytest.raises(ValueError, match="rollout_actor: got one with LoRA parameters"):
        adapter.DiffusionRollout(rollout_actor=policy, **arguments)
    with pytest.raises(ValueError, match="weigh: got 'row'; allowed token, step"):
        adapter.TraceGRPOConfig(num_generations=2, weigh="row")


# --- the unmodified learner on the causal view ---


def test_the_unmodified_learner_runs_diffu_grpo(cluster, lm):
    """Its loss and gradient are those of `grpo_loss` at one-step states, old log-probs and all."""
    config = grpo_learner.GRPOConfig(num_generations=SAMPLES, beta=0.2, num_iterations=2, kl_loss_mode="low_var_kl")
    learner = grpo_learner.GRPOLearner(cluster, config, lengths_as_rewards)
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = len(TEXTS)
    with cluster.rollout.record() as rollouts:
        made = learner._generate_and_compute_advantage(inputs())
    lengths = rollouts[0].lengths
    np.testing.assert_array_equal(made.completion_mask.sum(1), lengths)  # with the EOS that ends it
    model = cluster.actor_trainer.model
    (value, aux), gradient = nnx.jit(nnx.value_and_grad(
        lambda model: cluster.actor_trainer.loss_fn(model, train_example=made, algo_config=config),
        has_aux=True))(model)

    rollout = rollouts[0]
    states = rl.masked_states(rollout, jax.random.key(0), scheme="one_step")
    graphdef, params = nnx.split(model.model)

    def loss(params):
        log_probs = rl.score(graphdef, params, rollout, states)
        still = jax.lax.stop_gradient(log_probs)
        return grpo_loss(log_probs, jnp.asarray(made.advantages, jnp.float32), mask=jnp.asarray(rollout.is_completion),
                         old=still, reference=still, beta=0.2)

    (expected, report), own = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value == pytest.approx(float(expected), abs=1e-6)
    assert aux["kl"] == pytest.approx(float(report.kl), abs=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(own))
    assert scale > 1e-3
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * scale)


# --- trace-exact GRPO ---


def test_examples_hold_what_tunix_drops(example, cluster):
    """`RLCluster.generate` hands on tokens and texts only; commit steps and canvas come through the record."""
    rollout, states = example.unpack()
    assert states.num_states == 3
    assert set(np.unique(rollout.commit_step)) == {-1, 0, 1, 2}
    model = cluster.actor_trainer.model
    graphdef, params = nnx.split(model.model)
    replayed = jax.jit(rl.score)(graphdef, params, rollout, states)
    np.testing.assert_allclose(replayed, rollout.log_prob, atol=1e-5)
    assert float(np.abs(rollout.log_prob).max()) > 1
    np.testing.assert_array_equal(example.old_per_token_logps, rollout.log_prob)
    np.testing.assert_allclose(example.ref_per_token_logps, replayed, atol=1e-5)  # of the same weights
    assert rollout.first_block == WIDTH


def test_old_log_probs_are_taken_at_the_states_that_are_trained(cluster):
    """Shrunk states are not those of the sampler, whose log-probs would make wrong ratios."""
    learner = trace_learner(cluster, shrink=2, num_states=2, num_iterations=2)
    made = learner._generate_and_compute_advantage(inputs())
    rollout, states = made.unpack()
    assert states.num_states == 2
    graphdef, params = nnx.split(cluster.actor_trainer.model.model)
    expected = jax.jit(rl.score)(graphdef, params, rollout, states)
    np.testing.assert_allclose(made.old_per_token_logps, expected, atol=1e-5)
    assert np.abs(made.old_per_token_logps - rollout.log_prob).max() > 1e-3
    once = trace_learner(cluster, shrink=2, num_states=2)
    mini = cluster.cluster_config.training_config.mini_batch_size
    once._full_batch_size = mini  # what `train` sets: one update a batch
    assert once._generate_and_compute_advantage(inputs()).old_per_token_logps is None
    once._full_batch_size = 2 * mini  # the second is of a policy that has moved since it sampled
    made = once._generate_and_compute_advantage(inputs())
    rollout, states = made.unpack()
    expected = jax.jit(rl.score)(graphdef, params, rollout, states)
    np.testing.assert_allclose(made.old_per_token_logps, expected, atol=1e-5)


def test_the_first_batch_says_how_many_prompts_there_are(cluster, monkeypatch):
    seen = []
    monkeypatch.setattr(grpo_learner.GRPOLearner, "train", lambda self, *arguments: seen.append(arguments))
    learner = trace_learner(cluster)
    batches = [{"prompts": np.asarray(TEXTS)}, {"prompts": np.asarray(TEXTS[:1])}]
    learner.train(batches)
    assert learner._full_batch_size == len(TEXTS)
    assert list(seen[0][0]) == batches


def test_micro_batches_cut_examples_by_rows(example):
    """Tunix slices every array of an example: what rows share must not be one."""
    rollout, states = example.unpack()
    cut, cut_states = tunix_utils.get_batch_slice(example, slice(4, 7)).unpack()
    for name in dataclasses.fields(rl.Rollout):
        left = getattr(cut, name.name)
        right = getattr(rollout.take(slice(4, 7)), name.name)
        assert jax.tree.all(jax.tree.map(np.array_equal, left, right)), name.name
    np.testing.assert_array_equal(cut_states.masks, states.masks[4:7])


@pytest.mark.parametrize(("beta", "weigh"), [(0.0, "token"), (0.1, "step")])
def test_the_registered_loss(beta, weigh, example, cluster):
    """It is `trace_grpo_loss`, and gives Tunix's trainer the two numbers that it logs, KL or not."""
    config = adapter.TraceGRPOConfig(num_generations=SAMPLES, beta=beta, weigh=weigh)
    model = cluster.actor_trainer.model
    moved = example.replace(
        old_per_token_logps=example.old_per_token_logps - 0.3,
        ref_per_token_logps=example.ref_per_token_logps + 0.2 if beta else None)
    loss, aux = nnx.jit(lambda model, given: adapter.trace_policy_loss(model, given, config, PAD_ID, 0))(model, moved)
    rollout, _ = moved.unpack()
    expected, report = trace_grpo_loss(
        rollout.log_prob, jnp.asarray(moved.advantages), mask=rollout.is_completion,
        commit_step=rollout.commit_step if weigh == "step" else None, old=moved.old_per_token_logps,
        reference=moved.ref_per_token_logps, beta=beta)
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert aux["kl"] == pytest.approx(float(report.kl), abs=1e-5)
    assert aux["pg_clipfrac"] == pytest.approx(float(report.clip_fraction))
    assert 0 < float(report.clip_fraction) < 1
    assert (float(report.kl) > 0) == bool(beta)


def test_rewards_that_say_nothing_spoil_nothing(cluster):
    """An infinite reward is left out of its group, all of which Tunix's own estimator would make NaN.

    Tunix's reward manager itself counts a NaN as 0.
    """
    def reward(prompts, completions, **_):
        return [math.inf, 1.0, 0.0, 0.0, math.nan, 3.0, 0.0, 0.0]

    got = trace_learner(cluster, reward)._generate_and_compute_advantage(inputs())
    low = -1 / math.sqrt(3)
    np.testing.assert_allclose(got.advantages, [0, -2 * low, low, low, -0.5, 1.5, -0.5, -0.5], rtol=1e-4)


@pytest.mark.slow
def test_training_in_micro_batches_with_a_reference(lm, mesh):
    """Tunix's whole loop: two steps, each of two micro-batches, shared weights."""
    cluster = make_cluster(lm, mesh, micro=1)
    before = jax.device_get(nnx.to_pure_dict(nnx.state(cluster.actor_trainer.model, nnx.Param)))
    trace_learner(cluster, beta=0.05).train([{"prompts": np.asarray(TEXTS)}] * 2)
    after = jax.device_get(nnx.to_pure_dict(nnx.state(cluster.actor_trainer.model, nnx.Param)))
    assert cluster.global_steps == 2
    assert cluster.actor_trainer.train_steps == 2
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max(), before, after)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


DISJOINT = """
    import jax, numpy as np
    from flax import nnx
    from jax.sharding import AxisType
    from tests.rl import test_tunix as t

    def mesh(devices):
        return jax.make_mesh((2,), ("data",), devices=devices, axis_types=(AxisType.Auto,))

    trainer, rollouts = mesh(jax.devices()[:2]), mesh(jax.devices()[2:])
    lm = t.make_lm(rollouts)
    policy = t.diffusion_policy(lm, completion_length=t.LENGTH, mesh=trainer)
    nnx.update(policy, jax.tree.map(lambda leaf: leaf * 1.5, nnx.state(policy, nnx.Param)))
    cluster = t.make_cluster(lm, trainer, actor=policy, rollouts=rollouts)

    def same():
        mine = jax.tree.leaves(lm.params)
        theirs = jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param))
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    assert same(), "the first rollout would be of other weights than the actor's"
    learner = t.trace_learner(cluster)
    assert learner.should_sync_weights and learner.can_enable_async_rollout
    learner.train([{"prompts": np.asarray(t.TEXTS)}] * 2)
    assert same(), "not synced"
    assert {device.id for leaf in jax.tree.leaves(lm.params) for device in leaf.devices()} == {2, 3}
    print("trained on", cluster.global_steps)
"""


@pytest.mark.slow
def test_disjoint_meshes_are_synced():
    """Weights of their own: the engine takes the actor's at the start, and Tunix syncs after every step."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DISJOINT)], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False, env=os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"})
    assert done.stdout.strip().endswith("trained on 2"), done.stderr[-2000:]
