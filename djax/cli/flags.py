"""The flags that commands share, as dataclasses: declared once, spliced into each command's signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from djax.cli.cache import COMPILE_CACHE_HELP
from djax.cli.errors import refused

_MODEL, _RECIPE, _SAMPLING, _LENGTH = "Model", "Recipe", "Sampling", "Length"
MESH_METAVAR, DISTRIBUTED_METAVAR = "AXIS=N,...|PRESET", "auto|HOST:PORT,COUNT,INDEX"
MESH_HELP = "Devices to split the model over: tensor=4,expert=2, or tp, ep, tp_ep, dp_tp, ... for all that are there."
DISTRIBUTED_HELP = (
    "This is one of several processes that run the same command: auto finds the others on Cloud TPU, GKE, SLURM and "
    "Open MPI. The first one reads and prints.")
Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory or hub id.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _option(name: str, *, panel: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, metavar=metavar)


def integer(name: str, *, help: str, panel: str | None = None) -> Any:
    """A flag that takes an integer, and says so in one line if it got something else."""
    return typer.Option(name, help=help, rich_help_panel=panel, metavar="INTEGER", parser=_parser(name, int))


def number(name: str, *, help: str, panel: str | None = None) -> Any:
    """A flag that takes a number, and says so in one line if it got something else."""
    return typer.Option(name, help=help, rich_help_panel=panel, metavar="NUMBER", parser=_parser(name, float))


def _parser(name: str, kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser of our own: typer's words for a value that is no number differ from version to version."""

    def parse(value: Any) -> Any:
        try:
            return kind(value)
        except (ValueError, TypeError) as error:
            raise refused(name, value, "an integer" if kind is int else "a number") from error

    return parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model, and how to run it."""

    model: Annotated[str | None, _option(
        "--model", panel=_MODEL, metavar="PATH|HUB_ID",
        help="Checkpoint; if not given the bundled one, djax:base (djax:compressed is after compression).")] = None
    dtype: Annotated[str | None, _option(
        "--dtype", panel=_MODEL, help="Of weights and activations: bfloat16, float16 or float32.")] = "bfloat16"
    mask_id: Annotated[int | None, integer(
        "--mask-id", panel=_MODEL, help="Token id of the mask, if the checkpoint does not say.")] = None
    eos_id: Annotated[int | None, integer(
        "--eos-id", panel=_MODEL, help="Token id that ends a sequence, instead of the checkpoint's.")] = None
    mesh: Annotated[str | None, _option("--mesh", panel=_MODEL, metavar=MESH_METAVAR, help=MESH_HELP)] = None
    distributed: Annotated[str | None, _option(
        "--distributed", panel=_MODEL, metavar=DISTRIBUTED_METAVAR, help=DISTRIBUTED_HELP)] = None
    no_compile_cache: Annotated[bool, _option("--no-compile-cache", panel=_MODEL, help=COMPILE_CACHE_HELP)] = False
    debug: Annotated[bool, _option("--debug", panel=_MODEL, help="Show tracebacks.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """A recipe, and what replaces its own parts and numbers. None means: as the recipe has it."""

    recipe: Annotated[str, _option(
        "--recipe", panel=_RECIPE, metavar="NAME|MODULE:FUNCTION",
        help="A recipe that 'djax parts' lists, or a function of your own.")] = "dinfer"
    set: Annotated[list[str] | None, _option(
        "--set", panel=_RECIPE, metavar="PATH=VALUE",
        help="before=8 for a parameter of the recipe, strategy=quota:steps=4 for another part, strategy.threshold=0.8 "
        "for one of its numbers; may be repeated. 'djax parts' lists all.")] = None
    strategy: Annotated[str | None, _option(
        "--strategy", panel=_RECIPE, help="Short for --set strategy=NAME, with the next two's numbers.")] = None
    threshold: Annotated[float | None, number(
        "--threshold", panel=_RECIPE, help="Commit what is at least this probable.")] = None
    steps: Annotated[int | None, integer(
        "--steps", panel=_RECIPE, help="Steps per block, of recipe llada or strategy quota.")] = None
    cache: Annotated[str | None, _option("--cache", panel=_RECIPE, help="Short for --set cache_policy=NAME.")] = None
    smoothing: Annotated[float | None, number(
        "--smoothing", panel=_RECIPE, help="Largest weight of the soft tokens; 0 for hard tokens.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Settings of the draw."""

    block_length: Annotated[int, integer("--block-length", panel=_SAMPLING, help="Tokens per block.")] = 64
    temperature: Annotated[float, number("--temperature", panel=_SAMPLING, help="0 is greedy.")] = 0.0
    top_k: Annotated[int | None, integer("--top-k", panel=_SAMPLING, help="Keep the k most probable.")] = None
    top_p: Annotated[float | None, number("--top-p", panel=_SAMPLING, help="Nucleus mass.")] = None
    min_p: Annotated[float | None, number(
        "--min-p", panel=_SAMPLING, help="Drop tokens below this share of the best one's probability.")] = None
    guidance: Annotated[float | None, number(
        "--guidance", panel=_SAMPLING, help="Classifier-free guidance scale; two forwards a step.")] = None
    seed: Annotated[int, integer("--seed", panel=_SAMPLING, help="Seed of the random numbers.")] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthFlags:
    """Number of generated tokens, and where generation stops."""

    max_new_tokens: Annotated[int, integer(
        "--max-new-tokens", panel=_LENGTH, help="Positions to generate for each prompt.")] = 256
    no_stop: Annotated[bool, _option(
        "--no-stop", panel=_LENGTH, help="Decode on after the end-of-sequence token.")] = False
    align: Annotated[bool, _option(
        "--align", panel=_LENGTH, help="Start the blocks on multiples of the block length.")] = False


def with_flags(**groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of dataclasses: parameter `name` gets an instance of `groups[name]`.

    typer reads a command's signature, so each group's parameter is replaced there by the group's fields.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        parameters = [value for name, value in own.parameters.items() if name not in groups]
        for group in groups.values():
            hints = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
                                  annotation=hints[field.name]) for field in dataclasses.fields(group)]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            built = {
                name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
                for name, group in groups.items()}
            function(**values, **built)

        keyword_only = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in parameters]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        command.__annotations__ = {value.name: value.annotation for value in keyword_only}
        del command.__wrapped__
        return command

    return decorate
