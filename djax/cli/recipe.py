"""Flags to a `Recipe`: `--set` says everything (`djax.recipes.settings`), popular flags are short for some of it."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Collection
from typing import Any

from djax.cli.flags import RecipeFlags
from djax.errors import ArgumentError, one_line, shown
from djax.parts import registry
from djax.recipes import RECIPES, Recipe
from djax.recipes.settings import assign, make, names, plain, takes, unknown

_NUMBERS = {"threshold": "threshold", "steps": "steps_per_block"}
"""Numbers of strategies that have a flag, and the parameter of a recipe that sets each."""


def build_recipe(flags: RecipeFlags) -> Recipe:
    """The recipe that the flags ask for: its parameters first, then the popular flags, then `--set` in order.

    Raises:
        ArgumentError: an unknown name, a number out of range, or a flag that the chosen parts have no use for.
    """
    function = _function(flags.recipe)
    own, axes = takes(function), takes(Recipe)
    parameters: dict[str, str] = {}
    assignments, flag_of = [], {}
    for flag, path, text in [*_short(flags, own), *map(_split, flags.set or [])]:
        first = path.partition(".")[0]
        if path in own and (path not in axes or axes[path].struct(text) is None):
            parameters[path], flag_of[f"--set {path}"] = text, flag
        elif first in axes:
            assignments.append((flag, path, text))
        else:
            raise unknown(f"--set {path}".strip(), first, {**own, **axes})
    try:
        made = _made(flags.recipe, function, parameters)
        recipe = _assigned(made, assignments)
    except ArgumentError as error:
        raise error.renamed(flag_of.get(error.name) or error.name) from None
    for name in parameters if assignments else ():  # else nothing is replaced, and no user's function runs again
        if _is_replaced(name, flags.recipe, function, parameters, made, recipe, assignments):
            raise ArgumentError(flag_of[f"--set {name}"] or f"--set {name}",
                                f"{parameters[name]}, a parameter of a part that other settings replace",
                                allowed="parameters of what stays",
                                advice=f"set it in the new part, as 'djax parts' says, or drop {name}")
    return recipe


def _made(name: str, function: Any, parameters: dict[str, str]) -> Recipe:
    """Make the recipe; whatever a user's own function raises is told under its name."""
    try:
        recipe = make(function, parameters, name="--set ") if callable(function) else function
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError("--recipe", f"{shown(name)}, which fails ({type(error).__name__}: {one_line(str(error))})",
                            allowed="a function that returns djax.Parts", advice="correct it") from error
    if not isinstance(recipe, Recipe):
        raise ArgumentError("--recipe", f"{shown(name)}, which gives {shown(recipe)}",
                            allowed="a function that returns djax.Parts", advice="return one")
    return recipe


def _assigned(recipe: Recipe, assignments: list[tuple[str, str, str]]) -> Recipe:
    """The recipe after flags and settings of parts, each by flag, path and text."""
    for flag, path, text in assignments:
        number = path.removeprefix("strategy.")
        if flag and number in _NUMBERS and number not in names(recipe.strategy):
            raise ArgumentError(flag, f"{text} with strategy {registry.name_of(recipe.strategy)}",
                                allowed=f"with a strategy that has {number}, see 'djax parts'",
                                advice=f"add --strategy or drop {flag}")
        try:
            recipe = assign(recipe, path, text)
        except ArgumentError as error:
            named = error.name == f"--set {path}" or flag == "--smoothing"
            raise error.renamed(flag if flag and named else error.name) from None
    return recipe


def _is_replaced(
    name: str, of: str, function: Any, parameters: dict[str, str], made: Recipe, recipe: Recipe,
    assignments: list[tuple[str, str, str]],
) -> bool:
    """Whether a parameter makes another recipe, of which other settings then leave nothing.

    `made` is the recipe named `of` with all parameters, and `recipe` what the settings make of it.
    """
    rest = {each: text for each, text in parameters.items() if each != name}
    try:
        without = _made(of, function, rest)
        return without != made and _assigned(without, assignments) == recipe
    except ArgumentError:  # the parameter is needed
        return False


def _short(flags: RecipeFlags, own: Collection[str]) -> list[tuple[str, str, str]]:
    """The settings that popular flags are short for: flag, path and text."""
    numbers = {name: value for name in _NUMBERS if (value := getattr(flags, name)) is not None}
    found = []
    if flags.strategy is not None:
        text = ",".join(f"{name}={value}" for name, value in numbers.items())
        colon = "" if not text else "," if ":" in flags.strategy else ":"
        found.append(("--strategy", "strategy", flags.strategy + colon + text))
    else:
        found += [(f"--{name}", _NUMBERS[name] if _NUMBERS[name] in own else f"strategy.{name}", str(value))
                  for name, value in numbers.items()]
    if flags.cache is not None:
        found.append(("--cache", "cache_policy", flags.cache))
    if flags.smoothing is not None:
        weight = str(flags.smoothing) if "smoothing" in own else f"soft_tokens:weight={flags.smoothing}"
        found.append(("--smoothing", "smoothing", weight if flags.smoothing else "none"))
    return found


def _split(setting: str) -> tuple[str, str, str]:
    """Path and text of `--set PATH=VALUE`, behind an empty flag: errors name the path."""
    path, equals, text = setting.partition("=")
    if not equals or not all(map(str.strip, path.split("."))):
        raise ArgumentError("--set", shown(setting), allowed="PATH=VALUE, such as strategy.threshold=0.8",
                            advice="see 'djax parts'")
    return "", path.strip().replace("-", "_"), text


def _function(name: str) -> Any:
    """A recipe's function by name, or what module:function names; looked for in the working directory too."""
    if ":" not in name:
        if plain(name) not in RECIPES:
            raise unknown("--recipe", name, RECIPES)
        return RECIPES[plain(name)]
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return operator.attrgetter(function)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ArgumentError("--recipe", f"{shown(name)} ({one_line(str(error)) or type(error).__name__})",
                            allowed="module:function, of a module that Python finds from here",
                            advice="check both names") from error
