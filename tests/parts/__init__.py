"""Tests of the parts' contracts."""
