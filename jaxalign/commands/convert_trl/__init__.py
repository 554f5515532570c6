"""`jaxalign convert-trl`: converts a file of TRL's arguments to our configuration."""
