"""Measure a quantized model: perplexity, per-layer errors and speed."""
