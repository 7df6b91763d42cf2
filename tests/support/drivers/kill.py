"""Kills conversions at chosen file system operations and at random times; prints what was left.

Run as `python -m tests.support.drivers.kill OLD NEW WORK SEED`. OLD and NEW are source directories. One
process imports everything and forks a child for each trial, before JAX has started a thread, so that a
trial costs a conversion and not an interpreter.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert
from convert.checkpoint import read_manifest

EVENTS = frozenset({
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "shutil.rmtree",
    "shutil.copyfile", "fcntl.flock"})


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a fork and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        action()
        code = 0
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hook_events(work: str, react: Callable[[int], None]) -> None:
    """Call `react(count)` before every file system operation that this process makes for `work`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        # Removing a tree names files relative to a descriptor; files that are opened elsewhere are imports.
        if event in EVENTS and (event != "open" or work in str(arguments[0])):
            react(count)
            count += 1

    sys.addaudithook(hook)


def count_events(work: Path, run: Callable[[], None]) -> int:
    """How many operations a whole run makes."""
    read, write = os.pipe()

    def action() -> None:
        last = 0

        def react(count: int) -> None:
            nonlocal last
            last = count + 1

        hook_events(str(work), react)
        run()
        os.write(write, str(last).encode())

    if finish(in_child(action)) != 0:
        raise RuntimeError("an undisturbed conversion failed")
    os.close(write)
    return int(os.read(read, 32))


def state(destination: Path, known: dict[str, str]) -> str:
    """`absent`, or which of the known sources a complete destination was made of."""
    if not destination.exists():
        return "absent"
    convert.verify(destination)
    files = read_manifest(destination)["source"]["files"]
    return known[files["model.safetensors"]["sha256"]]


def main() -> None:
    old, new, work = (Path(argument) for argument in sys.argv[1:4])
    rng = random.Random(int(sys.argv[4]))
    work.mkdir()
    destination, pristine = work / "model", work.parent / "pristine"
    known = {convert.files.sha256(path / "model.safetensors"): name for name, path in (("old", old), ("new", new))}
    started = time.perf_counter()
    if finish(in_child(lambda: convert.convert(old, pristine) and None)) != 0:
        raise RuntimeError("an undisturbed conversion failed")
    duration = time.perf_counter() - started

    def reset(replacing: bool) -> None:
        """As before the first run, without what killed ones left (removing that takes operations too)."""
        for path in work.iterdir():
            shutil.rmtree(path)
        if replacing:
            shutil.copytree(pristine, destination)

    def run() -> None:
        convert.convert(new, destination, overwrite=True)

    outcomes, left = [], 0
    for replacing in (False, True):
        reset(replacing)
        total = count_events(work, run)
        # One in each eighth, so that flushing, the exchange and the removal of the old are always among them.
        points = [rng.randrange(total * part // 8, total * (part + 1) // 8) for part in range(8)]
        for point in points:
            reset(replacing)

            def action(point: int = point) -> None:
                hook_events(str(work), lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == point else None)
                run()

            code = finish(in_child(action))
            left = max(left, len([path for path in work.iterdir() if path != destination]))
            outcomes.append([replacing, f"operation {point} of {total}", code, state(destination, known)])
        for _ in range(3):
            reset(replacing)
            delay = rng.uniform(0, duration)
            pid = in_child(run)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            outcomes.append([replacing, f"after {delay:.3f} s", code, state(destination, known)])
    # What the last ones left is still there: the next run removes it.
    if finish(in_child(run)) != 0:
        raise RuntimeError("the conversion after the killed ones failed")
    print(json.dumps({
        "outcomes": outcomes, "left_by_killed_runs": left, "at_the_end": sorted(os.listdir(work)),
        "final": state(destination, known)}))


if __name__ == "__main__":
    main()
