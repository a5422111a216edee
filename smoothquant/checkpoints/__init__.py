"""Quantized models on disk: save, load, convert, inspect and export them."""
