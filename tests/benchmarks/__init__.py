"""Tests of `benchmarks`, on tiny sizes."""
