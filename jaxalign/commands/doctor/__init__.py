"""`jaxalign doctor`: versions, devices, memory, what does not fit together, and what to do."""
