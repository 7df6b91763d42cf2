"""Tables of cases with their oracles, the same for every implementation of an op."""
