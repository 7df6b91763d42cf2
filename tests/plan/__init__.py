"""Tests of `djax.plan`."""
