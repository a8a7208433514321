"""The training loop, its checkpoints, and stages before it."""
