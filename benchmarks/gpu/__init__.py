"""Everything measured on one lent GPU, in one run."""
