"""Tests of `djax.devices`, on fake devices."""
