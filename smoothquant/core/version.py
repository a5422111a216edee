"""The distribution's name and version.

pip knows the package by another name than Python, which imports `smoothquant`. pyproject.toml takes
the version from here, but has to repeat the name; tests/test_distribution.py compares the two.
"""

DISTRIBUTION = "mixedquant"
__version__ = "0.1.0"


def install_command(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml lists."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
