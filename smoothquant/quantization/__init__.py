"""Quantize a float model. All callers drive `engine.Plan`."""
