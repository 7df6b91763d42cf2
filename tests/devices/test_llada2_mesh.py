"""LLaDA2 on a mesh gives the tokens of one device, from its own slices of a checkpoint. See `llada2_mesh_driver`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EIGHT_DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("presets", [
    ("sp_tp_ep",), ("dp_tp_ep", "tp_ep", "dp_tp", "dp_ep", "sp_tp", "sp_ep")], ids="+".join)
def test_a_mesh_gives_the_tokens_of_one_device(presets: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.drivers.llada2_mesh", *presets], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == "ok"
