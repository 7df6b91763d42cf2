"""Places where a command runs: one device, a mesh, or several processes, of which the first reads and prints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from djax.errors import ArgumentError, shown

if TYPE_CHECKING:
    from jax.sharding import Mesh

_PROCESS = re.compile(r"(?P<address>[^,\s]+:\d+),(?P<count>\d+),(?P<index>\d+)")
_FORMS = "auto (Cloud TPU, GKE, SLURM, Open MPI), or HOST:PORT,COUNT,INDEX: process 0's address, how many, this one's"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """The devices of a command, and whether this process is the one that reads and prints."""

    mesh: Mesh | None
    first: bool
    processes: int

    def read(self, read: Callable[[], Any], name: str) -> Any:
        """Give every process what `read` returns, or raises, in the first. `name` is for messages."""
        if self.mesh is None or self.processes == 1:
            return read()
        from djax.devices.distributed import share

        return share(lambda: read() if self.first else None, devices=self.mesh.devices.flat, name=name)


def launch(mesh: str | None, *, distributed: str | None) -> Launch:
    """Join the other processes, if there are any, and lay out the mesh. Without either, jax is not imported.

    Raises:
        ArgumentError: not a form that the flags take, or a mesh without devices of every process.
        ValueError: as `djax.sharding.parse_mesh` and `make_mesh`.
    """
    if distributed is not None:
        if mesh is None:
            raise ArgumentError("--mesh", "nothing with --distributed", allowed="a mesh of all processes' devices",
                                advice="give one, such as --mesh tp")
        _join(distributed)
    if mesh is None:
        return Launch(mesh=None, first=True, processes=1)
    import jax

    from djax.devices.distributed import processes
    from djax.devices.sharding import make_mesh, parse_mesh

    made = make_mesh(parse_mesh(mesh, devices=jax.device_count()))
    if len(processes(made.devices.flat)) < jax.process_count():
        raise ArgumentError(
            "--mesh", f"{shown(mesh)}, {made.size} of {jax.device_count()} devices in {jax.process_count()} processes",
            allowed="a mesh with devices of every process", advice="use all devices, or start fewer processes")
    return Launch(mesh=made, first=jax.process_index() == 0, processes=jax.process_count())


def _join(distributed: str) -> None:
    given = _PROCESS.fullmatch(distributed)
    if given is None and distributed != "auto":
        raise ArgumentError("--distributed", shown(distributed), allowed=_FORMS, advice="correct it")
    from djax.devices.distributed import initialize

    try:
        if given is None:
            initialize()
        else:
            initialize(given["address"], num_processes=int(given["count"]), process_id=int(given["index"]))
    except ValueError as error:
        raise ArgumentError(
            "--distributed", f"{shown(distributed)}, which JAX cannot use ({error.__cause__ or error})",
            allowed=_FORMS, advice="correct it") from error
