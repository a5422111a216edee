"""The size of a model by kind of tensor, before and after `smoothquant.quantize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..layers.experts import W4A4Experts
from ..layers.int8 import blank_table
from ..layers.linear import QuantizedLinear, linear_class
from ..models.families import known_inputs
from ..models.kept import output_heads
from ..models.linears import is_linear
from ..models.modules import distinct_tensors, module_copy, module_places, replace_module
from ..models.routing import is_fused_experts
from ..models.tables import find_tables
from ..quantization.checks import checked_groups
from ..quantization.tables import insert_table, table_group

# {tensor of a quantized linear: its kind}
PARTS_OF_LINEAR = {
    "qweight": "4-bit codes",
    "scales": "scales",
    "salient_weight": "salient weights",
    "salient_scales": "salient weights",
    "perm": "permutations",
    "simulated_weight": "simulated weights",
    "bias": "biases",
}


def bytes_by_kind(model: nn.Module, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The size of a model by kind of tensor: {kind: bytes}. Shared tensors count once.

    Args:
        sizes: {name of a distinct tensor: bytes}; None takes the sizes of the model's own tensors.
    """
    if sizes is None:
        sizes = {name: tensor.nbytes for name, tensor in distinct_tensors(model)[0].items()}
    items = known_inputs(model)
    heads, routers = output_heads(model), {item.router for item in items}
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds: Counter[str] = Counter()
    for name, size in sizes.items():
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        if isinstance(module, QuantizedLinear):
            kind = PARTS_OF_LINEAR[leaf]
            if module.table and leaf != "bias":
                kind = "embeddings" if block.endswith(".packed") else "output head"
        elif isinstance(module, nn.Embedding):
            kind = "embeddings"
        elif leaf == "bias" or (leaf.endswith("_bias") and is_fused_experts(module)):
            kind = "biases"
        elif block in heads:
            kind = "output head"
        elif is_fused_experts(module) or (is_linear(module) and block not in routers):
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
    """Predict `bytes_by_kind` of a float model after `quantize`, without changing or packing it.

    Args:
        model, config, stats: as for `quantize`.
        stats_to_come: the model is going to be calibrated. Inputs without statistics or weight
            values then count with the average share of salient channels.

    Raises:
        ValueError, TypeError: as `quantize`.
    """
    groups = checked_groups(model, config, stats, stats_to_come=stats_to_come)
    tables = find_tables(model, config).quantized
    config = config.settled()  # searched options do not change the size
    planned = module_copy(model)
    places = module_places(planned)
    blocks: dict[str, dict[tuple[int, str], nn.Module]] = {}
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
                block, expert, part = group.expert
                blocks.setdefault(block, {})[expert, part] = layer
            else:
                replace_module(planned, name, layer, places)
    for table in tables:
        group = table_group(model, table, config, stats)
        weight, bias = group.matrix(model, group.name)
        n, k = weight.shape
        blank = blank_table(
            table.kind,
            k,
            n,
            config,
            bias=bias is not None,
            num_salient=group.num_salient,
            dtype=weight.dtype,
            device="meta",
        )
        insert_table(planned, table, blank, places)
    for name, layers in blocks.items():
        replace_module(planned, name, W4A4Experts(layers, model.get_submodule(name)), places)
    return bytes_by_kind(planned)
