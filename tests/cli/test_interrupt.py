"""Interrupted commands: what was reached, one line, exit code 130, in a terminal, a pipe, a conversion, a training."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from djax import api, assets
from djax.cli.app import app
from tests.conftest import press_ctrl_c

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "llada_moe"
LONG = ["--max-new-tokens", "512", "--recipe", "llada", "--cache", "none", "--no-stop"]
"""Minutes of denoising with the bundled model."""
LIMIT = 20
"""Seconds that an ending may take here, where other tests load the machine; 2 is what it takes."""


@pytest.fixture
def interrupted(golden_lm, monkeypatch):
    """Commands run on the tiny model, one step at a time, and Ctrl-C comes after the second."""
    from djax.cli.outputs import Output
    from djax.engine import interrupts

    monkeypatch.setattr(interrupts, "STRETCH_SECONDS", 0.0)
    golden_lm.program._paces.clear()
    monkeypatch.setattr(api, "load", lambda *given, **options: golden_lm)
    monkeypatch.setattr(golden_lm, "config", dataclasses.replace(golden_lm.config, mask_id=155))
    calls: list[int] = []
    put = Output.put

    def press(self, generation):
        put(self, generation)
        calls.append(1)
        if len(calls) == 2:
            press_ctrl_c()

    monkeypatch.setattr(Output, "put", press)
    yield
    golden_lm.program._paces.clear()


def test_what_was_reached_is_printed(interrupted, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text("[[98, 107, 10, 66, 130]]")
    flags = ["--token-ids", str(ids), "--max-new-tokens", "20", "--block-length", "8", "--recipe", "fast_dllm",
             "--threshold", "0.6"]
    done = CliRunner().invoke(app, ["generate", *flags, "--json"])
    assert done.exit_code == 130
    row = json.loads(done.stdout)
    assert row["stop_reason"] == "interrupted"
    assert row["nfe"] == 2
    assert 0 < row["masked_left"] < 20
    assert done.stderr == "djax: interrupted after 2 denoising steps; what was reached is on standard output\n"


# As processes.


def start(*command: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}, **options)


def interrupt(child: subprocess.Popen, number: int = signal.SIGINT) -> float:
    """Send a signal; seconds until the process is gone."""
    began = time.monotonic()
    child.send_signal(number)
    child.wait(LIMIT)
    return time.monotonic() - began


class Terminal:
    """The other end of a child's terminal."""

    def __init__(self, *command: str) -> None:
        self._main, worker = pty.openpty()
        self.child = start(*command, stdin=worker, stdout=worker)
        os.close(worker)
        self.output = b""

    def read_until(self, found: Callable[[bytes], bool], seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while not found(self.output):
            assert time.monotonic() < until, self.output[-500:]
            if select.select([self._main], [], [], 0.1)[0]:
                try:
                    chunk = os.read(self._main, 65536)
                except OSError:  # how Linux reports that the other end is closed
                    return
                self.output += chunk

    def close(self) -> None:
        os.close(self._main)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["compiling", "step 5"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_live_view(moment, number):
    """While it compiles (JAX would crash at exit), and while it denoises."""
    terminal = Terminal("-m", "djax.cli", "generate", "Sort 4 2 9.", *LONG)
    terminal.read_until(lambda output: moment.encode() in output)
    if moment == "compiling":
        time.sleep(1)
    interrupt(terminal.child, number)
    terminal.read_until(lambda output: False, seconds=60)
    assert terminal.child.returncode == 128 + number
    said = terminal.child.stderr.read().decode()
    assert said.startswith("djax: interrupted")
    assert said.count("\n") == 1
    assert b"\x1b[?25h" in terminal.output, "the cursor stays hidden"
    assert ("NFE" in said) == (moment != "compiling")


@pytest.mark.slow
def test_a_terminal_that_is_closed():
    terminal = Terminal("-m", "djax.cli", "generate", "Sort 4 2 9.", *LONG)
    terminal.read_until(lambda output: b"step 5" in output)
    terminal.close()
    interrupt(terminal.child, signal.SIGHUP)
    assert terminal.child.returncode == 128 + signal.SIGHUP


SLOW_MODEL = textwrap.dedent("""
    import sys, time, djax.engine.running
    advance = djax.engine.running.Run.advance
    def told(self, **limits):
        got = advance(self, **limits)
        print("stretch", file=sys.stderr, flush=True)
        return got
    djax.engine.running.Run.advance = told
""")
"""Says on standard error when a stretch is over: so tests know that something was reached."""


@pytest.mark.slow
@pytest.mark.parametrize("json_rows", [False, True])
def test_ctrl_c_in_a_pipe(json_rows):
    code = SLOW_MODEL + "from djax.cli import main\nmain()"
    child = start("-c", code, "generate", "Sort 4 2 9.", *LONG, *["--json-full"] * json_rows, stdout=subprocess.PIPE)
    for _ in range(3):
        assert child.stderr.readline() == b"stretch\n"
    interrupt(child)
    assert child.returncode == 130
    out, err = child.communicate()
    lines = [line for line in err.decode().splitlines() if line != "stretch"]
    assert len(lines) == 1
    assert lines[0].startswith("djax: interrupted after ")
    if json_rows:
        row = json.loads(out)
        assert row["stop_reason"] == "interrupted"
        assert row["nfe"] > 1
        assert row["masked_left"] == 512 - sum(step >= 0 for step in row["commit_step"])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "between"), [
    ("main", 0), ("thread", 0), ("daemon", 0), ("pool", 0), ("thread", 0.05), ("daemon", 0.05)])
