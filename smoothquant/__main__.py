"""`python -m smoothquant`."""

from .cli import main

main()
