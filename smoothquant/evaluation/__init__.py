"""What a quantized model is worth: perplexity, errors layer by layer, speed."""
