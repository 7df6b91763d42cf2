"""The hardware that a call is traced for: platform, device, and what it can run."""

from __future__ import annotations

import jax

HOPPER = "9.0"
"""Compute capability of H100, H200 and H800."""


def current_platform() -> str:
    """Platform that a call is traced for: the default device's if one is set, else the default backend.

    "cuda" and "rocm" both read "gpu".
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if platform in ("cuda", "rocm") else platform


def current_device() -> jax.Device | None:
    """The device that a call is traced for, if JAX holds an object for it: the default one, else the first."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.local_devices()[0]
    return None if isinstance(device, str) else device


def device_kind() -> str:
    """Kind of the current device, the key of `configs.json`; empty where there is no object for it."""
    return getattr(current_device(), "device_kind", "")


def without_hopper(platform: str) -> str | None:
    """The reason why no Mosaic GPU kernel of this package can run, or None. A GPU asked about from afar is a Hopper."""
    if platform != "gpu":
        return f"it needs a Hopper GPU, got {platform}"
    capability = getattr(current_device(), "compute_capability", HOPPER)
    return None if capability == HOPPER or current_platform() != "gpu" else (
        f"it needs compute capability {HOPPER}, got {capability}")
