"""Cost of an outer step before it runs: memory, FLOPs, and the choice of an engine."""
