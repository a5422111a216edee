"""SmoothQuant's published functions; `smoothquant.quantization.smoothing` has the mathematics."""

from .quantization.smoothing import smooth_lm, smooth_ln_fcs, smooth_ln_fcs_llama_like

__all__ = ["smooth_lm", "smooth_ln_fcs", "smooth_ln_fcs_llama_like"]
