"""Tests of `convert`, on checkpoints made on the spot."""
