"""A directory that appears complete or not at all, whenever the process is killed.

Everything is written into a hidden sibling of the destination, flushed to disk, and renamed. To replace an
existing directory the two names are exchanged in one system call (Linux `renameat2`), so that at every
instant the destination is the old one or the new one. A hidden sibling that a killed process left behind
is recognised by its lock, which the kernel releases with the process, and removed by the next run.

Orbax makes new directories appear in the same way, but it deletes an old one before it writes its successor, and two
runs that write to one name delete each other's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from convert.errors import DestinationError, OutOfSpaceError
from djax.errors import first_line

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LONGEST_REMOVAL_SECONDS = 10.0
_SETTLING_SECONDS = 0.25
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = ("no space left", "resource_exhausted", "quota exceeded", "file too large")


def exchange(first: Path, second: Path) -> None:
    """Swap two names of one file system atomically. Raises OSError where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        raise OSError(errno.ENOSYS, "this system has no renameat2")
    result = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first))


def as_destination_error(error: BaseException, destination: Path) -> DestinationError:
    """The typed error for a failed write: OutOfSpaceError if anything in the chain says that the disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in _NO_SPACE
        if full or any(text in str(cause).lower() for text in _NO_SPACE_TEXTS):
            return OutOfSpaceError("the disk is full (or a file size limit was reached); nothing was written",
                                   file=destination)
        cause = cause.__cause__ or cause.__context__
    return DestinationError(f"cannot be written: {first_line(error)}", file=destination)


def require_space(destination: Path, nbytes: int) -> None:
    """Raise OutOfSpaceError unless the destination's file system has `nbytes` free."""
    free = shutil.disk_usage(destination.parent).free
    if free < nbytes:
        raise OutOfSpaceError(f"needs {nbytes} bytes and its file system has {free} free", file=destination)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _begin(destination: Path) -> tuple[Path, int]:
    """A new hidden sibling and the descriptor that holds its lock; what killed runs left is removed."""
    prefix = f".{destination.name}.djax-"
    for entry in destination.parent.iterdir():
        if entry.name.startswith(prefix) and entry.is_dir() and not entry.is_symlink():
            _remove_stale(entry)
    while True:
        directory = destination.parent / f"{prefix}{secrets.token_hex(4)}"
        directory.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = _open(directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if directory.is_dir():
                return directory, descriptor
            os.close(descriptor)
        # Another run took the new directory for a stale one before it was locked.


def _remove_stale(directory: Path) -> None:
    """Remove a run's directory unless the run lives: then it holds the lock."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        descriptor = _open(directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)


def _remove(directory: Path) -> None:
    """Remove a tree. Threads of a write that failed may still be busy in it and even create it again."""
    deadline = time.monotonic() + _LONGEST_REMOVAL_SECONDS
    failed = sys.exc_info()[0] is not None
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        if failed:
            time.sleep(_SETTLING_SECONDS)


def _fsync(path: Path) -> None:
    descriptor = _open(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _check_exchange(destination: Path, temporary: Path) -> None:
    """Find out before the work, not after it, whether this file system can exchange two names."""
    first, second = temporary / "a", temporary / "b"
    first.mkdir()
    second.mkdir()
    try:
        exchange(first, second)
    except OSError as error:
        raise DestinationError(
            f"this file system cannot replace a directory atomically ({error.strerror}); remove the old one or "
            "write to a new name", file=destination) from error
    first.rmdir()
    second.rmdir()


def _exists(destination: Path) -> bool:
    """Whether there is something to replace; an empty directory is not."""
    return destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))


def check_destination(destination: Path, *, overwrite: bool, marker: str) -> None:
    """Raise DestinationError unless the destination is absent, empty, or may be overwritten.

    Only a directory that holds a file named `marker` is ever overwritten.
    """
    if not destination.parent.is_dir():
        raise DestinationError("its parent directory does not exist; create it first", file=destination)
    if not _exists(destination):
        return
    if not overwrite:
        raise DestinationError("exists already; choose another name or overwrite it (--force)", file=destination)
    if not (destination / marker).is_file():
        raise DestinationError(f"is not a converted checkpoint (it has no {marker}); it is not overwritten",
                               file=destination)


@contextlib.contextmanager
def atomic_directory(destination: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A directory to fill; on leaving the block it becomes `destination`, on an exception it is removed.

    `destination` must be absolute and free of links (`Path.resolve`). Raises DestinationError as
    `check_destination`, or if it cannot be written; OutOfSpaceError if the disk is full.
    """
    check_destination(destination, overwrite=overwrite, marker=marker)
    try:
        temporary, lock = _begin(destination)
    except OSError as error:
        raise as_destination_error(error, destination) from error
    try:
        replacing = _exists(destination)
        if replacing:
            _check_exchange(destination, temporary)
        yield temporary
        _fsync_tree(temporary)
        if replacing:
            exchange(temporary, destination)
        else:
            os.rename(temporary, destination)
        _fsync(destination.parent)
    except OSError as error:
        raise as_destination_error(error, destination) from error
    finally:
        # After an exchange this name holds the old directory; after a rename it is gone.
        _remove(temporary)
        os.close(lock)
