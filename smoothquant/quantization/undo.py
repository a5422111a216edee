"""Turn a quantized model back into floats: dequantize it, or simulate its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.tensors import is_finite
from ..layers.decoder import unfuse
from ..layers.embedding import QuantizedEmbedding
from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, W4A4Linear
from ..models.linears import is_linear, linear_weight, set_linear_weight
from ..models.modules import is_transformers_model, module_copy, module_places, replace_module
from ..models.routing import set_expert_matrices, without_weights
from ..models.tables import embedding_scale
from .checks import WEIGHT_DTYPES

# Where a model keeps its own `_tied_weights_keys` while tied weights are quantized.
FLOAT_TIES = "_mixedquant_tied_weights_keys"


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a quantized model back into a float model, in place.

    Each quantized layer becomes a linear with the weight that its codes represent: of the class
    that the transformers model uses there, or else nn.Linear. W4A4Experts become the model's own
    fused experts.

    Activations and outputs are no longer quantized. What was folded into norms and other layers
    (smoothing, permutations) stays there, which does not change what the model computes.

    Args:
        model: a quantized model of either backend.
        dtype: dtype of the weights; None uses that of the model's first parameter. float16 and
            bfloat16 round the weights.

    Raises:
        ValueError: the model is not quantized, has embeddings of an unknown class that scale their
            rows, or has a weight beyond the range of `dtype`. The model is unchanged.
        TypeError: `dtype` is not float32, float16 or bfloat16. The model is unchanged.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError(f"model must be quantized; got {type(model).__name__}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.dtype in WEIGHT_DTYPES), None)
        dtype = dtype or torch.float32
    elif dtype not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, W4A4Experts)}
    _restore(model, layers, blocks, dtype)
    unfuse(model)
    for name in ("mixedquant_config", "mixedquant_report", "mixedquant_unreached"):
        vars(model).pop(name, None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


@torch.no_grad()
def dequantize_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """As `dequantize`, but only the output head and the embeddings."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.table
    }
    if layers:
        _restore(model, layers, {}, dtype)


def _restore(
    model: nn.Module,
    layers: dict[str, QuantizedLinear],
    blocks: dict[str, W4A4Experts],
    dtype: torch.dtype,
) -> None:
    """Replace quantized layers and blocks of experts by float ones, and tie float tables as the
    model does. layers: by name, with those in the blocks; emptied."""
    originals, places = float_modules(model), module_places(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedEmbedding) and module.embed_scale is not None:
            original: Any = originals.get(name)
            if original is None or embedding_scale(original)[0] != module.embed_scale:
                raise ValueError(
                    f"cannot restore {name} of {type(model).__name__}, which multiplies rows by "
                    f"{module.embed_scale:g}: its float class is unknown"
                )
    if dtype == torch.float16:  # find weights beyond its range before anything changes
        for name, layer in layers.items():
            _float_weight(name, layer, dtype)
    for name, block in blocks.items():
        fused = without_weights(block.float_experts)
        for part in block.parts:
            names = [f"{name}.{expert}.{part}" for expert in range(block.num_experts)]
            biases = [
                b.to(dtype) for b in (layers[matrix].bias for matrix in names) if b is not None
            ]
            weights = [_float_weight(matrix, layers.pop(matrix), dtype) for matrix in names]
            set_expert_matrices(fused, part, weights, biases)
            del weights
        replace_module(model, name, fused, places)
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding)}
    linears = {
        module: name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear) and name.rpartition(".")[0] not in embeddings
    }
    while layers:
        name, layer = layers.popitem()
        weight = nn.Parameter(_float_weight(name, layer, dtype))
        readers = [name for name, module in embeddings.items() if module.packed is layer]
        if layer in linears:
            name = linears.pop(layer)
            replace_module(model, name, _restored(layer, originals.get(name), weight), places)
        for name in readers:
            embedding = embeddings.pop(name).restored(originals.get(name), weight)
            replace_module(model, name, embedding, places)
        del layer
    vars(model).pop("resize_token_embeddings", None)
    for module in model.modules():
        keys = vars(module).pop(FLOAT_TIES, None)
        if keys is not None:
            vars(module)["_tied_weights_keys"] = keys
            tied: Any = model
            tied.all_tied_weights_keys = tied.get_expanded_tied_weights_keys(all_submodels=True)


def _restored(layer: QuantizedLinear, linear: Any, weight: nn.Parameter) -> nn.Module:
    """A float linear with this weight and the layer's bias: `linear`, if it fits."""
    if not is_linear(linear) or linear_weight(linear).shape != weight.shape:
        n, k = weight.shape
        linear = nn.Linear(k, n, bias=layer.bias is not None, device="meta")
    set_linear_weight(linear, weight)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.to(weight.dtype))
    linear.register_parameter("bias", bias)
    return linear


def _float_weight(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    weight = layer.dequantize().to(dtype)
    if not is_finite(weight):
        raise ValueError(f"weight of {name} is beyond the range of {dtype}")
    return weight


def float_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The float modules of a transformers model, on the meta device; {} for any other model."""
    if not is_transformers_model(model):
        return {}
    model_class: Any = type(model)
    with torch.device("meta"):
        return dict(model_class(model.config).named_modules())


def simulate(model: nn.Module) -> None:
    """Replace each packed layer by its simulation, in place.

    A simulation has the same codes and computes in the model's dtype: only the arithmetic differs.
    """
    places = module_places(model)
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, W4A4Linear):
            replace_module(model, name, module.simulated(dtype), places)


def simulated_copy(model: nn.Module) -> nn.Module:
    """A simulated copy of a packed model. It shares all tensors except those of packed layers."""
    copied = module_copy(model)
    simulate(copied)
    return copied
