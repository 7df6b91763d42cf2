"""Tests of the API with its engine."""
