"""`jaxalign eval`: evaluates a model on files and tasks."""
