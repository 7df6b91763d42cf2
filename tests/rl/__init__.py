"""Tests of `djax.rl`."""
