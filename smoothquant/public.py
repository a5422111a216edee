"""All public names of the package."""

from typing import TYPE_CHECKING

from .calibration.collect import collect_stats
from .calibration.stats_files import load_stats
from .checkpoints.conversion import convert
from .checkpoints.folder import load_quantized, save_quantized
from .core.config import MixedQuantConfig
from .core.errors import CheckpointError
from .fake_quant import quantize_model
from .in_memory import quantize
from .kernels import ops as ops
from .layers.linear import W4A4Linear
from .quantization.folding import fold_permutations
from .quantization.records import quantization_report
from .quantization.smoothing import smooth_lm
from .quantization.undo import dequantize

if TYPE_CHECKING:
    from .layers.cache import QuantizedKVCache

__all__ = [
    "CheckpointError",
    "MixedQuantConfig",
    "QuantizedKVCache",
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


def __getattr__(name: str) -> object:
    if name != "QuantizedKVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .layers.cache import QuantizedKVCache  # it imports transformers

    return QuantizedKVCache
