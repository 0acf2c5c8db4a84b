"""Numbers: weights to integers, recorded activations to scales, timesteps to buckets."""
