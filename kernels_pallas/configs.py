"""Block sizes of the kernels: data in `kernels_pallas/<op>/configs.json`, keyed by device kind and regime.

A file maps a device kind to regimes, and a regime to numbers:

    {"default": {"decode": {"rows": 16, "source": "reasoned"}},
     "NVIDIA H200": {"decode": {"rows": 16, "source": "measured, benchmarks.kernels"}}}

A device finds the longest key that its kind starts with ("NVIDIA H200" holds for "NVIDIA H200 141GB HBM3e"), and
what its entry does not name it takes from "default". `source` says where the numbers come from.
"""

from __future__ import annotations

import functools
import importlib.resources
import json


def load_config(op: str, *, device_kind: str, regime: str) -> dict[str, int]:
    """The numbers of one regime of an op on a device.

    Args:
        op: folder of `kernels_pallas` that holds the file.
        device_kind: as `jax.Device.device_kind` says it.
        regime: name that the op gives a range of shapes.

    Raises:
        ValueError: the op has no such regime, on this device or by default.
    """
    entries = _read(op)
    keys = [key for key in entries if key != "default" and device_kind.startswith(key)]
    chosen = {**entries["default"].get(regime, {})}
    if keys:
        chosen |= entries[max(keys, key=len)].get(regime, {})
    numbers = {name: value for name, value in chosen.items() if name != "source"}
    if not numbers:
        regimes = sorted({name for entry in entries.values() for name in entry})
        raise ValueError(f"regime: got {regime!r}; {op} has {', '.join(map(repr, regimes))}")
    return numbers


@functools.cache
def _read(op: str) -> dict[str, dict[str, dict[str, int]]]:
    text = importlib.resources.files("kernels_pallas").joinpath(op, "configs.json").read_text("utf-8")
    entries: dict[str, dict[str, dict[str, int]]] = json.loads(text)
    return entries
