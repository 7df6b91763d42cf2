"""Block sizes as data: which entry a device finds."""

from __future__ import annotations

import json
import pathlib

import pytest

import kernels_pallas
from kernels_pallas import configs
from kernels_pallas.configs import load_config

ENTRIES = {
    "default": {"decode": {"rows": 16, "stages": 2, "source": "reasoned"}, "refresh": {"rows": 128}},
    "NVIDIA H": {"decode": {"rows": 24}},
    "NVIDIA H200": {"decode": {"rows": 32, "source": "measured"}},
}
FILES = sorted(pathlib.Path(kernels_pallas.__file__).parent.glob("*/configs.json"))


def test_the_longest_key_wins_and_the_default_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_read", lambda op: ENTRIES)
    rows = {"NVIDIA H200 141GB HBM3e": 32, "NVIDIA H100 80GB HBM3": 24, "TPU v5 lite": 16, "": 16}
    for kind, expected in rows.items():
        assert load_config("any", device_kind=kind, regime="decode") == {"rows": expected, "stages": 2}
    assert load_config("any", device_kind="NVIDIA H200", regime="refresh") == {"rows": 128}
    assert ENTRIES["default"]["decode"]["rows"] == 16, "what is read is not changed"
    with pytest.raises(ValueError, match="regime: got 'train'; any has 'decode', 'refresh'"):
        load_config("any", device_kind="cpu", regime="train")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_number_has_a_source(path: pathlib.Path) -> None:
    entries = json.loads(path.read_text())
    assert "default" in entries
    for kind, regimes in entries.items():
        for regime, numbers in regimes.items():
            assert isinstance(numbers.pop("source"), str), (kind, regime)
            assert numbers
            assert all(isinstance(number, int) and number >= 0 for number in numbers.values()), (kind, regime)
            assert load_config(path.parent.name, device_kind=kind, regime=regime).items() >= numbers.items()


def test_there_are_files() -> None:
    assert "moe" in {path.parent.name for path in FILES}
