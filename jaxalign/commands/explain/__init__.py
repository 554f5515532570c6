"""`jaxalign explain`: which rows and tokens made a step what it was."""
