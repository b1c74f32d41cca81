"""megatron-core's torch_dist checkpoints, read and written as byte extents without torch."""
