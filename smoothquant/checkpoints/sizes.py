"""What a model's bytes are spent on, before and after `smoothquant.quantize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, linear_class
from ..models.families import known_inputs, output_heads
from ..models.modules import distinct_tensors, module_copy, module_places, replace_module
from ..quantization.checks import checked_groups

# What a quantized linear's tensors count as.
PARTS_OF_LINEAR = {
    "qweight": "4-bit codes",
    "scales": "scales",
    "salient_weight": "salient weights",
    "salient_scales": "salient weights",
    "perm": "permutations",
    "simulated_weight": "simulated weights",
    "bias": "biases",
}


def bytes_by_kind(model: nn.Module, held: Mapping[str, int] | None = None) -> dict[str, int]:
    """What a model's bytes are spent on: {kind: bytes}, shared tensors once.

    held: {tensor: bytes} of the distinct tensors, in the place of the model's own.
    """
    if held is None:
        held = {name: tensor.nbytes for name, tensor in distinct_tensors(model)[0].items()}
    items = known_inputs(model)
    heads, routers = output_heads(model), {item.router for item in items}
    fused = {item.experts for item in items}
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds: Counter[str] = Counter()
    for name, size in held.items():
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        if isinstance(module, QuantizedLinear):
            kind = PARTS_OF_LINEAR[leaf]
        elif isinstance(module, nn.Embedding):
            kind = "embeddings"
        elif leaf == "bias":
            kind = "biases"
        elif block in heads:
            kind = "output head"
        elif block in fused or (isinstance(module, nn.Linear) and block not in routers):
            kind = "float linears"
        else:
            kind = "norms and others"
        kinds[kind] += size
    return dict(kinds)


def planned_bytes(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None = None,
    *,
    stats_to_come: bool = False,
) -> dict[str, int]:
    """`bytes_by_kind` of what `quantize` would make of a float model, which stays as it is; the
    same errors for arguments that do not fit it. Nothing is packed.

    stats_to_come: the model will be calibrated; an input whose statistics or weights' values are
        not there counts with the average share of salient channels.
    """
    groups = checked_groups(model, config, stats, stats_to_come=stats_to_come)
    config = config.settled()  # what is found by trial takes no bytes
    planned = module_copy(model)
    places = module_places(planned)
    blocks: dict[str, dict[tuple[int, str], QuantizedLinear]] = {}
    for group in groups:
        for name, (weight, bias) in zip(group.names, group.matrices(model), strict=True):
            n, k = weight.shape
            layer = linear_class(config)(
                k,
                n,
                bias is not None,
                config=config,
                num_salient=group.num_salient,
                dtype=weight.dtype,
                device="meta",
            )
            if group.expert:
                blocks.setdefault(group.expert[0], {})[group.expert[1:]] = layer
            else:
                replace_module(planned, name, layer, places)
    for name, layers in blocks.items():
        experts = W4A4Experts(layers, model.get_submodule(name).act_fn)
        replace_module(planned, name, experts, places)
    return bytes_by_kind(planned)
