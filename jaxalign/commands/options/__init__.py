"""The options of a configuration, for people: `jaxalign options`, `init`, and `--help`."""
