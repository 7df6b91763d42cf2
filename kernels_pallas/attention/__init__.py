"""Attention of a window of queries to a canvas of keys and values."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention, attention_choice

__all__ = ["IMPLEMENTATIONS", "attention", "attention_choice"]
