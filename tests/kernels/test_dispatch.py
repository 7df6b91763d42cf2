"""Resolution of `implementation=`."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from kernels_pallas.dispatch import Implementation, resolve
from kernels_pallas.hardware import current_platform


def make(reason: str | None) -> Implementation:
    return Implementation(lambda x: x, lambda platform, *operands: reason)


def gpu_only(platform: str, *operands: Any) -> str | None:
    return None if platform == "gpu" else f"it needs a GPU, got {platform}"


TABLE = {"slow": make(None), "fast": Implementation(lambda x: x, gpu_only), "never": make("it is broken")}


def choose(implementation: str | None, platform: str = "cpu", preference: tuple[str, ...] = ("fast", "slow")) -> str:
    return resolve(
        "op", TABLE, implementation=implementation, preference=preference, platform=platform, operands=(1,))


def test_none_picks_the_first_that_supports_the_call() -> None:
    assert choose(None, "gpu") == "fast"
    assert choose(None, "cpu") == "slow"


def test_a_name_is_taken_at_its_word() -> None:
    assert choose("slow", "gpu") == "slow"
    with pytest.raises(NotImplementedError, match=r"op: implementation 'fast' .*needs a GPU, got cpu"):
        choose("fast", "cpu")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'quick'; op has 'slow', 'fast', 'never', or None"):
        choose("quick")


def test_nothing_left_says_why() -> None:
    with pytest.raises(NotImplementedError, match="fast: it needs a GPU, got cpu; never: it is broken"):
        choose(None, preference=("fast", "never"))


def test_the_platform_is_the_default_devices() -> None:
    assert current_platform() == jax.default_backend().replace("cuda", "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_platform() == "cpu"
