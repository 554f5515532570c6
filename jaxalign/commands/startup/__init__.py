"""What the command does before it begins: pages of memory, compiled programs."""
