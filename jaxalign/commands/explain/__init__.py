"""`jaxalign explain`: which rows and tokens shaped a step."""
