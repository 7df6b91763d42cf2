"""Flags to a `Recipe`: `--set` says everything (`djax.recipes.settings`), popular flags are short for some of it."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import sys
from collections.abc import Collection
from typing import Any

from djax import recipes
from djax.cli.flags import RecipeFlags
from djax.errors import ArgumentError, shown
from djax.parts import registry
from djax.recipes import RECIPES, Recipe
from djax.recipes.settings import assign, innermost, make, takes, unknown

_FLAGS = {"threshold": "--threshold", "steps_per_block": "--steps", "smoothing": "--smoothing"}
"""Parameters of recipes that have a flag."""


def build_recipe(flags: RecipeFlags) -> Recipe:
    """The recipe that the flags ask for: its parameters first, then the popular flags, then `--set` in order.

    Raises:
        ArgumentError: an unknown name, a number out of range, or a flag that the chosen parts have no use for.
    """
    function = _function(flags.recipe)
    parameters, assignments = _settings(flags.set or [], function)
    numbers = dict(zip(_FLAGS, (flags.threshold, flags.steps, flags.smoothing), strict=True))
    given = {name: str(value) for name, value in numbers.items() if value is not None}
    if flags.smoothing == 0:
        given["smoothing"] = "none"
    given |= {name: text for name, text in parameters.items() if name in _FLAGS}
    own = {name: text for name, text in given.items() if name in takes(function)} | parameters
    try:
        recipe = make(function, own, name="--set ") if callable(function) else function
        if not isinstance(recipe, Recipe):
            raise ArgumentError("--recipe", f"{shown(flags.recipe)}, which gives a {type(recipe).__name__}",
                                allowed="a function that returns djax.Parts", advice="return one")
        recipe = _with_others(_with_strategy(recipe, function, flags, given), function, flags, given)
    except ArgumentError as error:
        name = error.name.removeprefix("--set ")
        raise error.renamed(_FLAGS[name]) if name in given.keys() - parameters.keys() else error from None
    for path, text in assignments:
        recipe = assign(recipe, path, text)
    return recipe


def _function(name: str) -> Any:
    """A recipe's function by name, or what module:function names; looked for in the working directory too."""
    if ":" not in name:
        return RECIPES[_choice("--recipe", name, RECIPES)]
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return operator.attrgetter(function)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError("--recipe", f"{shown(name)} ({error})",
                            allowed="module:function, of a module that Python finds from here",
                            advice="check both names") from error


def _settings(settings: list[str], function: Any) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What `--set` gives: parameters of the recipe's function, and paths with their values.

    Where a parameter and an axis have one name, a value that names a part is for the axis.
    """
    own, axes = takes(function), takes(Recipe)
    parameters: dict[str, str] = {}
    assignments = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip().replace("-", "_")
        first = path.partition(".")[0]
        if not equals:
            raise ArgumentError("--set", shown(setting), allowed="PATH=VALUE, such as strategy.threshold=0.8",
                                advice="see 'djax parts'")
        if path in own and (path not in axes or axes[path].struct(text) is None):
            parameters[path] = text
        elif first in axes:
            assignments.append((path, text))
        else:
            raise unknown(f"--set {path}".strip(), first, {**own, **axes})
    return parameters, assignments


def _with_strategy(recipe: Recipe, function: Any, flags: RecipeFlags, given: dict[str, str]) -> Recipe:
    """The strategy that flags name or give numbers for, as a published recipe has it with these numbers, if one does.

    So a threshold falls under smoothing whichever recipe it came from.
    """
    present, parts = registry.name_of(recipe.strategy), registry.parts("strategy")
    wanted = present if flags.strategy is None else _choice("--strategy", flags.strategy, parts)
    if any(taken.axis == "strategy" for taken in takes(parts.get(wanted)).values()) and wanted != present:
        numbered = _with_strategy(recipe, function, dataclasses.replace(flags, strategy=None), given)
        return assign(numbered, "strategy", wanted)  # it wraps the strategy with these numbers
    published = [recipes.dinfer, *RECIPES.values()] if function in RECIPES.values() else []
    having = {each: registry.name_of(each().strategy) for each in published}
    sources = [function] * (wanted == present) + [each for each, name in having.items() if name == wanted]
    source = max(sources, key=lambda each: len(given.keys() & takes(each).keys()), default=None)
    for number, value in given.items():
        if number not in takes(source) and not (published and number == "smoothing"):
            owner = next((name for each, name in having.items() if number in takes(each)), None)
            raise ArgumentError(
                _FLAGS[number], f"{value} with strategy {wanted}",
                allowed=f"with strategy {owner}" if owner else "a parameter of the recipe's function",
                advice=f"add --strategy {owner} or drop {_FLAGS[number]}" if owner else "use --set strategy.NAME=VALUE")
    if source is function:
        return recipe
    if source is None:
        return assign(recipe, "strategy", wanted)
    defaults = {name: str(taken.default) for name, taken in takes(function).items() if name in _FLAGS}
    texts = {"smoothing": "none"} | defaults | given
    texts = {name: text for name, text in texts.items() if name in takes(source)}
    return dataclasses.replace(recipe, strategy=make(source, texts, name="--set ").strategy)


def _with_others(recipe: Recipe, function: Any, flags: RecipeFlags, given: dict[str, str]) -> Recipe:
    """What the flags for smoothing, cache and credit say, where the recipe does not have it already."""
    if "smoothing" in given and "smoothing" not in takes(function):
        smoothing = make(recipes.dinfer, {"smoothing": given["smoothing"]}, name="--set ").smoothing
        recipe = dataclasses.replace(recipe, smoothing=smoothing)
    if flags.cache is not None:
        cache = _choice("--cache", flags.cache, ["none", *registry.parts("cache_policy")])
        if cache != registry.name_of(innermost(recipe.cache_policy)):
            recipe = assign(recipe, "cache_policy", cache)
    if flags.credit not in (None, registry.name_of(recipe.transform) == "credit"):
        recipe = assign(recipe, "transform", "credit" if flags.credit else "none")
    return recipe


def _choice(flag: str, value: str, allowed: Collection[str]) -> str:
    plain = value.strip().lower().replace("-", "_")
    if plain not in allowed:
        raise unknown(flag, value, allowed)
    return plain
