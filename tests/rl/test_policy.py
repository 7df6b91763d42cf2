"""The causal view of a diffusion model, and its training data in Tunix's shape; neither needs Tunix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax import rl
from djax.rl.policy import PAD_ID, diffusion_policy
from tests.support.tiny import MASK, PAD

pytestmark = pytest.mark.slow  # for users of Tunix, whose own tests have an environment of their own

COMPLETION = 8
PROMPTS = [[9, 17, MASK, 6, PAD], [12, 10], [7, 7, 7, 7]]
"""A literal mask id and the id that the model pads with are tokens of a prompt like others."""
ENDS = [*range(12), PAD]
"""Tokens that end a completion: many, so that some end early."""


@pytest.fixture(scope="module")
def policy(tiny_lm):
    return diffusion_policy(tiny_lm, completion_length=COMPLETION)


@pytest.fixture(scope="module")
def sampled(tiny_lm):
    return rl.rollout(tiny_lm, PROMPTS, key=1, num_samples=2, max_new_tokens=COMPLETION, block_length=COMPLETION,
                      eos_id=ENDS)


def as_causal_code_sees_it(sampled, *, width):
    """Left-padded prompts, and completions that end behind the first EOS."""
    rows = []
    for row in range(sampled.batch):
        given = sampled.valid[row] & ~sampled.is_open[row]
        prompt, kept = sampled.tokens[row][given], sampled.completions()[row]
        rows.append(np.concatenate([np.full(width - len(prompt), PAD_ID), prompt, kept,
                                    np.full(COMPLETION - len(kept), PAD_ID)]))
    return jnp.asarray(np.stack(rows), jnp.int32)


def test_the_view_scores_as_one_step_does(policy, sampled):
    tokens = as_causal_code_sees_it(sampled, width=11)
    logits, cache = nnx.jit(lambda model, x: model(x))(policy, tokens)
    assert cache is None
    shifted = jax.nn.log_softmax(logits[:, -COMPLETION - 1 : -1])  # as a causal scorer reads them
    kept = tokens[:, -COMPLETION:]
    got = jnp.take_along_axis(shifted, kept[..., None], axis=-1)[..., 0]
    states = rl.masked_states(sampled, jax.random.key(0), scheme="one_step")
    graphdef, params = nnx.split(policy.model)
    expected = jax.jit(rl.score)(graphdef, params, sampled, states)[:, sampled.first_block:]
    counted = np.asarray(sampled.is_completion)[:, sampled.first_block:]
    assert (counted.sum(1) == [len(row) for row in sampled.completions()]).all()
    np.testing.assert_allclose(np.asarray(got)[counted], np.asarray(expected)[counted], atol=2e-5)
    np.testing.assert_array_equal(kept != PAD_ID, counted)  # the token that ends an answer counts
    assert 1 <= min(len(row) for row in sampled.completions()) < COMPLETION


def test_the_view_is_no_causal_model(policy, sampled):
    """What stands in the completion changes nothing, and what the sampler cannot draw has no probability."""
    call = nnx.jit(lambda model, x: model(x)[0])
    tokens = as_causal_code_sees_it(sampled, width=11)
    logits = call(policy, tokens)
    np.testing.assert_array_equal(logits, call(policy, tokens.at[:, -COMPLETION:].set(3)))
    assert not np.array_equal(logits, call(policy, tokens.at[:, 10].set(3)))
    assert np.isfinite(logits).all()
    assert float(jax.nn.softmax(logits)[..., MASK].max()) == 0.0
    # more padding before a prompt says nothing
    wider = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=PAD_ID)
    np.testing.assert_allclose(call(policy, wider)[:, -COMPLETION - 1 : -1], logits[:, -COMPLETION - 1 : -1], atol=2e-5)


def test_a_policy_is_a_copy(policy, tiny_lm):
    mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(policy, nnx.Param))}
    theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tiny_lm.params)}
    assert len(mine) == len(theirs)
    assert not mine & theirs


def test_another_dtype_is_trained_in(tiny_lm):
    policy = diffusion_policy(tiny_lm, completion_length=4, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(policy, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    assert policy.model.config == dataclasses.replace(tiny_lm.config, dtype="bfloat16")
