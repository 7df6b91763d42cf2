"""What the oracles by other libraries share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def oracle_libraries(request: pytest.FixtureRequest) -> None:
    """torch and transformers as globals of the test's module.

    Not when it is collected: every worker collects all, and PyTorch takes seconds to import.
    """
    for name in ("torch", "transformers"):
        setattr(request.module, name, pytest.importorskip(
            name, reason=f"the oracle needs {name} (pip install djax[oracle], Python 3.11)"))
