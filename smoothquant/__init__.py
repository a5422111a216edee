"""MixedQuant: real W4A4 quantization with 16-bit salient channels.

stats = collect_stats(model, batches)                  # one pass over calibration tokens
quantize(model, MixedQuantConfig(), stats)             # packed INT4 weights, in place
save_quantized(model, folder); model = load_quantized(folder)
"""

from . import ops as ops  # loads the compiled kernels, so that torch.ops.mixedquant is there
from .calibration import collect_stats
from .checkpoint import load_quantized, save_quantized
from .config import MixedQuantConfig
from .convert import convert
from .errors import CheckpointError
from .fake_quant import quantize_model
from .folding import fold_permutations
from .linear import W4A4Linear
from .quantize import quantization_report, quantize
from .registration import register
from .smooth import smooth_lm

__version__ = "0.1.0"

register()  # AutoModelForCausalLM.from_pretrained(..., quantization_config=MixedQuantConfig())

__all__ = [
    "CheckpointError",
    "MixedQuantConfig",
    "W4A4Linear",
    "__version__",
    "collect_stats",
    "convert",
    "fold_permutations",
    "load_quantized",
    "quantization_report",
    "quantize",
    "quantize_model",
    "save_quantized",
    "smooth_lm",
]
