"""The version of the package, here alone: pyproject.toml and the code read it."""

__version__ = "0.1.0"
