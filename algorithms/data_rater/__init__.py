"""A network that rates training examples, and the choice of the best of them."""
