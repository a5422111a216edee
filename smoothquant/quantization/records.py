"""What became of each parameter of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.linear import QuantizedLinear
from ..models.families import LayerInput, known_inputs, output_heads


@dataclass(frozen=True)
class LinearRecord:
    """What became of one weight matrix, or of another parameter.

    name: full name of the module, or of one expert's matrix; of a bias or whatever is no module's
        weight, its own.
    shape: (N, K) of a quantized matrix.
    num_salient: input channels kept in 16 bits inside a quantized matrix.
    bits_per_weight: of all its tensors but the bias.
    action: "quantized" or "kept".
    reason: why it was kept, or what its channels were chosen by.
    """

    name: str
    shape: tuple[int, ...]
    num_salient: int
    bits_per_weight: float
    action: str
    reason: str


def quantization_report(model: nn.Module) -> list[LinearRecord]:
    """A record for every parameter of a quantized model, the quantized ones first: what `quantize`
    gave, or of a model that was loaded quantized what can be seen of it."""
    known = getattr(model, "mixedquant_report", None)
    if known is not None:
        return known
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        raise ValueError(f"model must be a quantized one; got {type(model).__name__}")
    quantized = [quantized_record(name, layer, "as stored") for name, layer in layers]
    return quantized + kept_records(model, known_inputs(model))


def quantized_record(name: str, layer: QuantizedLinear, chosen_by: str) -> LinearRecord:
    shape = (layer.out_features, layer.in_features)
    held = sum(tensor.nbytes for key, tensor in layer.state_dict().items() if key != "bias")
    bits = 8 * held / max(1, shape[0] * shape[1])
    return LinearRecord(name, shape, layer.num_salient, bits, "quantized", chosen_by)


def kept_records(model: nn.Module, items: Sequence[LayerInput]) -> list[LinearRecord]:
    heads = output_heads(model)
    routers = {item.router for item in items}
    kept = []

    def keep(name: str, tensor: Tensor, reason: str) -> None:
        short, bits = name.removesuffix(".weight"), 8.0 * tensor.element_size()
        kept.append(LinearRecord(short, tuple(tensor.shape), 0, bits, "kept", reason))

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        reason = f"parameter of {type(module).__name__}"
        if leaf == "bias":
            reason = "bias"
        elif isinstance(module, nn.Embedding):
            reason = "embedding"
        elif isinstance(module, nn.Linear):
            reason = "output head" if block in heads else "not in the table of families"
        elif leaf == "weight" and block in routers:
            reason = "router"
        elif parameter.dim() == 3:
            reason = "fused parameter without a row in the table of families"
        keep(name, parameter, reason)
    for block, module in modules.items():
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            keep(f"{block}.bias", module.bias, "bias")
    return kept
