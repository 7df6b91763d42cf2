"""Tests of `djax.models` against other libraries."""
