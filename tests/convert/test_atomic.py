from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from convert import atomic
from convert.atomic import as_destination_error, atomic_directory, exchange, require_space
from convert.errors import DestinationError, OutOfSpaceError
from tests.support import builders

MARKER = "marker"


def publish(destination: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_directory(destination, overwrite=overwrite, marker=MARKER) as temporary:
        (temporary / MARKER).write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "data").write_text(text)


def read(destination: Path) -> tuple[str, str]:
    return (destination / MARKER).read_text(), (destination / "inner" / "data").read_text()


def test_a_new_directory_and_a_replaced_one(tmp_path: Path) -> None:
    publish(tmp_path / "model", "old")
    assert read(tmp_path / "model") == ("old", "old")
    publish(tmp_path / "model", "new", overwrite=True)
    assert read(tmp_path / "model") == ("new", "new")
    assert os.listdir(tmp_path) == ["model"]


def test_permissions_are_those_of_a_plain_directory(tmp_path: Path) -> None:
    publish(tmp_path / "model", "old")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_exception_leaves_what_was_there(error: BaseException, replacing: bool, tmp_path: Path) -> None:
    if replacing:
        publish(tmp_path / "model", "old")
    expected = DestinationError if isinstance(error, OSError) else type(error)

    def publish_half() -> None:
        with atomic_directory(tmp_path / "model", overwrite=True, marker=MARKER) as temporary:
            (temporary / MARKER).write_text("half")
            raise error

    with pytest.raises(expected):
        publish_half()
    assert os.listdir(tmp_path) == (["model"] if replacing else [])
    if replacing:
        assert read(tmp_path / "model") == ("old", "old")


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    with (pytest.raises(OutOfSpaceError, match="full"),
          atomic_directory(tmp_path / "model", overwrite=False, marker=MARKER)):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:

    def publish_late() -> None:
        with atomic_directory(tmp_path / "model", overwrite=False, marker=MARKER) as temporary:
            (temporary / MARKER).write_text("late")
            publish(tmp_path / "model", "first")

    with pytest.raises(DestinationError):
        publish_late()
    assert read(tmp_path / "model") == ("first", "first")
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_killed_run_left_is_removed_and_a_living_runs_directory_is_not(tmp_path: Path) -> None:
    stale = tmp_path / ".model.djax-abc"
    (stale / "deep").mkdir(parents=True)
    (stale / "deep" / "file").write_text("x")
    other = tmp_path / ".another.djax-abc"
    other.mkdir()
    living = tmp_path / ".model.djax-living"
    living.mkdir()
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    publish(tmp_path / "model", "new")
    assert sorted(os.listdir(tmp_path)) == [".another.djax-abc", ".model.djax-living", "model"]
    os.close(descriptor)
    publish(tmp_path / "model", "newer", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".another.djax-abc", "model"]


def test_stale_names_that_are_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / ".model.djax-link").symlink_to(outside)
    publish(tmp_path / "model", "new")
    assert (outside / "precious").exists()


def test_readers_see_the_old_or_the_new_at_every_instant(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    publish(destination, "0")
    seen: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append((destination / MARKER).read_text())  # raises if it is absent for a moment

    thread = threading.Thread(target=watch)
    failures: list[BaseException] = []
    threading.excepthook, before = lambda arguments: failures.append(arguments.exc_value), threading.excepthook
    try:
        thread.start()
        for number in range(1, 31):
            publish(destination, str(number), overwrite=True)
    finally:
        stop.set()
        thread.join()
        threading.excepthook = before
    assert not failures
    assert [int(text) for text in seen] == sorted(int(text) for text in seen)
    assert len(set(seen)) > 1


def test_concurrent_runs_to_one_name(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def run(text: str) -> None:
        for _ in range(10):
            try:
                publish(tmp_path / "model", text, overwrite=True)
            except DestinationError as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = read(tmp_path / "model")
    assert first == second
    assert os.listdir(tmp_path) == ["model"]
    assert len(errors) < 40


def test_a_file_system_without_exchange_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "model", "old")

    def refuse(first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(atomic, "exchange", refuse)
    with (pytest.raises(DestinationError, match="atomically"),
          atomic_directory(tmp_path / "model", overwrite=True, marker=MARKER)):
        pytest.fail("the work was begun")
    assert read(tmp_path / "model") == ("old", "old")
    assert os.listdir(tmp_path) == ["model"]


def test_exchange_reports_its_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "b")


def test_an_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DestinationError, match="Permission denied"):
        publish(tmp_path / "model", "new")


