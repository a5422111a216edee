"""Fold a layer's channel permutation into the layers that produce its input.

A permuted layer gathers its input channels at run time. If these channels are output channels of
earlier linears, the rows of those linears can be permuted once instead, which removes the gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, is_quantized
from ..models.families import LayerInput, known_inputs, value_rows
from ..models.routing import expert_activation


@torch.no_grad()
def fold_permutations(model: nn.Module) -> list[str]:
    """Fold the permutations of layer inputs into the layers that produce them, in place.

    Only rows move; nothing is rounded again and the logits do not change.

    In models that `smoothquant.models.families` has a row for, this folds
      - inputs computed elementwise from the outputs of linears: those of down_proj, fc2,
        dense_4h_to_h and the down_proj of fused experts. The gather becomes the identity, or with
        ``tp_blocks`` > 1 a compaction, so that channels stay in their block;
      - attention outputs, with separate or fused q, k and v, if the model was quantized with
        ``sort_within_heads=True``. The gather becomes a compaction (the INT4 channels, then the
        salient ones, each in natural order), or the identity without salient channels.
    It does not fold inputs produced by a norm or by a layer with ``quantize_output``, whose groups
    run along its output channels, nor layers that the model has under several names.

    Logits are bit-identical as long as torch computes a value independently of its position. Some
    functions (silu, tanh) and matrix products treat the last columns differently if these do not
    fill a vector register. A key-value cache filled before folding is invalid afterwards.

    Returns:
        Names of the layers whose gather became the identity or a compaction.

    Raises:
        ValueError: the model is not quantized.
    """
    if not is_quantized(model):
        raise ValueError(f"model must be quantized; got {type(model).__name__}")
    modules = dict(model.named_modules())
    return [item.name for item in _foldable_inputs(model, modules) if _fold(item, modules)]


def _foldable_inputs(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[LayerInput]:
    """Inputs produced by linears, where all layers involved have a single name."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for item in known_inputs(model):
        items = [item] if item.made_by else []
        experts = modules.get(item.experts) if item.experts else None
        if isinstance(experts, W4A4Experts):
            for expert in range(experts.num_experts):
                maker, reader = (item.expert_linear(expert, part) for part in experts.parts)
                items.append(LayerInput(reader, None, (reader,), item.experts, made_by=(maker,)))
        for candidate in items:
            layers = (*candidate.linears, *candidate.made_by)
            if all(uses[id(modules[name])] == 1 for name in layers):
                yield candidate


def _fold(item: LayerInput, modules: Mapping[str, nn.Module]) -> bool:
    """Fold the order of one input into the layers that produce it; returns whether it could."""
    reader, makers = modules[item.name], []
    for name in item.made_by:
        maker = modules[name]
        if not isinstance(maker, QuantizedLinear) or maker.quantize_output:
            return False
        makers.append(maker)
    if not isinstance(reader, QuantizedLinear):
        return False
    order = _order_in_blocks(reader, item.num_heads or reader.config.tp_blocks)
    if order is None:
        return False
    sources = []
    for maker in makers:
        rows = _source_rows(item, order, maker.out_features)
        experts = modules.get(item.experts or "")
        if isinstance(experts, W4A4Experts):
            rows = _expert_rows(experts, item, order, maker.out_features)
        if rows is None:
            return False
        sources.append(rows)
    for maker, rows in zip(makers, sources, strict=True):
        maker.reorder_outputs(rows)
    natural = torch.arange(reader.in_features).view_as(order)
    int4 = natural.shape[1] - reader.num_salient // len(natural)
    compaction = torch.cat([natural[:, :int4].flatten(), natural[:, int4:].flatten()])
    reader.perm = compaction.to(reader.perm)
    return True


def _order_in_blocks(reader: QuantizedLinear, blocks: int) -> Tensor | None:
    """The order of a layer's input channels within equal blocks, salient channels last.

    Returns:
        int64 [blocks, width], or None if channels cross blocks or are in natural order already.
    """
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


def _expert_rows(
    experts: W4A4Experts, item: LayerInput, order: Tensor, out_features: int
) -> Tensor | None:
    """`_source_rows` of an expert, whose gate and up channels may alternate.

    None if the activation of the experts turns out not to work channel by channel.
    """
    blocks, width = order.shape
    channels = (order + width * torch.arange(blocks)[:, None]).flatten()
    y = torch.randn(4, out_features, generator=torch.Generator().manual_seed(0))
    made = expert_activation(experts.float_experts, y)[:, channels]
    for interleaved in (False, True):
        rows = _source_rows(item, order, out_features, interleaved)
        if rows is not None:
            moved = expert_activation(experts.float_experts, y[:, rows])
            if torch.allclose(moved, made, rtol=1e-4, atol=1e-6):
                return rows
    return None


def _source_rows(
    item: LayerInput, order: Tensor, out_features: int, interleaved: bool = False
) -> Tensor | None:
    """The rows that a layer must take its output channels from to produce them in `order`.

    Args:
        interleaved: the rows that a channel is made from follow each other; else they are as many
            rows apart as there are channels.

    Returns:
        int64 [N], or None if the sizes do not match or heads that share a head of v have different
        orders.
    """
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
        if interleaved:
            rows = torch.arange(out_features).view(-1, parts).T.reshape(-1, width)
    sources = torch.arange(out_features)
    sources[rows] = rows.gather(1, order)
    return sources
