"""Quantized models on disk: saving, loading, converting, inspecting and exporting folders."""
