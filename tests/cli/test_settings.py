"""`--set` and the registry: parts by name, their numbers by path, and a part that is new at run time."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from djax import api, proposals, recipes, rl, strategies
from djax.cli.app import app
from djax.cli.flags import RecipeFlags
from djax.cli.recipe import build_recipe
from djax.contracts import struct
from djax.contracts.types import Decision
from djax.errors import ArgumentError
from djax.loop.state import Parts
from djax.parts import registry
from djax.parts.cache_policies import NoCache, Periodic, Vicinity, WithWarmup
from djax.parts.proposals import Sample
from djax.parts.schedules import Constant, Linear
from djax.parts.smoothing import HardTokens, SoftTokens
from djax.parts.stopping import AnyOf, Never, OnEos
from djax.parts.strategies import Factor, Hierarchical, LocalLeap, Quota, RandomOrder, Remasking, Threshold
from djax.parts.strategies.selection import best, masked_confidence
from djax.parts.transforms import Chain, Credit, Identity, TopK
from djax.recipes.settings import make

FALLING = Linear(1.0, -0.02, minimum=0.8)
VICINITY = WithWarmup(Vicinity(before=16, after=16), steps=4)


def built(*settings: str, **flags: Any) -> Parts:
    return build_recipe(RecipeFlags(set=list(settings), **flags))


SETTINGS: list[tuple[list[str], str, Any]] = [
    # another part, with its defaults or with numbers
    (["strategy=local_leap"], "strategy", LocalLeap()),
    (["strategy=Local-Leap:near=0.6,radius=2"], "strategy", LocalLeap(near=0.6, radius=2)),
    (["strategy=factor:factor=1"], "strategy", Factor(1.0)),
    (["strategy=hierarchical:low=0.3,high=0.9"], "strategy", Hierarchical(high=0.9, low=0.3)),
    (["cache_policy=vicinity:before=8,after=4"], "cache_policy", Vicinity(before=8, after=4)),
    (["cache-policy=none"], "cache_policy", NoCache()),
    (["transform=credit:alpha=1"], "transform", Credit(alpha=1.0)),
    (["transform=credit", "transform=none"], "transform", Identity()),
    (["propose=sample:temperature=0.5,confidence=drawn"], "propose", Sample(0.5, confidence="drawn")),
    (["stop_rule=on_eos:eos_ids=3"], "stop_rule", OnEos(np.int32(3))),
    # one that wraps takes what is there
    (["strategy=remasking:threshold=0.4"], "strategy", Remasking(Threshold(FALLING), 0.4)),
    (["strategy=quota:steps=3", "strategy=random_order"], "strategy", RandomOrder(Quota(3))),
    (["strategy=quota:steps=3", "strategy=random_order", "strategy=remasking:threshold=0.4"], "strategy",
     Remasking(RandomOrder(Quota(3)), 0.4)),
    (["cache_policy=periodic:every=3"], "cache_policy", Periodic(VICINITY, every=3)),
    (["transform=credit", "transform=chain", "transform.transforms=top_k:k=5"], "transform",
     Chain((Credit(), TopK(5)))),
    (["transform=chain:transforms=credit"], "transform", Chain((Credit(),))),
    (["propose=sample:temperature=0.7,filters=top_k:k=5"], "propose", Sample(0.7, filters=(TopK(5),))),
    (["strategy=hierarchical:low=0.3,high=linear:start=1,slope=-0.02"], "strategy",
     Hierarchical(high=Linear(1.0, -0.02), low=0.3)),
    (["stop_rule=any_of", "stop_rule.rules=on_eos:eos_ids=3"], "stop_rule", AnyOf((Never(), OnEos(np.int32(3))))),
    # a number of the part that is there, or of the one inside
    (["strategy.threshold=0.7"], "strategy", Threshold(0.7)),
    (["strategy.threshold.minimum=0.7"], "strategy", Threshold(Linear(1.0, -0.02, minimum=0.7))),
    (["strategy.threshold=constant:value=0.5"], "strategy", Threshold(Constant(0.5))),
    (["cache_policy.before=3", "cache_policy.steps=2"], "cache_policy", WithWarmup(Vicinity(3, 16), steps=2)),
    (["cache_policy.policy.after=3"], "cache_policy", WithWarmup(Vicinity(16, 3), steps=4)),
    (["cache_policy.policy=dual", "cache_policy.policy=vicinity:after=1"], "cache_policy",
     WithWarmup(Vicinity(after=1), steps=4)),
    (["strategy=remasking:threshold=0.4", "strategy.threshold=0.3", "strategy.strategy.threshold=0.9"], "strategy",
     Remasking(Threshold(0.9), 0.3)),
    (["transform=credit", "transform=chain", "transform.beta=0.5"], "transform", Chain((Credit(beta=0.5),))),
    (["propose=sample:temperature=0.5", "propose.filters=top_k:k=5", "propose.k=6"], "propose",
     Sample(0.5, filters=(TopK(6),))),
    # a parameter of the recipe; an axis of the same name where the value names a part
    (["before=8", "after=0", "warmup=2"], "cache_policy", WithWarmup(Vicinity(before=8, after=0), steps=2)),
    (["threshold=0.7", "smoothing=none"], "strategy", Threshold(0.7)),
    (["smoothing=0.2"], "smoothing", SoftTokens(Linear(0.15, 0.02, maximum=0.2))),
    (["smoothing=soft_tokens"], "smoothing", SoftTokens()),
    (["smoothing=hard_tokens"], "smoothing", HardTokens()),
    (["cache=false"], "cache_policy", NoCache()),
    (["mask_token=refuse"], "mask_token", "refuse"),
]


@pytest.mark.parametrize(("settings", "axis", "expected"), SETTINGS, ids=[" ".join(row[0]) for row in SETTINGS])
def test_what_is_set(settings: list[str], axis: str, expected: Any) -> None:
    got, base = built(*settings), recipes.dinfer()
    assert getattr(got, axis) == expected
    others = {"strategy", "cache_policy", "transform", "propose", "mask_token"} - {axis}
    if settings[-1] != "smoothing=none":  # the threshold falls under smoothing
        assert all(getattr(got, other) == getattr(base, other) for other in others)


def test_settings_are_applied_in_order_after_the_recipe_and_its_flags() -> None:
    assert built("strategy.threshold=0.7", "strategy=local_leap").strategy == LocalLeap()
    assert built("strategy=remasking:threshold=0.4", threshold=0.6).strategy == Remasking(
        Threshold(Linear(1.0, -0.02, minimum=0.6)), 0.4)
    assert built("strategy.radius=1", strategy="local_leap").strategy == LocalLeap(radius=1)
    assert built("threshold=0.5", threshold=0.6) == recipes.dinfer(threshold=0.5), "what is set stands above a flag"


@pytest.mark.parametrize(("settings", "lost"), [
    (["cache_policy=vicinity", "before=4"], "before: got 4"), (["before=4", "cache_policy=dual"], "before: got 4"),
    (["strategy=quota", "threshold=0.5", "smoothing=none"], "threshold: got 0.5")])
def test_a_parameter_of_which_nothing_is_left_is_refused(settings: list[str], lost: str) -> None:
    with pytest.raises(ArgumentError, match=rf"--set {lost}, a parameter of a part that other settings replace"):
        built(*settings)
    assert built("strategy=remasking:threshold=0.4", "threshold=0.5").strategy.strategy == Threshold(
        Linear(1.0, -0.02, minimum=0.5)), "what wraps a part keeps it"


WRONG: list[tuple[str, str]] = [
    ("quota", "--set: got 'quota'; allowed PATH=VALUE, such as strategy.threshold=0.8; see 'djax parts'"),
    ("=3", "--set: got '=3'; allowed PATH=VALUE"),
    ("stratgy=quota", "--set stratgy: got 'stratgy'; allowed threshold, .*, mask_token; did you mean strategy?"),
    ("stratgy.steps=3", "--set stratgy.steps: got 'stratgy'; .*; did you mean strategy?"),
    ("strategy=lokal_leap", "--set strategy: got 'lokal_leap'; allowed factor, .*; did you mean local_leap?"),
    ("strategy=none", "--set strategy: got 'none'; allowed factor, hierarchical, "),
    ("strategy=", "--set strategy: got ''; allowed factor, hierarchical, "),
    ("strategy=credit", "--set strategy: got 'credit'; allowed factor, hierarchical, "),
    ("transform=credit_state", "--set transform: got 'credit_state'; allowed none, chain, credit, "),
    ("strategy=factor", "--set strategy=factor:factor: got nothing; allowed a number; give it: --set strategy=factor:"),
    ("strategy=remasking", "--set strategy=remasking:threshold: got nothing; allowed a number; give it"),
    ("strategy=quota:3", "--set strategy: got '3'; allowed NAME=VALUE after the colon"),
    ("strategy=quota:steps=4,steps=5", "--set strategy: got steps twice; allowed NAME=VALUE after the colon"),
    ("strategy.=quota", "--set: got 'strategy.=quota'; allowed PATH=VALUE"),
    ("strategy.threshold=0_9", "--set strategy.threshold: got '0_9'; allowed a number"),
    ("strategy=quota:stepz=3", "--set strategy=quota:stepz: got 'stepz'; allowed steps; did you mean steps?"),
    ("strategy=quota:steps=0", "--set strategy=quota:steps: got 0; allowed an integer of at least 1"),
    ("strategy=quota:steps=1.5", "--set strategy=quota:steps: got '1.5'; allowed an integer"),
    ("strategy=local_leap:anchor=0.5", "--set strategy=local_leap:near: got 0.75; .*; lower it or raise anchor"),
    ("strategy.treshold=1", "--set strategy.treshold: got 'treshold'; allowed threshold; did you mean threshold?"),
    ("strategy.steps=1", "--set strategy.steps: got 'steps'; allowed threshold; "),
    ("strategy.threshold=7", "--set strategy.threshold: got 7.0; allowed a finite number of at least 0 and at most 1"),
    ("strategy.threshold=nan", "--set strategy.threshold: got nan; allowed a finite number"),
    ("strategy.threshold=abc", "--set strategy.threshold: got 'abc'; allowed a number, constant, linear, cosine"),
    ("strategy.threshold.minimum=nan", "--set strategy.threshold.minimum: got nan; allowed a finite number"),
    ("strategy.threshold.floor=1", "--set strategy.threshold.floor: got 'floor'; allowed start, slope, minimum, max"),
    ("strategy.threshold.minimum.x=1", "--set strategy.threshold.minimum.x: got a field of 0.8; allowed fields of"),
    ("cache_policy=periodic:every=0", "--set cache_policy=periodic:every: got 0; allowed an integer of at least 1"),
    ("cache_policy.every=3", "--set cache_policy.every: got 'every'; allowed policy, steps, before, after"),
    ("cache_policy.before=-3", "--set cache_policy.before: got -3; allowed an integer of at least 0"),
    ("before=-3", "--set before: got -3; allowed an integer of at least 0"),
    ("before=true", "--set before: got 'true'; allowed an integer"),
    ("threshold=x", "--set threshold: got 'x'; allowed a number"),
    ("smoothing=soft", "--set smoothing: got 'soft'; allowed none, a number"),
    ("cache=dual", "--set cache: got 'dual'; allowed true, false"),
    ("mask_token=keep", "--set mask_token: got 'keep'; allowed forbid, refuse"),
    ("mask_token.x=keep", "--set mask_token.x: got a field of 'forbid'; allowed fields of parts"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG, ids=[setting for setting, _ in WRONG])
def test_a_wrong_setting_is_one_line(setting: str, message: str) -> None:
    done = CliRunner().invoke(app, ["infill", "a [MASK]", "--set", setting])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    start, _, end = message.partition(".*")
    assert done.stderr.startswith("djax: " + start), done.stderr
    assert end in done.stderr
    assert done.stderr.count("; ") >= 2, done.stderr


def test_what_hints_do_not_say_is_guessed() -> None:
    def own(one, two: jax.Array, three: Any = None, *, four: str = "x") -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        return one, two, three, four

    assert make(own, {"one": "3", "two": "0.5", "three": "true", "four": "3"}) == (3, 0.5, True, "3")
    assert make(own, {"one": "none", "two": "some text"}) == (None, "some text", None, "x")


def test_names_are_the_classes_of_all() -> None:
    assert registry.parts("strategy")["local_leap"] is LocalLeap
    assert list(registry.parts("propose")) == ["greedy", "refuse_token", "sample"]
    assert list(registry.parts("filter")) == ["min_p", "top_k", "top_p"]
    assert "credit_state" not in registry.parts("transform")
    for axis in registry.AXES:
        for name, part in registry.parts(axis).items():
            assert registry.snake_case(part.__name__) == name
    assert registry.name_of(proposals.Greedy()) == "greedy"


@struct.dataclass
class Toy:
    """Commits the best position of every step, and all that is at least `sure`."""

    sure: float = 0.9
    reopens: ClassVar[bool] = False

    def max_steps(self, block_length: int) -> int:
        return block_length

    def init(self, batch: int, block_length: int) -> Any:
        return ()

    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        confidence = masked_confidence(candidates, is_masked)
        commit = best(confidence) | (confidence >= self.sure)
        return Decision(commit=commit, reopen=commit & False), state


def test_a_new_part_is_one_line(golden_lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A class and its name in its axis' `__all__`: every call takes it, and the command line finds it by name."""
    monkeypatch.setattr(strategies, "Toy", Toy, raising=False)
    monkeypatch.setattr(strategies, "__all__", [*strategies.__all__, "Toy"])

    call: dict[str, Any] = {"max_new_tokens": 8, "block_length": 4, "mask_id": 150}
    recipe = Parts(strategy=strategies.Toy(0.1))  # type: ignore[attr-defined]
    got = golden_lm.generate([[1, 2, 3]], recipe=recipe, **call)
    *_, last = golden_lm.stream([[1, 2, 3]], recipe=recipe, drafts=False, **call)
    np.testing.assert_array_equal(last.tokens, got.canvas)
    rollout = rl.rollout(golden_lm, [[1, 2, 3]], key=0, temperature=0.0, recipe=recipe, **call)
    np.testing.assert_array_equal(rollout.tokens, got.canvas)
    assert rollout.replayable

    monkeypatch.setattr(api, "load", lambda *given, **options: golden_lm)
    seen: dict[str, Any] = {}
    real = golden_lm.generate
    monkeypatch.setattr(golden_lm, "generate", lambda prompts, **options: real(
        prompts, **seen.setdefault("options", options) | {"mask_id": 150}))
    (tmp_path / "ids").write_text("[1, 2, 3]")
    done = CliRunner().invoke(app, [
        "generate", "--token-ids", str(tmp_path / "ids"), "--max-new-tokens", "8", "--block-length", "4", "--recipe",
        "llada", "--set", "strategy=toy", "--set", "strategy.sure=0.1"])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(token) for token in got.tokens[0]]
    assert seen["options"]["recipe"] == recipe
    assert build_recipe(RecipeFlags(strategy="toy")).strategy == Toy()

    listed = CliRunner().invoke(app, ["parts"]).stdout
    assert f"  toy: {inspect.getdoc(Toy)}\n      sure: a number (0.9)\n" in listed


def test_the_list_holds_every_part_and_recipe() -> None:
    listed = CliRunner().invoke(app, ["parts"]).stdout
    for axis in registry.AXES:
        assert f"\n{axis}\n" in listed
        assert all(f"\n  {name}: {(inspect.getdoc(part) or '').splitlines()[0]}" in listed
                   for name, part in registry.parts(axis).items())
    for name in recipes.RECIPES:
        assert f"\n  {name}: " in listed
    assert "      before: an integer (16)\n" in listed
    assert "      strategy: a strategy (the one that is there)\n" in listed
    assert "      cache: none, prefix, dual (dual)\n" in listed
