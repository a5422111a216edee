"""A quantized model as floats: dequantized, or its layers simulated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.tensors import is_finite
from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, W4A4Linear
from ..models.modules import is_transformers_model, module_copy, module_places, replace_module
from ..models.routing import PARTS
from .checks import WEIGHT_DTYPES


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a quantized model back into a plain one, in place: in each layer's place a linear of the
    weight that its codes stand for, in the place of W4A4Experts the model's own fused experts.
    Linears are of the class that a transformers model has for them, else nn.Linear.

    Activations are quantized no more (nor is what ``quantize_output`` names). What was folded into
    norms and rows of other layers stays: the model computes what its weights say.

    Args:
        model: quantized, by either backend; one with fused experts must be of transformers.
        dtype: of the weights; None for that of the model's first parameter. float16 and bfloat16
            round them.

    Raises:
        ValueError: the model is not quantized, its experts are of an unknown class, or a weight is
            beyond the dtype's range. TypeError: dtype is none of a model's. Nothing has been
            changed then.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError(f"model must be a quantized one; got {type(model).__name__}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.dtype in WEIGHT_DTYPES), None)
        dtype = dtype or torch.float32
    elif dtype not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, W4A4Experts)}
    originals, places = _float_modules(model), module_places(model)
    unknown = [name for name in blocks if name not in originals]
    if unknown:
        raise ValueError(
            f"{unknown[0]} of {type(model).__name__} has no float module to go back to"
        )
    if dtype == torch.float16:  # what is out of its range is found before anything is changed
        for name, layer in layers.items():
            _float_weight(name, layer, dtype)
    for name, block in blocks.items():
        fused = originals[name]
        for part in PARTS:
            names = [f"{name}.{expert}.{part}" for expert in range(block.num_experts)]
            weights = [_float_weight(each, layers.pop(each), dtype) for each in names]
            setattr(fused, part, nn.Parameter(torch.stack(weights)))
        replace_module(model, name, fused, places)
    while layers:
        name, layer = layers.popitem()
        shape, linear = (layer.out_features, layer.in_features), originals.get(name)
        if not isinstance(linear, nn.Linear) or linear.weight.shape != shape:
            linear = nn.Linear(*reversed(shape), bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(_float_weight(name, layer, dtype))
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
        replace_module(model, name, linear, places)
        del layer
    for name in ("mixedquant_config", "mixedquant_report"):
        vars(model).pop(name, None)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def _float_weight(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    weight = layer.dequantize().to(dtype)
    if not is_finite(weight):
        raise ValueError(f"weight of {name} is beyond the range of {dtype}")
    return weight


def _float_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a transformers model as it was built, without memory; none of another."""
    if not is_transformers_model(model):
        return {}
    with torch.device("meta"):
        return dict(type(model)(model.config).named_modules())


def simulate(model: nn.Module) -> None:
    """Put the simulation of each layer of a packed model, of the same codes and in the model's
    dtype, into its place: the arithmetic alone changes."""
    places = module_places(model)
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, W4A4Linear):
            replace_module(model, name, module.simulated(dtype), places)


def simulated_copy(model: nn.Module) -> nn.Module:
    """A copy of a packed model, simulated; it shares all tensors but those of the layers."""
    copied = module_copy(model)
    simulate(copied)
    return copied
