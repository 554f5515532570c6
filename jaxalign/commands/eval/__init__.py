"""`jaxalign eval`: what a model knows, prefers and answers, measured on files."""
