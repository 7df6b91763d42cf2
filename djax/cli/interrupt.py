"""Ctrl-C, SIGTERM and SIGHUP end a command within two seconds: what was reached, one line, exit code 128 + signal.

A signal raises KeyboardInterrupt in the main thread, which runs the command and cleans up. Where it cannot, because XLA
compiles or computes a step for longer than that, a watching thread tells what was reached and ends the process. A
process that was interrupted ends without Python's teardown: JAX crashes in it if something is still running.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

GRACE_SECONDS = 1.4
"""Seconds that a command may take to end by itself."""
_TELLING_SECONDS = 0.4
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption:
    """Progress to report if the command is interrupted, reported once."""

    def __init__(self) -> None:
        self.tell: Callable[[], str] = lambda: "interrupted"
        self.code = 128 + signal.SIGINT
        self.came = threading.Event()
        self._told = threading.Lock()

    def report(self) -> None:
        """Print what was reached and the one line, unless that was done."""
        if not self._told.acquire(blocking=False):
            return
        line = "interrupted"
        # who reads may be gone, and the terminal with it
        with contextlib.suppress(OSError, ValueError):
            line = self.tell()
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            print(f"djax: {line}", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """End the process at once."""
        os._exit(self.code)

    def watch(self, source: int) -> None:
        """Thread: on a signal wait for the command to end; then, or on a second one, end the process."""
        while not (got := os.read(source, 1)) or got[0] not in _SIGNALS:
            pass
        self.code = 128 + got[0]
        again, _, _ = select.select([source], [], [], GRACE_SECONDS)
        if not again:
            teller = threading.Thread(target=self.report, daemon=True)  # a terminal that takes nothing would block it
            teller.start()
            teller.join(_TELLING_SECONDS)
        self.leave()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Signal handler of the main thread."""
        del frame
        self.code = 128 + number
        self.came.set()
        raise KeyboardInterrupt


_CURRENT: ContextVar[Interruption | None] = ContextVar("interruption", default=None)


def current() -> Interruption:
    """The running command's."""
    found = _CURRENT.get()
    if found is None:
        _CURRENT.set(found := Interruption())
    return found


@contextmanager
def interruptible() -> Iterator[None]:
    """Around the whole command line, in the main thread of its own process."""
    interruption = Interruption()
    _CURRENT.set(interruption)
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not one that nohup ignores
            signal.signal(number, interruption.interrupt)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=interruption.watch, args=(source,), daemon=True).start()
    try:
        yield
    finally:
        if interruption.came.is_set():
            interruption.report()
            interruption.leave()


@contextmanager
def reaching(tell: Callable[[], str]) -> Iterator[None]:
    """While the block runs, an interruption calls `tell`: it prints what was reached, and returns the one line."""
    interruption = current()
    before, interruption.tell = interruption.tell, tell
    try:
        yield
    except KeyboardInterrupt:
        interruption.report()
        raise
    interruption.tell = before


def report() -> int:
    """After a KeyboardInterrupt: tell what was reached, unless that was done; the exit code."""
    interruption = current()
    interruption.report()
    _CURRENT.set(None if not interruption.came.is_set() else interruption)
    return interruption.code
