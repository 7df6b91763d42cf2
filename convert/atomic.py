"""A directory that appears complete or not at all, whenever the process is killed.

Everything is written into a hidden sibling of the destination, flushed to disk, and renamed. To replace an
existing directory the two names are exchanged in one system call (Linux `renameat2`), so that at every
instant the destination is the old one or the new one. A hidden sibling that a killed process left behind
is recognised by its lock, which the kernel releases with the process, and removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from convert.errors import DestinationError, OutOfSpaceError

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
    return DestinationError(f"cannot be written: {str(error).splitlines()[0][:300] if str(error) else type(error)}",
                            file=destination)


def require_space(destination: Path, nbytes: int) -> None:
    """Raise OutOfSpaceError unless the destination's file system has `nbytes` free."""
    free = shutil.disk_usage(destination.parent).free
    if free < nbytes:
        raise OutOfSpaceError(f"needs {nbytes} bytes and its file system has {free} free", file=destination)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.djax-"


def _try_lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock, or None if another process holds it or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _remove_stale(destination: Path) -> None:
    """Remove what killed runs left beside the destination. A run that still lives holds its lock."""
    prefix = _prefix(destination)
    for entry in sorted(destination.parent.iterdir()):
        if not entry.name.startswith(prefix) or entry.is_symlink() or not entry.is_dir():
            continue
        descriptor = _try_lock(entry)
        if descriptor is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(descriptor)


def _remove(directory: Path) -> None:
    """Remove a tree. Threads of a write that failed may still be busy in it and even create it again."""
    deadline = time.monotonic() + _LONGEST_REMOVAL_SECONDS
    failed = sys.exc_info()[0] is not None
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        if failed:
            time.sleep(_SETTLING_SECONDS)


def _make_locked(destination: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=destination.parent))
        descriptor = _try_lock(directory)
        if descriptor is not None:
            return directory, descriptor
        # Another run took the new directory for a stale one before it was locked.


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
    finally:
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
        _remove_stale(destination)
        temporary, lock = _make_locked(destination)
    except OSError as error:
        raise as_destination_error(error, destination) from error
    try:
        replacing = _exists(destination)
        if replacing:
            _check_exchange(destination, temporary)
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
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


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
