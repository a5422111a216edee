"""Folding: the order of a layer's input channels moved into the layers that make this input.

A permuted layer gathers its input, token by token. Where each channel of the input comes from
certain output channels of earlier linears, these can stand in the permuted order from the
beginning: rows of weights move once, and nothing is left to gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, is_quantized
from ..models.families import LayerInput, known_inputs, value_rows
from ..models.routing import PARTS


@torch.no_grad()
def fold_permutations(model: nn.Module) -> list[str]:
    """Move the permutations of layer inputs into the output channels of the layers that make them,
    in place: data moves, nothing is rounded, and logits stay as they are.

    Folded are, where `smoothquant.models.families` has a row for the model,
      - inputs that are made elementwise: of down_proj, fc2, dense_4h_to_h, and of the down_proj of
        fused experts. The gather becomes the identity; with ``tp_blocks`` > 1 a compaction, so
        that each part of the channels stays where it is;
      - outputs of attention, separate or fused q, k and v, if the model was quantized with
        ``sort_within_heads=True``. The gather becomes a compaction: the INT4 channels, then the
        salient ones, either in natural order; the identity without salient channels.
    Left as they are: what a norm makes; what a layer with ``quantize_output`` makes, whose groups
    run along its output channels; and layers that the model has under several names.

    Logits keep their bits as far as torch gives a value the same bits wherever it stands: some of
    its functions (silu, tanh) and matrix products treat the last columns, where they fill no
    vectors, otherwise. A key-value cache filled before does not fit a folded model.

    Returns:
        Names of the layers whose gather became the identity or a compaction.

    Raises:
        ValueError: the model is not quantized.
    """
    if not is_quantized(model):
        raise ValueError(f"model must be quantized; got {type(model).__name__}")
    modules = dict(model.named_modules())
    return [item.name for item in _made_inputs(model, modules) if _fold(item, modules)]


def _made_inputs(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[LayerInput]:
    """Inputs of linears that other linears make, of layers with one name only."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for item in known_inputs(model):
        items = [item] if item.made_by else []
        if isinstance(modules.get(item.experts), W4A4Experts):
            for expert in range(modules[item.experts].num_experts):
                maker, reader = (item.expert_linear(expert, part) for part in PARTS)
                items.append(LayerInput(reader, None, (reader,), None, None, 0.0, (maker,)))
        for made in items:
            if all(names[id(modules[name])] == 1 for name in (*made.linears, *made.made_by)):
                yield made


def _fold(item: LayerInput, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the order of an input could be moved into the layers that make it."""
    reader, makers = modules[item.name], [modules[name] for name in item.made_by]
    if not all(isinstance(layer, QuantizedLinear) for layer in (reader, *makers)):
        return False
    if any(maker.quantize_output for maker in makers):
        return False
    order = _order_in_blocks(reader, item.num_heads or reader.config.tp_blocks)
    moved = [None if order is None else _moved(item, order, m.out_features) for m in makers]
    if any(rows is None for rows in moved):
        return False
    for maker, rows in zip(makers, moved, strict=True):
        maker.reorder_outputs(rows)
    natural = torch.arange(reader.in_features).view_as(order)
    int4 = natural.shape[1] - reader.num_salient // len(natural)
    compaction = torch.cat([natural[:, :int4].flatten(), natural[:, int4:].flatten()])
    reader.perm = compaction.to(reader.perm)
    return True


def _order_in_blocks(reader: QuantizedLinear, blocks: int) -> Tensor | None:
    """The order of a layer's input channels inside each of some equal blocks, the salient ones
    last: int64 [blocks, width]; None where channels cross blocks, or nothing needs to move."""
    k, num_salient = reader.in_features, reader.num_salient
    if k % blocks or num_salient % blocks:
        return None
    width, salient = k // blocks, num_salient // blocks
    perm = reader.perm.long().cpu()
    int4_part = perm[: k - num_salient].view(blocks, width - salient)
    salient_part = perm[k - num_salient :].view(blocks, salient)
    order = torch.cat([int4_part, salient_part], dim=1) - width * torch.arange(blocks)[:, None]
    inside = ((order >= 0) & (order < width)).all()
    return order if inside and (order != torch.arange(width)).any() else None


def _moved(item: LayerInput, order: Tensor, out_features: int) -> Tensor | None:
    """Where a layer that makes the input must take its output channels from, int64 [N]; None where
    its sizes do not fit, or heads that share a head of v have different orders."""
    blocks, width = order.shape
    if item.num_heads:
        rows = value_rows(item, blocks * width, out_features)
        if rows is None:
            return None
        by_value = order.view(len(rows), -1, width)
        if (by_value != by_value[:, :1]).any():
            return None
        order = by_value[:, 0]
    else:
        parts, rest = divmod(out_features, blocks * width)
        if rest:
            return None
        rows, order = torch.arange(out_features).view(-1, width), order.repeat(parts, 1)
    moved = torch.arange(out_features)
    moved[rows] = rows.gather(1, order)
    return moved
