"""Training: data, the loop, optimisers, averages of the weights, checkpoints."""
