"""Decoding on several devices."""
