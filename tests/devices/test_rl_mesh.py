"""Rollouts, scores and weights on Auto and Explicit meshes and on disjoint ones, in a process with eight devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EIGHT_DEVICES


@pytest.mark.slow
def test_meshes_give_what_one_device_gives() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.drivers.rl_mesh"], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False, env=os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"})
    assert done.stdout.split() == ["Auto", "Explicit", "disjoint"], done.stderr[-3000:]
