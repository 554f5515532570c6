"""`jaxalign convert-trl`: a file of TRL's arguments as a configuration of ours."""
