"""Tests of `djax.tasks`."""
