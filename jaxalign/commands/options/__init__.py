"""Help on the options of a configuration: `jaxalign options`, `init`, and `--help`."""
