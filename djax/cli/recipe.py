"""Flags to a `Recipe`: start from a published one, replace the parts that flags name.

The numbers of the recipes stay in `djax.recipes`: its functions' signatures give the defaults, and its
functions build the parts.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any

from djax import recipes
from djax.cli.flags import RecipeFlags
from djax.contracts.types import CachePolicy, Strategy
from djax.errors import ArgumentError, check_choice, check_integer, check_number, shown
from djax.parts.cache_policies import BlockCausal, Dual, NoCache, Periodic, Prefix, Vicinity, WithWarmup
from djax.parts.smoothing import HardTokens
from djax.parts.strategies import Factor, Hierarchical, Quota, RandomOrder, Remasking, Threshold
from djax.parts.transforms import Credit, Identity
from djax.recipes import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "llada": recipes.llada,
    "fast_dllm": recipes.fast_dllm,
    "dinfer": recipes.dinfer,
    "dinfer_credit": recipes.dinfer_credit,
    "dinfer_hierarchical": recipes.dinfer_hierarchical,
    "llada2": recipes.llada2,
}
STRATEGIES: dict[str, type] = {"threshold": Threshold, "quota": Quota, "factor": Factor, "hierarchical": Hierarchical}
CACHES: dict[str, type] = {
    "none": NoCache, "prefix": Prefix, "dual": Dual, "vicinity": Vicinity, "block_causal": BlockCausal}
MASK_TOKENS = ("forbid", "refuse")

_STRATEGY_FLAGS = {"threshold": "threshold", "steps": "quota", "factor": "factor", "high": "hierarchical",
                   "low": "hierarchical"}
_CACHE_FLAGS = {"before": ("vicinity",), "after": ("vicinity",), "warmup": ("prefix", "dual", "vicinity"),
                "refresh_every": ("prefix", "dual", "vicinity")}
_CREDIT_FLAGS = ("credit_alpha", "credit_beta", "credit_gamma")
_IN_RANGE = "give one in that range"
_PROBABILITIES = ("threshold", "high", "low", "remask", "smoothing", "credit_beta")


@dataclasses.dataclass(frozen=True)
class _Base:
    """What a recipe is made of, by name, and the numbers that it sets."""

    strategy: str
    cache: str
    smoothing: float
    credit: bool
    numbers: dict[str, Any]


def build_recipe(flags: RecipeFlags) -> Recipe:
    """The recipe that the flags ask for.

    Raises:
        ArgumentError: an unknown name, a number out of range, or a flag that the chosen parts have no use for.
    """
    if ":" in flags.recipe:
        return _own_recipe(flags)
    _check_numbers(flags)
    base = _read(_choice("recipe", flags.recipe, RECIPES))
    strategy = base.strategy if flags.strategy is None else _choice("strategy", flags.strategy, STRATEGIES)
    if flags.strategy is None and flags.factor is not None and "factor" in _defaults(RECIPES[_plain(flags.recipe)]):
        strategy = "factor"  # the recipe's own other rule
    cache = base.cache if flags.cache is None else _choice("cache", flags.cache, CACHES)
    credit = base.credit if flags.credit is None else flags.credit
    _check_use(flags, strategy=strategy, cache=cache, credit=credit)
    smoothing = base.smoothing if flags.smoothing is None else flags.smoothing
    recipe = Recipe(
        strategy=_wrapped(flags, _strategy(flags, strategy, base, smoothing)),
        cache_policy=_cache_policy(flags, cache, base),
        transform=_credit(flags, base) if credit else Identity(),
        smoothing=recipes.dinfer(smoothing=smoothing).smoothing if smoothing else HardTokens())
    if flags.mask_token is not None:
        mask_token = _choice("mask_token", flags.mask_token, MASK_TOKENS)
        recipe = dataclasses.replace(recipe, mask_token="forbid" if mask_token == "forbid" else "refuse")
    return recipe


def _own_recipe(flags: RecipeFlags) -> Recipe:
    """What a function of the user's own gives, named as module:function; looked for in the working directory too."""
    others = [field.name for field in dataclasses.fields(flags)
              if field.name != "recipe" and getattr(flags, field.name) != field.default]
    if others:
        raise ArgumentError(flag(others[0]), f"it with --recipe {flags.recipe}", allowed="it with a recipe of djax",
                            advice="put the number into your function")
    module, _, function = flags.recipe.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        make = operator.attrgetter(function)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError("--recipe", f"{shown(flags.recipe)} ({error})",
                            allowed="module:function, of a module that Python finds from here",
                            advice="check both names") from error
    recipe = make() if callable(make) else make
    if not isinstance(recipe, Recipe):
        raise ArgumentError("--recipe", f"{shown(flags.recipe)}, which gives a {type(recipe).__name__}",
                            allowed="a function without arguments that returns djax.Parts", advice="return one")
    return recipe


def flag(name: str) -> str:
    """`refresh_every` -> `--refresh-every`."""
    return "--" + name.replace("_", "-")


def _plain(value: str) -> str:
    return value.strip().lower().replace("-", "_")


