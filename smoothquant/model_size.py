"""The size of a model, measured or estimated."""

from __future__ import annotations

from torch import nn

from .core.config import check_integer, check_real
from .layers.linear import QuantizedLinear
from .models.modules import stored_bytes

Byte = 8
KiB = 1024 * Byte
MiB = 1024 * KiB
GiB = 1024 * MiB


def get_model_size(
    model: nn.Module,
    data_width: float = 16,
    salient_prop: float = 0,
    group_size: int = -1,
    *,
    estimate: bool = False,
) -> float:
    """The model's size in bits; divide by `MiB` or `GiB`.

    By default, this is the measured size of the tensors that a checkpoint stores: parameters and
    persistent buffers, with shared ones counted once. The arguments after `model` have no effect.

    Args:
        model: any module, quantized or not.
        data_width: bits of a quantized element (estimate only).
        salient_prop: fraction of elements that take 16 bits, in [0, 1] (estimate only).
        group_size: elements that share 20 bits of scale and zero-point; -1 for no groups (estimate
            only).
        estimate: apply the published formula to the number of weights and biases instead, whether
            they are quantized or not.

    Raises:
        ValueError: `group_size` is neither -1 nor >= 1, or `salient_prop` is outside [0, 1].
    """
    check_real("salient_prop", salient_prop, 0, 1)
    check_real("data_width", data_width, 0, 64)
    if group_size != -1:
        check_integer("group_size", group_size, 1)
    if not estimate:
        return stored_bytes(model) * Byte
    overhead = 0 if group_size == -1 else (16 + 4) / group_size
    width = (data_width + overhead) * (1 - salient_prop) + (16 + overhead) * salient_prop
    elements = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            bias = 0 if module.bias is None else module.bias.numel()
            elements += module.out_features * module.in_features + bias
    return elements * width
