"""Tests of `djax.rollouts`."""
