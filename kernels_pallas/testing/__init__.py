"""What every implementation of an op has to compute: tables of cases with their oracles, for tests and benchmarks."""
