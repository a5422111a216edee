"""Quantize output heads and embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig, table_config
from ..layers.embedding import QuantizedEmbedding
from ..layers.int8 import Int8Linear
from ..layers.linear import QuantizedLinear, linear_class
from ..models.families import LayerInput
from ..models.modules import Places, module_places, replace_module
from ..models.tables import Table
from .pipeline import Group, channel_plan, with_shares
from .records import LinearRecord, quantized_record


def table_group(
    model: nn.Module,
    table: Table,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None,
) -> Group:
    """The weight of a table as a group, with its number of salient channels.

    Args:
        config: the model's.
        stats: by names of linears, perhaps with those of the output head; or None.
    """
    name = table.head or table.embeddings[0]
    entry = stats.get(table.head) if stats and table.head else None
    group = Group(LayerInput(name, None, (name,)), (name,), entry)
    k = group.matrix(model, name)[0].shape[1]
    (group,) = with_shares(model, [group], table_config(config, table.kind, k))
    return group


def pack_table(
    model: nn.Module,
    table: Table,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None,
) -> LinearRecord:
    """Quantize a table of a float model in place.

    Args:
        config, stats: as for `table_group`.
    """
    group = table_group(model, table, config, stats)
    weight, bias = group.matrix(model, group.name)
    config, reason = table_config(config, table.kind, weight.shape[1]), ""
    layer: QuantizedLinear
    if table.kind == "int8":
        per_group = config.act_quant == "per_group"
        act_quant = "per_group" if per_group else "per_token"
        packed = dataclasses.replace(config, backend="int4", num_bits=4, act_quant=act_quant)
        layer = Int8Linear.from_weight(weight, bias, packed)
        if config.backend == "fake":
            layer = layer.simulated(weight.dtype)
            layer.config = config
    else:
        plan, chosen_by = channel_plan(group, [(weight, bias)], config)
        layer = linear_class(config).from_weight(weight, bias, config, plan)
        reason = f": {chosen_by}"
    insert_table(model, table, layer, module_places(model))
    return quantized_record(table.name, layer, f"{table.what}, {table.kind}{reason}")


def insert_table(model: nn.Module, table: Table, layer: QuantizedLinear, places: Places) -> None:
    """Put a packed weight in the place of a head and into that of embeddings."""
    layer.table = table.kind
    for name in table.embeddings:
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        replace_module(model, name, QuantizedEmbedding(embedding, layer), places)
    if table.head is not None:
        replace_module(model, table.head, layer, places)
