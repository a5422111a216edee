"""From a float model to a quantized one: `engine.Plan` is the one way that all callers take."""
