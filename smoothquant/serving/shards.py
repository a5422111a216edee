"""Slices of packed layers for tensor parallelism. Knows no serving engine.

Of T parts, each holds a slice of every layer. A *column-parallel* layer (q, k, v, gate, up) is cut
by output channels: whole panels of 16; the outputs of the parts are concatenated. A *row-parallel*
layer (the linears after attention and after the activation) is cut by input channels: whole blocks
of the quantizer's `tp_blocks`; the outputs are added, and its bias belongs to one part only.

Linears that read the same input are taken to be one layer in the engine, as q, k and v are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.folder import open_quantized
from ..core.errors import CheckpointError
from ..kernels import ops
from ..kernels.layout import divides_evenly
from ..layers.linear import QuantizedLinear
from ..models.families import ATTENTION_INPUTS, known_inputs

ZERO_CODES = 0x88  # a byte of qweight that holds two codes 0
SIZES = (1, 2, 4, 8)  # numbers of parts that `parallel_sizes` tries


def share(rows: int, heads: int, part: int, parts: int) -> tuple[int, int]:
    """The output channels [start, stop) of one part.

    Args:
        rows: number of output channels.
        heads: number of equal heads that they consist of; `rows` if they may be cut anywhere.
            Parts beyond the number of heads get copies, as is usual for k and v.
        part: in [0, parts).
    """
    distinct = min(parts, heads)
    size, index = rows // distinct, part * distinct // parts
    return index * size, (index + 1) * size


def output_slice(key: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """The part of a layer's tensor that belongs to the output channels [start, stop).

    Args:
        key: the tensor's key in the layer's state dict. Every slice has the whole `perm`.
        tensor: bias [N], perm [K], or a packed tensor [ceil(N / 16), ...].
        start, stop: multiples of 16, except for a bias and a stop at N.

    Returns:
        A view.
    """
    if key == "perm":
        return tensor
    if key == "bias":
        return tensor[start:stop]
    return tensor[start // ops.PANEL : -(-stop // ops.PANEL)]


def input_slice(key: str, tensor: Tensor, num_salient: int, part: int, parts: int) -> Tensor:
    """The part of a layer's tensor that belongs to the input channels of one part.

    Channel c of the slice is channel ``c + part K / parts`` of the layer.

    Args:
        key: the tensor's key in the layer's state dict.
        tensor: perm int32 [K], a packed tensor [P, B, 64] or [P, C, 16], or one that belongs to
            all input channels: salient_scales [P, 16] or bias [N].
        num_salient: K_s of the layer.
        part: in [0, parts); parts is a number without a `channels_fault`.

    Returns:
        A view, or a new perm.

    Raises:
        CheckpointError: perm takes a channel from one part to another.
    """
    if key in ("salient_scales", "bias"):
        return tensor
    if key != "perm":
        return tensor.chunk(parts, dim=1)[part] if tensor.shape[1] else tensor
    k4, size = len(tensor) - num_salient, len(tensor) // parts
    perm = torch.cat([channels.chunk(parts)[part] for channels in tensor.split([k4, num_salient])
                      if len(channels)])  # fmt: skip
    perm = perm - part * size
    if not torch.equal(perm.sort().values, torch.arange(size, dtype=perm.dtype)):
        raise CheckpointError(
            f"perm takes channels from one of {parts} parts to another: quantize with "
            f"tp_blocks={parts}"
        )
    return perm


def rows_fault(rows: int, heads: int, parts: int, *, fused: bool) -> str:
    """Why output channels cannot be cut into parts; "" if they can.

    Args:
        rows, heads: as in `share`.
        fused: they are only some of the output channels of the engine's layer.
    """
    distinct = min(parts, heads)
    if parts % distinct or heads % distinct:
        return f"its {heads} heads cannot be cut into {parts} equal parts"
    size, remainder = divmod(rows, distinct)
    if remainder or ((fused or distinct > 1) and size % ops.PANEL):
        return f"{rows} output channels do not fill panels of {ops.PANEL} in {parts} parts"
    return ""


def channels_fault(layer: QuantizedLinear, parts: int) -> str:
    """Why the input channels of a layer cannot be cut into parts; "" if they can."""
    config, salient = layer.config, layer.num_salient
    k4 = layer.in_features - salient
    if parts == 1:
        return ""
    if config.act_quant == "per_token":
        return "act_quant='per_token' gives all input channels one scale"
    if salient % parts or not divides_evenly(k4, layer.group_size, parts):
        return (
            f"{k4} INT4 channels in groups of {layer.group_size}, and {salient} salient ones, "
            f"cannot be cut into {parts} parts of whole groups in whole blocks of "
            f"{ops.BLOCK_BYTES} bytes: quantize with tp_blocks={parts}"
        )
    if config.tp_blocks % parts and not (config.sort == "none" and salient in (0, k4 + salient)):
        return f"its channels are in tp_blocks={config.tp_blocks}: quantize with tp_blocks={parts}"
    return ""


def parallel_sizes(folder: str | os.PathLike, sizes: Sequence[int] = SIZES) -> dict[int, str]:
    """{T: why the model of a folder cannot be served in T parts; "" if it can}, for T in `sizes`.

    Reads no tensor.

    Raises:
        ValueError, CheckpointError: as `smoothquant.checkpoints.folder.open_quantized`.
    """
    return parallel_faults(open_quantized(folder).model, sizes)


def parallel_faults(model: nn.Module, sizes: Sequence[int] = SIZES) -> dict[int, str]:
    """`parallel_sizes` for a quantized model, which may be on meta."""
    return {parts: next(_faults(model, parts), "") for parts in sizes}


def _faults(model: nn.Module, parts: int) -> Iterator[str]:
    config: Any = getattr(model, "config", None)
    inputs = known_inputs(model)
    if parts > 1 and not inputs:
        yield f"no row in the table of families describes {type(model).__name__}"
    heads = getattr(config, "num_attention_heads", parts)
    if heads % parts:
        yield f"its {heads} attention heads cannot be cut into {parts} equal parts"
    if parts > 1 and any(item.experts for item in inputs):
        yield "experts are not cut"
    for item in inputs:
        for name in item.linears:
            layer = model.get_submodule(name)
            if not isinstance(layer, QuantizedLinear):
                continue
            if layer.config.backend != "int4":
                yield f"{name}: backend={layer.config.backend!r} has no packed weights"
            elif item.made_by:
                fault = channels_fault(layer, parts)
                if fault:
                    yield f"{name}: {fault}"
            elif parts > 1 and name.endswith(".query_key_value"):
                yield f"{name}: its q, k and v are stored head by head"
            else:
                pieces = list(_pieces(name, layer.out_features, config))
                fused = len(item.linears) > 1 or (len(pieces) > 1 and parts > 1)
                for rows, units in pieces:
                    fault = rows_fault(rows, units, parts, fused=fused)
                    if fault:
                        yield f"{name}: {fault}"


def _pieces(name: str, rows: int, config: Any) -> Iterator[tuple[int, int]]:
    """(output channels, heads) of everything that engines cut by itself in a linear."""
    leaf = name.rpartition(".")[2]
    if leaf == "gate_up_proj":
        yield from [(rows // 2, rows // 2)] * 2
    elif leaf not in ATTENTION_INPUTS:
        yield rows, rows
    else:
        heads = config.num_attention_heads
        values = getattr(config, "num_key_value_heads", None) or heads
        if leaf == "qkv_proj":
            size = rows // (heads + 2 * values)
            yield from ((size * number, number) for number in (heads, values, values))
        else:
            yield rows, heads if leaf == "q_proj" else values
