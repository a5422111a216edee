"""The size of a model, counted or estimated."""

from torch import Tensor, nn

from .config import check_integer, check_real
from .linear import QuantizedLinear

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

    By default the bytes of the tensors that a checkpoint holds are counted: parameters and
    persistent buffers, shared ones once. The other arguments are not needed for that.

    Args:
        model: any module, quantized or not.
        data_width: estimate only: bits of a quantized element.
        salient_prop: estimate only: share of elements that take 16 bits, in [0, 1].
        group_size: estimate only: elements that share 20 bits of scale and zero-point; -1 for none.
        estimate: the published formula over the model's weights and biases instead of a count; it
            does not depend on whether they are quantized yet.

    Raises:
        ValueError: a group size that is neither -1 nor >= 1, a share outside [0, 1].
    """
    check_real("salient_prop", salient_prop, 0, 1)
    check_real("data_width", data_width, 0, 64)
    if group_size != -1:
        check_integer("group_size", group_size, 1)
    if not estimate:
        return sum(tensor.nbytes for tensor in distinct_tensors(model)[0].values()) * Byte
    overhead = 0 if group_size == -1 else (16 + 4) / group_size
    width = (data_width + overhead) * (1 - salient_prop) + (16 + overhead) * salient_prop
    elements = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            bias = 0 if module.bias is None else module.bias.numel()
            elements += module.out_features * module.in_features + bias
    return elements * width


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a checkpoint of the model holds, shared tensors once.

    Returns:
        ({name: parameter or persistent buffer}, {other name of a shared tensor: its first name}).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        in_memory = tensor.numel() > 0 and tensor.device.type != "meta"
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place if in_memory else id(tensor), name)
        if owner == name:
            tensors[name] = tensor
        else:
            aliases[name] = owner
    return tensors, aliases
