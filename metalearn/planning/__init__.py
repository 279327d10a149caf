"""What a run would cost, before it runs: memory, FLOPs, and the choice of an engine."""
