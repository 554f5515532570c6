"""A run: its configuration, its tasks, the loop, checkpoints and export."""
