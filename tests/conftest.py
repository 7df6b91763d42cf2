"""Settings shared by all tests. They take effect before jax is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Compiling dominates the suite: LLVM without its optimiser takes half the time, and the programs are tiny.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDENS = Path(__file__).parent / "goldens" / "llada_moe"


@pytest.fixture(scope="session")
def golden_lm():
    """dInfer's tiny checkpoint in float32; one object, so that tests share its compiled programs."""
    import djax

    return djax.load(GOLDENS, dtype="float32")
