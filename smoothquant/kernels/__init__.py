"""The compiled kernels: torch ops, control, packed layout, and a reference in plain torch."""