def _choice(name: str, value: str, allowed: Any) -> str:
    plain = _plain(value)
    return plain if plain in allowed else str(check_choice(flag(name), value, allowed))


def _read(name: str) -> _Base:
    """The names of a recipe's parts from the parts themselves, its numbers from its function's defaults."""
    built = RECIPES[name]()
    numbers = _defaults(RECIPES[name])
    policy = built.cache_policy
    while isinstance(policy, WithWarmup | Periodic):
        policy = policy.policy
    soft = built.smoothing.soft
    return _Base(
        strategy=next(key for key, kind in STRATEGIES.items() if isinstance(built.strategy, kind)),
        cache=next(key for key, kind in CACHES.items() if isinstance(policy, kind)),
        smoothing=numbers["smoothing"] if soft else 0.0, credit=isinstance(built.transform, Credit),
        numbers={key: value for key, value in numbers.items() if key not in ("cache", "smoothing", "factor")})


def _defaults(function: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _check_numbers(flags: RecipeFlags) -> None:
    for name in _PROBABILITIES:
        value = getattr(flags, name)
        if value is not None:
            check_number(flag(name), value, 0.0, 1.0, advice=_IN_RANGE)
    for name in ("factor", "credit_alpha", "credit_gamma"):
        value = getattr(flags, name)
        if value is not None:
            check_number(flag(name), value, 0.0, advice=_IN_RANGE)
    for name, least in (("steps", 1), ("refresh_every", 1), ("before", 0), ("after", 0), ("warmup", 0)):
        value = getattr(flags, name)
        if value is not None:
            check_integer(flag(name), value, least, advice=_IN_RANGE)


def _check_use(flags: RecipeFlags, *, strategy: str, cache: str, credit: bool) -> None:
    """Refuse flags that would have no effect."""
    for name, owner in _STRATEGY_FLAGS.items():
        value = getattr(flags, name)
        if value is not None and strategy != owner:
            raise ArgumentError(flag(name), f"{value} with strategy {strategy}", allowed=f"with strategy {owner}",
                                advice=f"add --strategy {owner} or drop {flag(name)}")
    for name, owners in _CACHE_FLAGS.items():
        value = getattr(flags, name)
        if value is not None and cache not in owners:
            raise ArgumentError(flag(name), f"{value} with cache {cache}", allowed=f"with cache {' or '.join(owners)}",
                                advice=f"add --cache {owners[-1]} or drop {flag(name)}")
    for name in _CREDIT_FLAGS:
        value = getattr(flags, name)
        if value is not None and not credit:
            raise ArgumentError(flag(name), f"{value} without credit decoding", allowed="with --credit",
                                advice=f"add --credit or drop {flag(name)}")


def _strategy(flags: RecipeFlags, name: str, base: _Base, smoothing: float) -> Strategy:
    weight = smoothing or None
    if name == "quota":
        return recipes.llada(steps_per_block=flags.steps).strategy
    if name == "factor":
        if flags.factor is None:
            raise ArgumentError("--factor", "nothing with strategy factor", allowed="a number of at least 0",
                                advice="give it, for example --factor 1.5")
        return Factor(flags.factor)
    if name == "threshold":
        default = base.numbers.get("threshold", _defaults(recipes.dinfer)["threshold"])
        return recipes.dinfer(threshold=_or(flags.threshold, default), smoothing=weight).strategy
    published = _defaults(recipes.dinfer_hierarchical)
    high, low = (_or(getattr(flags, key), base.numbers.get(key, published[key])) for key in ("high", "low"))
    if low > high:
        raise ArgumentError("--low", low, allowed=f"at most --high, {high}", advice="lower it or raise --high")
    return recipes.dinfer_hierarchical(high=high, low=low, smoothing=weight).strategy


def _wrapped(flags: RecipeFlags, strategy: Strategy) -> Strategy:
    # Random order inside: remasking has to see the real probabilities, not the random scores.
    if flags.random_order:
        strategy = RandomOrder(strategy)
    return strategy if flags.remask is None else Remasking(strategy, flags.remask)


def _cache_policy(flags: RecipeFlags, name: str, base: _Base) -> CachePolicy:
    """The cache policy; a recipe's own numbers hold for its own policy only, not for one that replaces it."""
    numbers = base.numbers if name == base.cache else {}
    policy: CachePolicy = CACHES[name]()
    if name == "vicinity":
        published = _defaults(recipes.dinfer)
        policy = Vicinity(**{key: _or(getattr(flags, key), numbers.get(key, published[key]))
                             for key in ("before", "after")})
    if flags.refresh_every is not None:
        policy = Periodic(policy, flags.refresh_every)
    warmup = _or(flags.warmup, numbers.get("warmup", 0)) if name != "none" else 0
    return WithWarmup(policy, warmup) if warmup else policy


def _credit(flags: RecipeFlags, base: _Base) -> Credit:
    published = _defaults(recipes.dinfer_credit)
    return Credit(**{key: _or(getattr(flags, f"credit_{key}"), base.numbers.get(key, published[key]))
                     for key in ("alpha", "beta", "gamma")})


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
