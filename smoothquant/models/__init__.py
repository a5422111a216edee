"""Float models: the table of architectures, access to modules, and running them with hooks."""
