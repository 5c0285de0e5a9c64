"""Training: data, the loop, averages of the weights, checkpoints."""