def test_ctrl_c_in_the_python_api(how, between):
    """The process ends, killed by nothing but the interrupt, wherever a generation runs: in a stretch, or after it."""
    code = SLOW_MODEL.replace("return got", f"time.sleep({between}); return got") + textwrap.dedent(f"""
        import threading
        from concurrent.futures import ThreadPoolExecutor
        from djax import load, recipes
        lm = load()
        def work():
            lm.generate("Sort 4 2 9.", max_new_tokens=512, recipe=recipes.llada(), stop_on_eos=False)
        how = {how!r}
        if how == "main":
            work()
        elif how == "pool":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(work).result()
        else:
            thread = threading.Thread(target=work, daemon=how == "daemon")
            thread.start()
            thread.join()
    """)
    child = start("-X", "faulthandler", "-c", code, stdout=subprocess.PIPE)
    for _ in range(3):
        assert child.stderr.readline() == b"stretch\n"
    interrupt(child)
    _, err = child.communicate()
    assert child.returncode == -signal.SIGINT, err.decode()[-2000:]
    assert b"KeyboardInterrupt" in err


@pytest.mark.slow
def test_ctrl_c_during_a_conversion(tmp_path):
    target = tmp_path / "out"
    code = textwrap.dedent("""
        import sys, time
        from convert import checkpoint
        save = checkpoint.save
        def slow(*given, **options):
            print("saving", file=sys.stderr, flush=True)
            time.sleep(60)
            return save(*given, **options)
        checkpoint.save = slow
        from djax.cli import main
        main()
    """)
    child = start("-c", code, "convert", str(assets.path()), str(target), stdout=subprocess.PIPE)
    assert child.stderr.readline() == b"saving\n"
    interrupt(child)
    out, err = child.communicate()
    assert (child.returncode, out) == (130, b"")
    assert err.decode() == f"djax: interrupted; {target} is as it was\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c_during_a_training(tmp_path, stubborn):
    """Also where the main thread cannot handle the signal, as in a long step."""
    (tmp_path / "run.toml").write_text(textwrap.dedent("""
        [data]
        tasks = ["addition"]
        row_length = 128
        [optimizer]
        learning_rate = 1e-3
        schedule = "constant"
        [training]
        output = "out"
        steps = 100000
        batch_size = 2
        log_every = 1
        save_every = 2
    """))
    code = "from djax.cli import main\n"
    if stubborn:
        code = "import djax.cli.interrupt as c\nc.Interruption.interrupt = lambda self, number, frame: None\n" + code
    child = start("-c", code + "main()", "train", str(tmp_path / "run.toml"), stdout=subprocess.PIPE)
    while not child.stderr.readline().startswith(b"3/100000"):
        assert child.poll() is None
    interrupt(child)
    out, err = child.communicate()
    assert (child.returncode, out) == (130, b"")
    last = err.decode().splitlines()[-1]
    kept = [int(entry.name) for entry in (tmp_path / "out" / "checkpoints").iterdir() if entry.name.isdecimal()]
    assert last.startswith(f"djax: interrupted; a checkpoint of update {max(kept)} is kept in ")
