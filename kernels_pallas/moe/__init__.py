"""Mixture of SwiGLU experts: every row goes through the experts that its router chose."""

from kernels_pallas.moe.api import IMPLEMENTATIONS, moe, moe_choice

__all__ = ["IMPLEMENTATIONS", "moe", "moe_choice"]
