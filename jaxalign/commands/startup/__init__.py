"""What the command does before it loads JAX: huge pages, compiled programs on disk."""
