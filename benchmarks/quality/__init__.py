"""Exactness of recipes against their speed."""
