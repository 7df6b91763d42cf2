"""Tests of `djax.train`."""
