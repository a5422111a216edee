"""Float models: architectures as a table, their modules, and running them with hooks."""
