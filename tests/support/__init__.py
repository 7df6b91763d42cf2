"""Helpers of several tests: oracles, toys, builders."""
