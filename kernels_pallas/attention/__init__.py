"""Attention of a window to its canvas."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention, attention_choice

__all__ = ["IMPLEMENTATIONS", "attention", "attention_choice"]
