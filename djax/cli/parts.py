"""`djax parts`: what `--recipe` and `--set` can name, read from the recipes and parts themselves."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_args

import typer


def parts_command(
    *, debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """List the recipes and the parts of every axis, with what --set can give them."""
    from djax.cli.outputs import write_line
    from djax.parts import registry
    from djax.parts.schedules import Schedule
    from djax.recipes import RECIPES
    from djax.recipes.settings import takes

    groups: dict[str, dict[str, Any]] = {"recipe": {**RECIPES}}
    groups |= {axis: registry.parts(axis) for axis in registry.AXES}
    groups["schedule"] = {registry.snake_case(kind.__name__): kind for kind in get_args(Schedule)}
    for title, group in groups.items():
        write_line(title)
        for name, target in group.items():
            write_line(f"  {name}: {(inspect.getdoc(target) or '').partition(chr(10))[0]}")
            for parameter, taken in takes(target).items():
                allowed = ", ".join(taken.allowed) if taken.axis is None else f"a {taken.axis}"
                default = "the one that is there" if taken.axis == title else taken.default
                write_line(f"      {parameter}: {allowed}" + (
                    "" if default is inspect.Parameter.empty else f" ({default})"))
