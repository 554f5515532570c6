"""`jaxalign doctor`: versions, devices, memory, conflicts, and what to do about them."""
