"""Set-up before the command loads JAX: huge pages, and compiled programs on disk."""
