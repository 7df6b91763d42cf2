"""What `test_mesh` runs on eight fake devices: rollouts, scores, gradients and weights on meshes against one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from djax import recipes, rl
from djax.models import build
from tests.support import tiny
from tests.support.tiny import load

RECIPE = recipes.fast_dllm(threshold=0.6, cache="none")
SHAPE = {"key": 1, "num_samples": 2, "max_new_tokens": 8, "block_length": 8, "recipe": RECIPE}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


def main() -> None:
    """Raises where a mesh differs from one device."""
    one = load()
    expected = rl.rollout(one, PROMPTS, **SHAPE)
    states = jax.device_get(rl.trace_states(expected))
    factor = jnp.asarray(np.random.default_rng(0).normal(size=expected.tokens.shape), jnp.float32)
    graphdef = nnx.split(build(tiny.CONFIG, kernels=tiny.KERNELS))[0]

    def loss(params, rollout, states):
        log_probs = rl.score(graphdef, params, rollout, states, vocab_chunk=48)
        return (factor * log_probs).sum(), log_probs

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, log_probs), by_hand = gradient(one.params, expected, states)
    np.testing.assert_allclose(log_probs, expected.log_prob, rtol=1e-5, atol=2e-5)

    new = jax.tree.map(lambda leaf: leaf * 1.05, one.params)
    old, one.params = one.params, new
    after = rl.rollout(one, PROMPTS, **SHAPE)
    one.params = old
    devices = np.asarray(jax.devices())
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.sharding.Mesh(devices.reshape(2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
        lm = load(mesh)
        got = rl.rollout(lm, PROMPTS, **SHAPE)
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_allclose(got.log_prob, expected.log_prob, rtol=1e-5, atol=2e-5)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        split = lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, rows) if np.ndim(leaf) > 1 else leaf, tree)  # noqa: B023, E731
        (_, scores), found = gradient(lm.params, split(got), split(states))
        np.testing.assert_allclose(scores, log_probs, rtol=1e-5, atol=2e-5)
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(by_hand), strict=True):
            np.testing.assert_allclose(left, right, rtol=2e-3, atol=2e-4 * np.abs(right).max())
        if kind is AxisType.Explicit:  # then a gradient has its parameter's sharding by type
            for leaf, own in zip(jax.tree.leaves(found), jax.tree.leaves(lm.params), strict=True):
                assert leaf.sharding.is_equivalent_to(own.sharding, leaf.ndim)
            ask = {"prompts": PROMPTS, "targets": [[9, 10], [11]], "key": 0, "n": 4}
            np.testing.assert_allclose(rl.log_likelihood(lm, **ask), rl.log_likelihood(one, **ask), rtol=1e-4,
                                       atol=1e-4)
        # weights that come from one device, as float32 of a pure dict
        before = lm.compile_count
        lm.update_params(nnx.to_pure_dict(new))
        np.testing.assert_array_equal(rl.rollout(lm, PROMPTS, **SHAPE).tokens, after.tokens)
        assert lm.compile_count == before
        print(kind.name)

    # trainer and rollouts on disjoint halves
    halves = [jax.sharding.Mesh(half.reshape(4), ("tensor",), axis_types=(AxisType.Auto,))
              for half in (devices[:4], devices[4:])]
    sampler, trainer = (load(half) for half in halves)
    rl.rollout(sampler, PROMPTS, **SHAPE)
    before = sampler.compile_count
    trained = jax.tree.map(lambda leaf: leaf * 1.05, trainer.params)
    sampler.update_params(trained)
    assert {device for leaf in jax.tree.leaves(sampler.params) for device in leaf.devices()} == set(devices[:4])
    for left, right in zip(jax.tree.leaves(sampler.params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(left, right)
    got = rl.rollout(sampler, PROMPTS, **SHAPE)
    np.testing.assert_array_equal(got.tokens, after.tokens)
    assert sampler.compile_count == before
    scores = loss(trained, got, jax.device_get(rl.trace_states(got)))[1]  # the record goes to any mesh
    np.testing.assert_allclose(scores, got.log_prob, rtol=1e-5, atol=2e-5)
    print("disjoint")


if __name__ == "__main__":
    main()
