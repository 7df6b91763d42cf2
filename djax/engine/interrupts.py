"""Ctrl-C during a generation: in the main thread, in another one, while XLA compiles, and at the interpreter's end.

The loop comes back to the host between bounded stretches (`Pace`). In the main thread a wait for one is interrupted at
once, elsewhere a generation ends at the next boundary (`check`). A process never ends while a thread is inside djax:
JAX crashes if its clients are torn down then.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax

STRETCH_SECONDS = 0.4
"""Seconds of a stretch of the loop: short for someone who presses Ctrl-C, long against the host's part of it."""
SHARED_STEPS = 16
"""Steps of a stretch on a mesh of several processes, which all have to take the same."""
_FASTEST_GROWTH = 64
_LONGEST_EXIT_SECONDS = 30.0


class Pace:
    """Denoising steps of the next stretch, from what the last one took."""

    def __init__(self, *, fixed: bool = False) -> None:
        """`fixed`: `SHARED_STEPS`, whatever they take."""
        self._fixed = fixed
        self.steps = SHARED_STEPS if fixed else 1

    def took(self, seconds: float) -> None:
        """Take note of a stretch that was not cut short."""
        if not self._fixed:
            wanted = int(self.steps * STRETCH_SECONDS / max(seconds, 1e-6))
            self.steps = max(1, min(wanted, self.steps * _FASTEST_GROWTH))


class Hold:
    """Keeps Ctrl-C back in the main thread while XLA compiles.

    JAX would leave an interrupted compilation running in the background, and a process that ends meanwhile crashes. A
    second Ctrl-C is let through. Who handles the signal in another way than Python's own is not interfered with.
    """

    def __init__(self) -> None:
        self._armed = False
        self._previous: Any = None
        self._pending = False

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Around a call that may compile. Raises KeyboardInterrupt at its end if that was asked for meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._armed, self._pending = True, False
        try:
            yield
        finally:
            self._armed = False
            if self._previous is not None:
                signal.signal(signal.SIGINT, self._previous)
                self._previous = None
        if self._pending:
            raise KeyboardInterrupt

    def begin(self) -> None:
        """A compilation follows."""
        mine = self._armed and threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            signal.default_int_handler(number, frame)
        self._pending = True


class _Ending:
    """The interpreter's end, which waits for threads that are inside djax: JAX crashes where they still use it."""

    def __init__(self) -> None:
        self.began = False

    def wait(self) -> None:
        """Ask the generations of all threads to end (`check`), and wait until no other thread is inside djax.

        Daemon threads are alive here, and on Python 3.11 also others: a `join` that an interrupt ends takes its thread
        for ended.
        """
        self.began = True
        until = time.monotonic() + _LONGEST_EXIT_SECONDS
        while _threads_inside() and time.monotonic() < until:
            time.sleep(0.01)


def _threads_inside() -> bool:
    """Whether another thread runs a function of this package, or one that such a function called."""
    package = os.path.dirname(__file__) + os.sep
    mine = threading.get_ident()
    return any(
        frame.f_code.co_filename.startswith(package)
        for ident, top in sys._current_frames().items() if ident != mine for frame, _ in traceback.walk_stack(top))


_ENDING = _Ending()
atexit.register(_ENDING.wait)  # runs before JAX's own, which was registered earlier


def wait(outputs: Any) -> None:
    """Wait for a stretch's outputs. KeyboardInterrupt comes when the stretch is over, and leaves nothing running."""
    try:
        jax.block_until_ready(outputs)
    except KeyboardInterrupt:
        jax.block_until_ready(outputs)
        raise


def check() -> None:
    """End a generation outside of the main thread if the process is ending.

    Raises:
        KeyboardInterrupt: the main thread is dealing with one, or ended with it.
        SystemExit: the process ends.
    """
    main = threading.main_thread()
    if threading.current_thread() is main:
        return
    if _interrupted(main):
        raise KeyboardInterrupt("the main thread was interrupted")
    if _ENDING.began:
        raise SystemExit


def _interrupted(main: threading.Thread) -> bool:
    """Whether the main thread handles a KeyboardInterrupt now (`with` a pool, `finally`), or was ended by one."""
    if not main.is_alive() or sys.is_finalizing():
        return getattr(sys, "last_type", None) is KeyboardInterrupt
    handled = sys._current_exceptions().get(main.ident or 0)
    found = handled[1] if isinstance(handled, tuple) else handled
    return isinstance(found, KeyboardInterrupt)


