"""Original architectures in plain torch: checkpoints with random weights, and their forwards."""
