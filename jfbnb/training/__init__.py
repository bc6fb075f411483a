"""Training: the registry of methods, losses, the loop, weights, and evaluation."""