def test_space(tmp_path: Path) -> None:
    require_space(tmp_path / "model", 1)
    with pytest.raises(OutOfSpaceError):
        require_space(tmp_path / "model", 2**62)


@pytest.mark.parametrize(("error", "kind"), [
    (OSError(errno.ENOSPC, "x"), OutOfSpaceError), (OSError(errno.EDQUOT, "x"), OutOfSpaceError),
    (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), OutOfSpaceError),
    (ValueError("other"), DestinationError), (OSError(errno.EIO, "x"), DestinationError),
    (ValueError(), DestinationError)])
def test_full_disks_are_told_apart(error: Exception, kind: type[DestinationError], tmp_path: Path) -> None:
    found = as_destination_error(error, tmp_path)
    assert type(found) is kind
    assert "\n" not in str(found)
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert type(as_destination_error(outer, tmp_path)) is kind


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sources")
    return builders.write(root / "old", builders.tensors(1)), builders.write(root / "new", builders.tensors(2))


@pytest.mark.slow
def test_killed_at_random_points_the_destination_is_complete_or_as_it_was(
    sources: tuple[Path, Path], tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.drivers.kill", *map(str, sources), str(tmp_path / "work"), str(seed)],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    outcomes = found["outcomes"]
    assert len(outcomes) == 22
    killed = [outcome for outcome in outcomes if outcome[2] == -signal.SIGKILL]
    assert len(killed) >= 12  # a chosen operation or a random time may come after the end
    for replacing, point, code, state in outcomes:
        allowed = {"old", "new"} if replacing else {"absent", "new"}
        assert state in allowed, (point, state)
        if code == 0:
            assert state == "new"
    states = {(replacing, state) for replacing, _, code, state in killed}
    assert {(True, "old"), (True, "new"), (False, "absent")} <= states
    assert found["left_by_killed_runs"] >= 1
    assert found["at_the_end"] == ["model"]
    assert found["final"] == "new"


CONVERT_WITH_A_FILE_LIMIT = """
import resource, signal, sys
import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    convert.convert(sys.argv[1], sys.argv[2], overwrite=True)
except convert.OutOfSpaceError as error:
    print(error)
"""


@pytest.mark.parametrize("replacing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_write_that_fails_half_way(replacing: bool, sources: tuple[Path, Path], tmp_path: Path) -> None:
    import convert

    destination = tmp_path / "model"
    if replacing:
        convert.convert(sources[0], destination)
    result = subprocess.run(
        [sys.executable, "-c", CONVERT_WITH_A_FILE_LIMIT, str(sources[1]), str(destination)],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert result.stdout.startswith(f"{destination}: the disk is full"), result.stderr[-2000:]
    assert os.listdir(tmp_path) == (["model"] if replacing else [])
    if replacing:
        convert.verify(destination)
        builders.tree_equal(convert.load_params(destination)[1], builders.parameters(builders.tensors(1)))


FILL_A_SMALL_DISK = """
mount -t tmpfs -o size=128k none "$2" && exec "$0" -c '
import os, sys
import convert
# The check beforehand would refuse: it has its own test.
convert.run.require_space = convert.checkpoint.require_space = lambda *_: None
target = os.path.join(sys.argv[2], "model")
try:
    convert.convert(sys.argv[1], target)
except convert.OutOfSpaceError as error:
    print(error)
print(os.listdir(sys.argv[2]))
' "$1" "$2"
"""


def test_a_disk_that_runs_full(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no user namespaces: cannot mount a small disk")
    config = {**builders.CONFIG, "vocab_size": 4096}
    values = {**builders.tensors()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        values[key] = np.random.default_rng(0).standard_normal((4096, builders.MODEL), np.float32)
    source = builders.write(tmp_path / "source", values, config=config)
    (tmp_path / "disk").mkdir()
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FILL_A_SMALL_DISK, sys.executable, str(source), str(tmp_path / "disk")],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr[-2000:]
    assert "the disk is full" in lines[0]
    assert lines[1] == "[]"
