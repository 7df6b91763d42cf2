"""`djax plan`: a model and a machine to bytes, collectives and seconds. jax is imported inside, as in `djax.cli`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from djax.cli.flags import RecipeFlags, integer, number, with_flags
from djax.errors import ArgumentError, shown

if TYPE_CHECKING:
    from djax.models.config import ModelConfig
    from djax.plan.planner import Plan, StepPlan


@with_flags(flags=RecipeFlags)
def plan_command(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="llada-moe, llada2-mini, llada2-flash, a checkpoint's directory, or a hub id in the "
        "cache.")],
    *,
    topology: Annotated[str, typer.Option(
        "--topology", metavar="KIND:SIZE", help="h200:8, v5e:2x4, v6e:2x4, v5p:2x2x1, ...; none of it need be here.")],
    mesh: Annotated[str | None, typer.Option(
        "--mesh", metavar="AXIS=N,...|PRESET", help="tensor=4,expert=2, or tp, ep, tp_ep, dp_tp, ...; the fastest "
        "preset that fits if not given.")] = None,
    batch: Annotated[int, integer("--batch", help="Rows.")] = 1,
    prompt_length: Annotated[int, integer("--prompt-length", help="Tokens of a prompt.")] = 176,
    max_new_tokens: Annotated[int, integer("--max-new-tokens", help="Positions to generate.")] = 1024,
    block_length: Annotated[int | None, integer(
        "--block-length", help="Tokens per block; the model's own, or 64.")] = None,
    tokens_per_forward: Annotated[float, number(
        "--tokens-per-forward", help="Tokens that a forward is taken to give.")] = 3.87,
    no_compile: Annotated[bool, typer.Option(
        "--no-compile", help="Estimate only: needs no compiler, and reads nothing from the program.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    flags: RecipeFlags,
) -> None:
    """Compile a generation for hardware that need not be here; show its bytes, collectives and seconds."""
    from djax.cli.recipe import build_recipe
    from djax.plan.planner import plan
    from djax.plan.topology import missing_compiler

    config = find_config(model)
    reason = None if no_compile else missing_compiler(topology)
    if reason is not None:
        raise ArgumentError("--topology", f"{topology} ({reason})", allowed="hardware whose compiler is installed",
                            advice="install it, or add --no-compile for the estimate alone")
    show(plan(
        config, topology=topology, mesh=mesh, batch=batch, prompt_length=prompt_length, max_new_tokens=max_new_tokens,
        block_length=block_length, recipe=None if flags == RecipeFlags() else build_recipe(flags),
        tokens_per_forward=tokens_per_forward, name=model, compiled=not no_compile), as_json=as_json)


def find_config(model: str) -> ModelConfig:
    """The configuration of a published size, of a directory, or of a hub id in the local cache. Downloads nothing.

    Raises:
        ArgumentError: it is none of these.
    """
    from convert import read_config
    from djax import assets
    from djax.models.families import published

    sizes = published()
    if model in sizes:
        return sizes[model]
    found = Path(assets.resolve(model)).expanduser()
    if found.is_dir():
        return read_config(found)
    if model.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        name, _, revision = model.partition("@")
        cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
        if isinstance(cached, str):
            return read_config(Path(cached).parent)
    raise ArgumentError(
        "MODEL", shown(model), allowed=f"{', '.join(sizes)}, a checkpoint's directory or a hub id that is in the "
        "cache", advice="give one of them (its config.json is enough)")


def show(planned: Plan, *, as_json: bool) -> None:
    """Write a plan as text, or as one JSON object."""
    from djax.cli.outputs import write_line

    if as_json:
        write_line(json.dumps(planned.to_json()))
        return
    for line in describe(planned):
        write_line(line)


def describe(planned: Plan) -> list[str]:
    """A plan in lines of text."""
    shapes, mesh = planned.shapes, ",".join(f"{name}={size}" for name, size in planned.mesh.items())
    split = ", ".join(f"{name} {parts}" for name, parts in planned.split.items() if parts > 1) or "nothing"
    lines = [
        f"{planned.model} on {planned.topology}, mesh {mesh}: split {split}",
        f"{shapes.batch} rows, prompt {shapes.prompt_length}, new tokens {shapes.max_new_tokens}, block "
        f"{shapes.block_length}: a canvas of {planned.canvas_length} positions",
        "", f"memory of a device, GB ({planned.device_memory / 1e9:.2f} allowed)"
        + ("" if planned.compile_seconds is None else f", compiled in {planned.compile_seconds:.0f} s"),
        _row("", "estimate", *(["compiler"] if planned.compiled else []))]
    memories = [planned.estimate, *([planned.compiled] if planned.compiled else [])]
    lines += [
        _row(name, *(f"{getattr(memory, name) / 1e9:.3f}" for memory in memories))
        for name in ("parameters", "cache", "other", "temporaries", "total")]
    names = list(planned.steps)
    lines += ["", "a forward, on each device", _row("", *names)]
    lines += [_row(title, *(cell(step) for step in planned.steps.values())) for title, cell in _STEP_ROWS]
    for name, step in planned.steps.items():
        lines += _program_lines(name, step)
    seconds = planned.shapes.batch * planned.shapes.max_new_tokens / planned.tokens_per_second
    return [
        *lines, "",
        f"{planned.forwards} forwards, {planned.refreshes} of them full, at {planned.tokens_per_forward:g} tokens a "
        f"forward: {seconds:.3f} s, {planned.tokens_per_second:.0f} tokens/s at the machine's peaks"]


_STEP_ROWS: tuple[tuple[str, Any], ...] = (
    ("positions", lambda step: f"{step.positions}"),
    ("GFLOP", lambda step: f"{step.flops / 1e9:.1f}"),
    ("GB moved", lambda step: f"{step.bytes / 1e9:.3f}"),
    ("ms compute", lambda step: f"{1e3 * step.compute_seconds:.3f}"),
    ("ms collectives", lambda step: f"{1e3 * step.exchange_seconds:.3f}"),
    ("ms", lambda step: f"{1e3 * step.seconds:.3f}"))


def _row(title: str, *cells: str) -> str:
    return f"  {title:<16}" + "".join(f"{cell:>12}" for cell in cells)


def _program_lines(name: str, step: StepPlan) -> list[str]:
    """Contents of the compiled step."""
    if step.collectives is None:
        return []
    found = [f"  {kind:<22}{entry['count']:>4}, {entry['bytes'] / 1e6:.3f} MB, the largest "
             f"{entry['largest'] / 1e6:.3f} MB" for kind, entry in step.collectives.items()]
    layer = ", ".join(f"{entry['count']} {kind}" for kind, entry in (step.layer_collectives or {}).items())
    kernels = ", ".join(f"{kernel} x {count}" for kernel, count in (step.kernels or {}).items())
    return ["", f"collectives of a {name} step{f' (a layer: {layer})' if layer else ''}", *(found or ["  none"]),
            f"Pallas kernels of a {name} step: {kernels or 'none'}"]
