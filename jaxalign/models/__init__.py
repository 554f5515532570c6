"""Models: flax.nnx modules inside, pure functions on a nested dict of parameters outside."""
