"""Models: flax.nnx modules behind pure functions on a nested dict of parameters."""
