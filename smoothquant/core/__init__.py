"""The base of all other rooms: configuration, errors, files and texts. Knows nothing of models."""
