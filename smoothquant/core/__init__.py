"""The base of all other sub-packages: configuration, errors, files, texts. No models."""
