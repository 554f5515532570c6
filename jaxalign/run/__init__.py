"""A run: configuration, tasks, the training loop, checkpoints and export."""
