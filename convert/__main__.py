"""`python -m convert SRC DST [--dtype bfloat16|float32|float16] [--force]`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import rich.console
import rich.progress
import typer

from convert.run import convert


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(
    src: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or converted checkpoint.")],
    dst: Annotated[str, typer.Argument(help="Directory to write; it appears complete or not at all.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a converted checkpoint that is there.")] = False,
) -> None:
    """Convert a checkpoint to an Orbax directory with a manifest of digests."""
    # A terminated run cleans up like an interrupted one; a killed run's remains go with the next.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        console = rich.console.Console(stderr=True)
        with rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        ) as bars:
            task = bars.add_task("converting", total=None)
            written = convert(
                src, dst, dtype=dtype, overwrite=force,
                progress=lambda done, total: bars.update(task, completed=done, total=total))
    except ValueError as error:  # CheckpointError is one
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted; the destination is unchanged", file=sys.stderr)
        raise typer.Exit(130) from None
    print(written)


if __name__ == "__main__":
    typer.run(main)
