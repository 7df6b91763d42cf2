"""Several processes that run one program: how they start, and values that all of them need alike.

Every process of a mesh makes the same calls in the same order. What one of them has and the others need, such as
prompts, goes through `share`, which also finds out whether they were asked for the same thing: a difference is an error
on each of them, where the program itself would wait forever or mix two generations.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from djax.errors import ArgumentError, check_integer, first_line

_LONGEST_MESSAGE = 2000
_LONGEST_TELLING = 16 * 1024
"""Room for a message whose characters are all escaped and for fifty digests with their names."""
_SMALLEST_PAYLOAD = 1024
_WARNING_SECONDS = 0.5
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PeerError(ValueError):
    """An error of another process."""


class PeerLost(RuntimeError):
    """Another process is gone, in the middle of something that needs it."""


def initialize(
    coordinator_address: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    cluster_detection_method: str | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 60,
    shutdown_timeout: int = 60,
) -> None:
    """`jax.distributed.initialize` with bounds on every wait: call it in each process, before anything uses a device.

    On Cloud TPU, GKE, SLURM and Open MPI nothing need be given. From then on `jax.devices()` are those of all
    processes, and a process that dies ends the others within `heartbeat_timeout`: JAX writes which one it was and
    aborts them (exit code 134), because a collective that waits for it cannot be interrupted.

    Args:
        coordinator_address: host and port of process 0, reachable from all.
        num_processes: how many there are.
        process_id: this one's number, from 0.
        local_device_ids: devices of this host that are this process's. None is all of them, but on SLURM and Open MPI
            one, the one of the task's number on its node.
        cluster_detection_method: one of JAX's, such as "slurm", "k8s" or "mpi4py"; None tries all but the last.
        initialization_timeout: seconds that the processes wait for each other at the start; JAX aborts those that
            waited in vain.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
        shutdown_timeout: seconds that a process which ends waits for the others to end too.

    Raises:
        ValueError: the arguments are incomplete and no cluster was detected.
        RuntimeError: devices were used before, or it was called before.
    """
    seconds = {"initialization_timeout": initialization_timeout, "heartbeat_timeout": heartbeat_timeout,
               "shutdown_timeout": shutdown_timeout}
    for name, value in seconds.items():
        check_integer(name, value, 1, advice="give whole seconds")
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    # JAX aborts with words about tasks that died; the likely reasons are others
    warning = threading.Timer(initialization_timeout - _WARNING_SECONDS, lambda: print(
        f"djax: not all processes came within {initialization_timeout} seconds (initialization_timeout); each must be "
        "started, with the same coordinator_address and num_processes and a process_id of its own, and reach that "
        "address", file=sys.stderr, flush=True))
    warning.daemon = True
    warning.start()
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, local_device_ids=local_device_ids,
            cluster_detection_method=cluster_detection_method, initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout, shutdown_timeout_seconds=shutdown_timeout)
    except (ValueError, TypeError) as error:
        got = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ArgumentError(
            "coordinator_address", f"{got} ({str(error).rstrip('.')})", allowed="all three, process_id from 0 and "
            "below num_processes, or none of them in a cluster that JAX detects (Cloud TPU, GKE, SLURM, Open MPI)",
            advice="give them") from error
    finally:
        warning.cancel()


def processes(devices: Iterable[jax.Device]) -> tuple[int, ...]:
    """Numbers of the processes that these devices belong to, rising."""
    return tuple(sorted({device.process_index for device in devices}))


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and len(processes(mesh.devices.flat)) > 1


@contextmanager
def with_peers(mesh: Mesh | None) -> Iterator[None]:
    """Around a wait for what the mesh's devices compute together.

    Raises:
        PeerLost: a collective between processes failed. (Where one waits instead, `initialize` bounds how long.)
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if mesh is None or not spans_processes(mesh) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise PeerLost(
            f"processes: got a failed collective among {_listed(processes(mesh.devices.flat))} "
            f"({first_line(error)}); most likely one of them ended: its own output says why; start all "
            "of them again") from error


