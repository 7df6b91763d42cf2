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
from djax.contracts.types import Candidates, Decision, Forbidden, Reading
from djax.errors import ArgumentError
from djax.testing import check_part

RIGHT = [
    strategies.Remasking(strategies.Hierarchical(0.8, 0.4), 0.5), transforms.Credit(), transforms.TopP(0.7),
    proposals.RefuseToken(proposals.Sample(0.7), 2), cache_policies.WithWarmup(cache_policies.Vicinity(3, 5), 2),
    smoothing.SoftTokens(), stopping.AnyOf((stopping.OnEos(np.array([2, 4])), stopping.Never())),
    strategies.Threshold(np.float32([0.5, 0.6, 0.7])), transforms.ForbidTokens(np.array([1, 5]), 9),
    transforms.Chain((transforms.ForbidTokens(np.array([3])), transforms.Credit())), proposals.Sample(0.9)]


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


@struct.dataclass
class NoBound(Mine):
    @property
    def max_steps(self) -> Any:
        raise AttributeError("max_steps")


def test_a_part_is_told_by_what_it_has_most_of() -> None:
    with pytest.raises(ArgumentError, match=r"^strategy: got NoBound, which has no max_steps"):
        check_part(NoBound())
    with pytest.raises(ArgumentError, match=r"^strategy: got WrongShape") as refused:
        check_part(WrongShape())
    assert "check_part" not in str(refused.value)
    with pytest.raises(ArgumentError, match="check_part"):
        djax.Parts(strategy=WrongShape())


@struct.dataclass
class Bias:
    """A transform like a user's that raises token 3, by logits and by a reading; right until a subclass breaks it."""

    needs_logits: ClassVar[Any] = False

    def init(self, batch: int, block_length: int) -> Any:
        return jnp.full((batch, block_length, 1), 3, jnp.int32)

    def step(self, logits: Any, is_masked: Any, state: Any) -> Any:
        return logits.at[..., 3].add(9.0), state

    def wanted_ids(self, state: Any) -> Any:
        return state

    def step_reading(self, reading: Reading, is_masked: Any, state: Any) -> Any:
        before = reading.logit_of(state[..., 0])
        wins = before + 9 > reading.best_logit
        best, logit = jnp.where(wins, 3, reading.best), jnp.maximum(before + 9, reading.best_logit)
        total = reading.log_total + jnp.log1p(jnp.exp(before - reading.log_total) * jnp.expm1(9.0))
        return dataclasses.replace(
            reading, logits=reading.logits + 9 * (reading.ids == 3), best=best, best_logit=logit, drawn=best,
            drawn_logit=logit, log_total=total, log_sum_tempered=total - logit), state


@struct.dataclass
class Misspelt(Bias):
    wanted_ids: ClassVar[None] = None

    def wanted_id(self, state: Any) -> Any:
        return state


@struct.dataclass
class ForbidsByReading(Bias):
    def forbidden(self) -> Forbidden:
        return Forbidden(ids=jnp.array([2, 3]), limit=jnp.int32(99))


@struct.dataclass
class Draw(proposals.Greedy):
    """A proposal whose `step` does not go through its own `read`."""

    def step(self, keys: Any, logits: Any, tokens: Any) -> Candidates:
        return proposals.Greedy().step(keys, logits, tokens)


@struct.dataclass
class OtherDraw(Draw):
    def read(self, reading: Reading, tokens: Any) -> Candidates:
        return dataclasses.replace(super().read(reading, tokens), token=tokens)


@pytest.mark.parametrize(("part", "words"), [
    (Misspelt(), "token, confidence, log_prob.* wanted_ids"), (ForbidsByReading(), "token"),
    (transforms.Chain((Misspelt(),)), "token"), (OtherDraw(), "other token by a reading"),
], ids=lambda value: type(value).__name__ if not isinstance(value, str) else "")
def test_a_reading_has_to_give_the_candidates_of_the_logits(part: Any, words: str) -> None:
    check_part(Bias())
    with pytest.raises(ArgumentError, match=f"got {type(part).__name__}, .*{words}"):
        check_part(part)


class Says:
    """Stands for a method, and gives the same whatever it is given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *given: Any) -> Any:
        return self.value


def broken(base: type, **fields: Any) -> Any:
    """An instance of a subclass with other attributes; None takes one away, as far as `hasattr` goes."""
    def absent(part: Any) -> Any:
        raise AttributeError("absent")

    return struct.dataclass(type("Broken", (base,), {
        name: property(absent) if value is None else value for name, value in fields.items()}))()


@pytest.mark.parametrize(("axis", "change", "words"), [
    ("transform", {"step_reading": None}, "no step_reading"),
    ("transform", {"forbidden": Says((1, 2))}, "forbidden"),
    ("transform", {"forbidden": Says(Forbidden(ids=np.float32([1]), limit=np.int32(3)))}, "forbidden"),
    ("transform", {"step_reading": lambda part, reading, is_masked, state: reading}, "no pair"),
    ("transform", {"step_reading": lambda part, reading, is_masked, state: (reading, state * 0.5)}, "a state"),
    ("transform", {"step_reading": lambda part, reading, is_masked, state: (
        dataclasses.replace(reading, best=reading.ids), state)}, "a Reading of shape"),
    ("transform", {"wanted_ids": lambda part, state: state[..., 0]}, "wanted_ids"),
    ("transform", {"wanted_ids": lambda part, state: state * 1.0}, "wanted_ids"),
    ("transform", {"needs_logits": "no"}, "needs_logits .*True or False"),
    ("transform", {"needs_logits": lambda part: False}, "needs_logits .*True or False"),
    ("propose", {"noise": None, "read": None}, "no noise, read"),
    ("propose", {"noise": Says(3)}, "noise"),
    ("propose", {"read": lambda part, reading, tokens: reading}, "read gives a Reading"),
    ("propose", {"needs_logits": "no"}, "needs_logits .*True or False"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_a_part_says_of_readings_is_checked_when_it_is_chosen(axis: str, change: Any, words: str) -> None:
    part = broken(Bias if axis == "transform" else Draw, **change)
    outer = transforms.Chain((part,)) if axis == "transform" else proposals.RefuseToken(part, 2)
    for chosen, said in ((part, words), (outer, "")):
        with pytest.raises(ArgumentError, match=f"^{axis}: got {type(chosen).__name__}, .*{said}") as refused:
            djax.Parts(strategy=strategies.Threshold(0.9), **{axis: chosen})
        assert "\n" not in str(refused.value)


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
