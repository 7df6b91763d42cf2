"""`djax inspect`: what a checkpoint holds. jax is imported inside, as in `djax.cli.app`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import typer

from djax.cli.flags import Debug, Source


def inspect_command(
    source: Source, *,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Show a checkpoint: configuration, parameter count, bytes, and what its keys map to."""
    import convert
    from djax import assets
    from djax.cli.outputs import print_summary

    described = convert.describe(assets.resolve(source))
    print_summary({
        "directory": str(described.directory), "format": described.format,
        "config": dataclasses.asdict(described.config),
        "parameter_count": sum(math.prod(parameter.shape) for parameter in described.parameters),
        "bytes": described.nbytes, "bytes_per_dtype": described.bytes_per_dtype, "files": described.files,
        # a converted checkpoint says nothing of axes: they are those of its configuration
        "parameters": [dataclasses.asdict(parameter) | ({"axes": None} if described.format == "djax" else {})
                       for parameter in described.parameters],
        "ignored": described.ignored}, as_json=json)
