"""Kernels that know only JAX. Each op ships its reference, which is both oracle and fallback."""

from kernels_pallas.moe import moe, moe_choice

__all__ = ["moe", "moe_choice"]
