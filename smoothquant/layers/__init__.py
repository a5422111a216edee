"""Quantized layers, and the rounding of the weights in them."""
