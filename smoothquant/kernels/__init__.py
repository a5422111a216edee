"""The compiled kernels: torch ops, control, the packed layout, and the specification in torch."""
