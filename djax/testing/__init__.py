"""Checks for parts of your own: run `check_part` on one in your tests."""

from djax.testing.parts import check_part

__all__ = ["check_part"]
