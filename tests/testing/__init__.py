"""Tests of `djax.testing`."""
