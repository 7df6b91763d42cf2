"""A reading of the head gives what its logits give, and the loop asks for no more than it needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax import proposals, smoothing, strategies, transforms
from djax.contracts import answers, struct
from djax.contracts.canvas import Canvas
from djax.contracts.types import Candidates, HeadQuery
from djax.loop.denoise import denoise
from djax.models.layers.head import read_head
from tests.support import toy

BATCH, LENGTH, VOCAB = 3, 5, 13
FORBID = transforms.ForbidTokens(jnp.array([1, 4, -1]), jnp.int32(12))
TRANSFORMS: dict[str, Any] = {
    "identity": transforms.Identity(),
    "forbid": FORBID,
    "credit": transforms.Credit(0.9, 0.7, 0.4),
    "forbid_credit": transforms.Chain((FORBID, transforms.Credit(1.5, 0.9, 0.1))),
    "forbid_twice": transforms.Chain((transforms.ForbidTokens(jnp.array([7])), FORBID, transforms.Identity())),
    "credit_twice": transforms.Chain((FORBID, transforms.Credit(), transforms.Credit(1.1, 0.5, 0.3))),
    "nested": transforms.Chain((transforms.Chain((FORBID,)), transforms.Identity())),
}
PROPOSALS: dict[str, Any] = {
    "greedy": proposals.Greedy(),
    "sample": proposals.Sample(jnp.float32(0.8)),
    "sample_at_zero": proposals.Sample(jnp.float32(0.0)),
    "refuse": proposals.RefuseToken(proposals.Sample(jnp.float32(1.3)), 2),
}

QUICK = {("forbid_credit", "sample"), ("nested", "sample"), ("forbid_credit", "greedy")}


def by_logits(part: Any, propose: Any, logits: jax.Array, state: Any, **given: Any) -> tuple[Candidates, Any]:
    logits, state = part.step(logits, given["is_masked"], state)
    return propose.step(given["keys"], logits, given["tokens"]), state


def by_reading(part: Any, propose: Any, logits: jax.Array, state: Any, **given: Any) -> tuple[Candidates, Any]:
    tokens, asked = given["tokens"][..., None], answers.wanted_ids(part, state)
    ids = tokens if asked is None else jnp.concatenate([tokens, asked], -1)
    query = HeadQuery(ids=ids, forbidden=answers.forbidden(part), noise=propose.noise(given["keys"], LENGTH))
    reading, expected = read_head(logits, jnp.eye(VOCAB), query)  # times one and plus zeros: the logits themselves
    assert expected is None
    reading, state = part.step_reading(reading, given["is_masked"], state)
    return propose.read(reading, given["tokens"]), state


@pytest.mark.parametrize(("transform", "propose"), [
    pytest.param(transform, propose, marks=() if (transform, propose) in QUICK else pytest.mark.slow)
    for transform, propose in [
        *((name, "sample") for name in TRANSFORMS),
        *(("forbid_credit", name) for name in PROPOSALS if name != "sample")]])
def test_a_reading_gives_what_the_logits_give(transform: str, propose: str) -> None:
    """Over the steps of a block, with credit growing in either way."""
    part, proposal = TRANSFORMS[transform], PROPOSALS[propose]
    assert not part.needs_logits
    assert not proposal.needs_logits
    rng = np.random.default_rng(3)
    states = [part.init(BATCH, LENGTH)] * 2
    both = [jax.jit(function) for function in (by_logits, by_reading)]
    drawn = set()
    for step in range(LENGTH):
        logits = jnp.asarray(rng.normal(size=(BATCH, LENGTH, VOCAB)) * 1.5, jnp.float32)
        given = {"keys": jax.random.split(jax.random.key(step), BATCH),
                 "tokens": jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32),
                 "is_masked": jnp.asarray(rng.random((BATCH, LENGTH)) < 0.7)}
        (expected, states[0]), (got, states[1]) = (
            function(part, proposal, logits, state, **given) for function, state in zip(both, states, strict=True))
        np.testing.assert_array_equal(got.token, expected.token, f"step {step}")
        for name in ("confidence", "log_prob", "current"):
            np.testing.assert_allclose(
                getattr(got, name), getattr(expected, name), rtol=3e-6, atol=3e-6, err_msg=f"step {step}: {name}")
        for left, right in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[0]), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        drawn |= set(np.asarray(got.token).ravel().tolist())
    assert len(drawn) > 4
    if transform != "identity" and transform != "credit":
        assert not drawn & {1, 4, 12}


def test_ties_go_to_the_lowest_id() -> None:
    logits = jnp.zeros((1, LENGTH, VOCAB)).at[..., 3].set(1.0).at[..., 9].set(1.0)
    given = {"keys": jax.random.split(jax.random.key(0), 1), "tokens": jnp.zeros((1, LENGTH), jnp.int32),
             "is_masked": jnp.ones((1, LENGTH), bool)}
    for part in (transforms.Identity(), transforms.Credit(alpha=0.0)):
        for function in (by_logits, by_reading):
            got, _ = jax.jit(function)(part, proposals.Greedy(), logits, part.init(1, LENGTH), **given)
            assert (np.asarray(got.token) == 3).all()


def test_filters_and_what_follows_a_credit_need_logits() -> None:
    filters = (transforms.TopK(2), transforms.TopP(0.5), transforms.MinP(0.1))
    assert all(getattr(part, "needs_logits", True) for part in filters)
    assert transforms.Chain((FORBID, transforms.TopK(2))).needs_logits
    # forbidding after a credit: the credited token may be the forbidden one, so the order counts
    assert transforms.Chain((transforms.Credit(), FORBID)).needs_logits

    @struct.dataclass
    class Own:
        def step(self, keys: Any, logits: Any, tokens: Any) -> Any:
            return None

    assert proposals.RefuseToken(Own(), 3).needs_logits


@struct.dataclass
class Counting(toy.ToyDenoiser):
    """Notes what the loop asks of its head while it is traced."""

    asked: Any = struct.field(pytree_node=False, default=None)

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        self.asked.append("logits")
        return super().unembed(params, hidden)

    def read(self, params: Any, hidden: jax.Array, query: HeadQuery, *, expected: bool) -> Any:
        self.asked.append("reading")
        return super().read(params, hidden, query, expected=expected)


def decode(denoiser: Any, **parts: Any) -> Any:
    canvas = Canvas.from_prompts([[3, 1, 4], [5]], max_new_tokens=12, block_length=6, mask_id=toy.MASK,
                                 pad_id=toy.PAD, bucket=False)
    return denoise(denoiser, toy.make_params(), canvas, jax.random.key(1),
                   **{"strategy": strategies.Threshold(0.6), "transform": TRANSFORMS["forbid_credit"],
                      "propose": proposals.Sample(0.7)} | parts)


@pytest.mark.parametrize("soft", [
    pytest.param(smoothing.HardTokens(), id="hard", marks=pytest.mark.slow),
    pytest.param(smoothing.SoftTokens(), id="soft")])
def test_the_loop_takes_readings_where_it_can(soft: Any) -> None:
    with_reading, without = [], []
    first = decode(Counting(asked=with_reading), smoothing=soft)
    second = decode(Counting(asked=without, needs_logits=True), smoothing=soft)
    assert set(with_reading) == {"reading"}
    assert set(without) == {"logits"}
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.commit_step, second.commit_step)
    np.testing.assert_allclose(first.log_prob, second.log_prob, atol=1e-4)
    asked: list[str] = []
    decode(Counting(asked=asked), smoothing=soft, transform=transforms.TopK(5))
    assert set(asked) == {"logits"}
