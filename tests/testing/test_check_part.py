"""`djax.testing.check_part`, and the check of shapes when parts are chosen: each wrong part is named."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import cache_policies, proposals, smoothing, stopping, strategies, transforms
from djax.contracts import struct
from djax.contracts.types import Decision
from djax.errors import ArgumentError
from djax.testing import check_part

RIGHT = [
    strategies.Remasking(strategies.Hierarchical(0.8, 0.4), 0.5), transforms.Credit(), transforms.TopP(0.7),
    proposals.RefuseToken(proposals.Sample(0.7), 2), cache_policies.WithWarmup(cache_policies.Vicinity(3, 5), 2),
    smoothing.SoftTokens(), stopping.AnyOf((stopping.OnEos(np.array([2, 4])), stopping.Never())),
    strategies.Threshold(np.float32([0.5, 0.6, 0.7]))]


@pytest.mark.parametrize("part", RIGHT, ids=lambda part: type(part).__name__)
def test_parts_of_djax_pass(part: Any) -> None:
    check_part(part)


@struct.dataclass
class Mine:
    """A strategy like a user's, right until a subclass breaks it."""

    limit: float = 0.5
    reopens: ClassVar[bool] = False

    def max_steps(self, block_length: int) -> int:
        return block_length

    def init(self, batch: int, block_length: int) -> Any:
        return jnp.zeros(batch)

    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        commit = is_masked & (candidates.confidence > self.limit)
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state + 1.0


CALLS: list[int] = []


@struct.dataclass
class WrongShape(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        return Decision(commit=is_masked[:, 0], reopen=is_masked), state


@struct.dataclass
class WrongType(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        return candidates.confidence > self.limit, state


@struct.dataclass
class OtherState(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        return Decision(commit=is_masked, reopen=~is_masked), state[:, None]


@struct.dataclass
class Raises(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        return candidates.entropy, state


@struct.dataclass
class Branches(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        return super().step(keys, candidates, is_masked, info, state) if self.limit > 0.3 else None


@struct.dataclass
class Counts(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        CALLS.append(1)
        return Decision(commit=is_masked & (len(CALLS) % 4 < 2), reopen=jnp.zeros_like(is_masked)), state


@struct.dataclass
class MixesRows(Mine):
    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        commit = is_masked & (candidates.confidence > candidates.confidence.mean())
        return Decision(commit=commit, reopen=jnp.zeros_like(commit)), state


@struct.dataclass
class StaticNumber(Mine):
    limit: float = struct.field(pytree_node=False, default=0.5)
    weights: Any = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass
class NoPytree:
    limit: float = 0.5
    reopens: ClassVar[bool] = False
    max_steps, init, step = Mine.max_steps, Mine.init, Mine.step


@pytest.mark.parametrize(("part", "words"), [
    (WrongShape(), "commit has shape"), (WrongType(), "not a Decision"), (OtherState(), "gives a state of shape"),
    (Raises(), "AttributeError"), (Branches(), "fails"), (Counts(), "traced again"), (MixesRows(), "row . depends"),
    (NoPytree(), "djax.struct.dataclass"), (StaticNumber(weights=[1]), "hashed"),
], ids=lambda value: type(value).__name__ if not isinstance(value, str) else "")
def test_a_wrong_part_is_named(part: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"strategy: got {type(part).__name__}.*{words}"):
        check_part(part)


@pytest.mark.parametrize("part", [WrongShape(), WrongType(), OtherState(), Raises(), Branches(), 3, Mine, None],
                         ids=lambda part: type(part).__name__)
def test_a_choice_of_parts_refuses_it_when_it_is_made(part: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^strategy: got "):
        djax.Parts(strategy=part)
    with pytest.raises(ArgumentError, match=r"^transform: got "):
        djax.Parts(strategy=strategies.Threshold(0.9), transform=part)


def test_the_check_costs_no_second_trace() -> None:
    """A sweep makes many recipes of one structure."""
    @struct.dataclass
    class Traced(Mine):
        def init(self, batch: int, block_length: int) -> Any:
            CALLS.append(1)
            return jnp.zeros(batch)

    before = len(CALLS)
    for limit in np.linspace(0, 1, 7):
        djax.Parts(strategy=Traced(float(limit)))
    assert len(CALLS) == before + 1


def test_parts_compare_by_their_numbers() -> None:
    a, b = (djax.Parts(strategy=strategies.Threshold(np.float32(limit))) for limit in (0.5, 0.6))
    assert a == djax.Parts(strategy=strategies.Threshold(jnp.float32(0.5)))
    assert hash(a) == hash(b)
    assert a != b
    assert transforms.ForbidTokens(np.array([1, 2])) != transforms.ForbidTokens(np.array([1, 2, 3]))
    assert proposals.Greedy() != transforms.Identity()
    assert struct.same_arrays(jax.random.key(1), jax.random.key(1))
    assert not struct.same_arrays(jax.random.key(1), jax.random.key(2))
