"""FDS: hyperparameter schedules learned by hypergradients (arXiv:2007.07869)."""
