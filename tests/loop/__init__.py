"""Tests of the loop against its oracle."""
