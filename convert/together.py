"""A directory that several processes write together: it appears complete or not at all, for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

from convert.atomic import as_destination_error, atomic_directory
from djax.devices.distributed import PeerError, processes, share


@contextlib.contextmanager
def directory_together(
    destination: Path, devices: Iterable[jax.Device], *, overwrite: bool, marker: str
) -> Iterator[Path]:
    """`atomic_directory` for the processes of `devices`: the first of them makes, completes and renames it.

    The block runs in all of them, on a file system that all see. If it fails in one, all raise and the destination is
    what it was; after the block it is complete.

    Raises:
        DestinationError: as `atomic_directory`, in every process.
    """
    everyone = list(devices)
    first = jax.process_index() == processes(everyone)[0]

    def begin() -> str | None:
        made = atomic_directory(destination, overwrite=overwrite, marker=marker)
        return str(stack.enter_context(made)) if first else None

    def report() -> bool:
        if failure is not None:
            raise failure
        return True

    def complete() -> bool:
        stack.close()
        return True

    with contextlib.ExitStack() as stack:
        try:
            temporary = Path(share(begin, devices=everyone, name="temporary directory"))
            failure: Exception | None = None
            try:
                yield temporary
            except Exception as error:  # the others must hear of it before this process leaves
                failure = error
            share(report, devices=everyone, name="outcome")
            share(complete, devices=everyone, name="outcome")
        except PeerError as error:
            raise as_destination_error(error, destination) from error
