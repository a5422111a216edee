"""Quantized layers and the rounding of their weights."""
