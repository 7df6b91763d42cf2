"""Decoding beside PyTorch's."""
