"""The published SmoothQuant functions, implemented in `smoothquant.quantization.smoothing`."""

from .quantization.smoothing import smooth_lm, smooth_ln_fcs, smooth_ln_fcs_llama_like

__all__ = ["smooth_lm", "smooth_ln_fcs", "smooth_ln_fcs_llama_like"]
