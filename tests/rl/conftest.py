"""One tiny model for all tests of `djax.rl`, so that they share its compiled programs."""

from __future__ import annotations

import pytest

from tests.rl import tiny


@pytest.fixture(scope="session")
def tiny_lm():
    return tiny.load()
