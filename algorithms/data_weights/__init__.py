"""Data weights: what each training example is worth, by metagradients (arXiv:2504.16430)."""
