"""The public names of the package, all of them."""

from . import ops as ops  # loads the compiled kernels, so that torch.ops.mixedquant is there
from .calibration import collect_stats, load_stats
from .checkpoint import load_quantized, save_quantized
from .config import MixedQuantConfig
from .convert import convert
from .errors import CheckpointError
from .fake_quant import quantize_model
from .folding import fold_permutations
from .linear import W4A4Linear
from .quantize import dequantize, quantization_report, quantize
from .smooth import smooth_lm

__all__ = [
    "CheckpointError",
    "MixedQuantConfig",
    "W4A4Linear",
    "collect_stats",
    "convert",
    "dequantize",
    "fold_permutations",
    "load_quantized",
    "load_stats",
    "quantization_report",
    "quantize",
    "quantize_model",
    "save_quantized",
    "smooth_lm",
]
