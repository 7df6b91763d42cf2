"""Commands that measure djax against its baselines."""
