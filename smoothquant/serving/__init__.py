"""Serving quantized folders with inference engines."""
