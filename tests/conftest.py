"""Settings shared by all tests. They take effect before jax is imported."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

# Compiling dominates the suite, and the programs are tiny: LLVM without its optimiser takes half the time, and XLA's
# own emitter of fusions two thirds of what the MLIR one takes.
FAST_COMPILE = ("--xla_backend_optimization_level=0 "
                "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
EIGHT_DEVICES = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
"""XLA_FLAGS of a process with eight fake devices; their number is fixed when JAX starts."""
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), FAST_COMPILE]).strip()
# A shell that starts a command in the background has it ignore SIGINT, nohup SIGHUP, and so would every process that a
# test starts.
for ignored, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, usual)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs compiled once serve the other worker, the processes that tests start, and the next run. XLA's own key holds
# its version and flags; what the tests count are traces, which the cache leaves alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

MAPS = Path("/proc/self/maps")
MAP_LIMIT = Path("/proc/sys/vm/max_map_count")

# Tracing makes many objects and frees nearly all of them by counting: collecting cycles took a seventh of the suite.
gc.set_threshold(100_000, 50, 100)

GOLDENS = Path(__file__).parent / "goldens" / "llada_moe"


def press_ctrl_c() -> None:
    """Raise SIGINT here. Python loses a KeyboardInterrupt that comes while the collector calls back (hypothesis)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        if was_enabled:
            gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: one worker has it, and what is begun last the other would wait for."""
    items.sort(key=lambda item: item.path.parts[-2:] != ("devices", "test_mesh.py"))


@pytest.fixture(scope="session")
def golden_lm():
    """dInfer's tiny checkpoint in float32; one object, so that tests share its compiled programs."""
    import djax

    return djax.load(GOLDENS, dtype="float32")


@pytest.fixture(scope="session")
def tiny_lm():
    """One tiny model for all tests of rollouts and of `djax.rl`, so that they share its compiled programs."""
    from tests.support import tiny

    return tiny.load()


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drop compiled programs before they fill the process's memory maps.

    Each takes dozens of maps, and where the system allows no more (65530 by default on Linux) LLVM crashes.
    """
    yield
    if MAPS.exists() and MAP_LIMIT.exists():
        with MAPS.open("rb") as file:
            used = sum(1 for _ in file)
        if used > 0.4 * int(MAP_LIMIT.read_text()):
            import jax

            jax.clear_caches()
            gc.collect()
