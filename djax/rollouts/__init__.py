"""Generations as exact data: records, masked states, the scorer, likelihoods."""
