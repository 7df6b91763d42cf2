"""Single ops against other implementations."""