def share(
    make: Callable[[], Any], *, devices: Iterable[jax.Device], name: str, same: Mapping[str, Any] = _NOTHING
) -> Any:
    """Share what `make` returns on one of the devices' processes, or alike on each: a JSON value, then on all.

    All processes call it, and wait for those that are late: a process that dies in the meantime ends them, see
    `initialize`. Among devices of one process it is `make()`.

    Args:
        make: called once; returns None where another process has the value. What it raises is raised on every process.
        devices: of the processes that take part: of all that there are, or of this one alone.
        name: of the value, for messages.
        same: values by name that have to be alike on all processes: pytrees of numbers, arrays and texts.

    Raises:
        PeerError: (a ValueError) `make` failed in another process; says in which and why.
        PeerLost: another process ended in the meantime.
        ValueError: no process has the value, or some have it and others not; two have different ones, or different
            values in `same`; the devices are not those of all processes. All processes raise it, and name what differs.
    """
    peers = processes(devices)
    if jax.process_index() not in peers:
        raise ArgumentError(
            "mesh", f"devices of processes {_listed(peers)}", allowed="some of every process that calls: this is "
            f"process {jax.process_index()} and has none of them", advice="use such a mesh")
    if len(peers) == 1:
        return make()
    if len(peers) < jax.process_count():
        raise ArgumentError(
            "mesh", f"devices of processes {_listed(peers)} of {jax.process_count()}", allowed="those of one process, "
            "or some of every process", advice="use such a mesh, or start fewer processes")
    payload, failure = _made(make)
    with with_peers(Mesh(np.array(jax.devices()), ("devices",))):
        told = _tell({
            "length": len(payload), "digest": hashlib.sha256(payload).hexdigest(), "failure": _message(failure),
            "same": {key: digest(value).tolist() for key, value in same.items()}})
        given = [process for process, one in enumerate(told) if one["length"]]
        if len(given) == 1:
            payload = _spread(payload, length=told[given[0]]["length"], source=given[0])
    if failure is not None:
        raise failure
    for process, one in enumerate(told):
        if one["failure"] is not None:
            raise PeerError(f"process {process} of {len(told)}: {one['failure']}")
    for key in dict.fromkeys(key for one in told for key in one["same"]):
        _check_alike([one["same"].get(key) for one in told], key, "values", allowed="one for all",
                     advice="give the same on every process")
    if len(given) == len(told):
        _check_alike([one["digest"] for one in told], name, "ones",
                     allowed="the same on all, or None on all but one")
    elif len(given) != 1:
        where = f"processes {_listed(given)}" if given else "no process"
        raise ArgumentError(
            name, f"them on {where} of {_listed(peers)}", allowed="all or one",
            advice="give them on every process, or on one and None on the others")
    return json.loads(payload)


def _made(make: Callable[[], Any]) -> tuple[bytes, Exception | None]:
    """The value as JSON, nothing if there is none; and what it failed with."""
    try:
        value = make()
        return b"" if value is None else json.dumps(value, default=lambda array: array.tolist()).encode(), None
    except Exception as error:  # whatever it is, the others wait for this process
        return b"", error


def _message(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    text = (str(failure) or type(failure).__name__).encode(errors="replace")
    return text[:_LONGEST_MESSAGE].decode(errors="ignore")


def _tell(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Exchange what every process tells the others about its value, in their order."""
    room = np.zeros(_LONGEST_TELLING, np.uint8)
    text = json.dumps(own, ensure_ascii=False).encode()
    room[: len(text)] = np.frombuffer(text, np.uint8)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in multihost_utils.process_allgather(room)]


def _spread(payload: bytes, *, length: int, source: int) -> bytes:
    """The `length` bytes of the process `source`, on every process."""
    # powers of two, so that few lengths are compiled
    room = np.zeros(max(_SMALLEST_PAYLOAD, 1 << max(length - 1, 0).bit_length()), np.uint8)
    is_source = source == jax.process_index()
    if is_source:
        room[:length] = np.frombuffer(payload, np.uint8)
    return multihost_utils.broadcast_one_to_all(room, is_source=is_source).tobytes()[:length]


def _check_alike(values: Sequence[Any], name: str, what: str, *, allowed: str, advice: str = "") -> None:
    """Raise ArgumentError unless all processes have what process 0 has."""
    for process, value in enumerate(values):
        if value != values[0]:
            raise ArgumentError(name, f"different {what} on processes 0 and {process}", allowed=allowed, advice=advice)


def digest(value: Any) -> Int[np.ndarray, "2"]:
    """64 bits of a pytree's structure, static fields and leaves; the same in every process for the same value."""
    leaves, structure = jax.tree.flatten(value)
    total = hashlib.sha256(_ADDRESS.sub("", str(structure)).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            total.update(f"{leaf.dtype}{leaf.shape}".encode())
            continue
        array = np.asarray(leaf)
        content = _ADDRESS.sub("", repr(leaf)).encode() if array.dtype.hasobject else array.tobytes()
        total.update(f"{array.dtype}{array.shape}".encode() + content)
    return np.frombuffer(total.digest()[:8], np.int32)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
