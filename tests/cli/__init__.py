"""Tests of `djax.cli`."""
