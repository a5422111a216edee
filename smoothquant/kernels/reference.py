"""The specification of every op in plain torch, written for reading, not for speed.

Names and arguments are those of :mod:`smoothquant.kernels.ops`. The C scalar kernels match this
module bit for bit, and every other instruction set matches the C scalar kernels bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import BLOCK_BYTES, PANEL, QUAD

if TYPE_CHECKING:
    from ..channels.statistics import ChannelStats

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def channel_stats_update(
    x: Tensor,
    count: Tensor,
    abs_max: Tensor,
    minimum: Tensor,
    abs_sum: Tensor,
    sq_sum: Tensor,
    argmax: Tensor,
) -> None:
    for row in x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1]):
        magnitude = row.abs()
        larger = magnitude > abs_max
        abs_max.copy_(torch.where(larger, magnitude, abs_max))
        argmax.copy_(torch.where(larger, count, argmax))
        minimum.copy_(torch.where(row < minimum, row, minimum))
        abs_sum += magnitude.double()
        sq_sum += row.double() * row.double()
        count += 1


def sort_keys(stats: ChannelStats, key: str) -> Tensor:
    count = stats.count.double()
    if count == 0:
        return torch.zeros_like(stats.sq_sum)
    if key == "argmax":
        return stats.argmax.double()
    if key == "max":
        return stats.abs_max.double()
    if key == "rms":
        return (stats.sq_sum / count).sqrt()
    mean = stats.abs_sum / count
    variance = stats.sq_sum / count - mean * mean
    return mean + 3.0 * torch.where(variance < 0, 0.0, variance).sqrt()


def argsort(keys: Tensor, descending: bool = False) -> Tensor:
    last = float("-inf") if descending else float("inf")
    is_nan = keys.isnan()
    order = torch.argsort(keys.masked_fill(is_nan, last), stable=True, descending=descending)
    return torch.cat([order[~is_nan[order]], order[is_nan[order]].sort().values])


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., G, g], with the last group padded with zeros."""
    k = x.shape[-1]
    group_size = max(1, min(group_size, k))
    groups = -(-k // group_size)
    padded = torch.zeros((*x.shape[:-1], groups * group_size), dtype=x.dtype)
    padded[..., :k] = x
    return padded.reshape(*x.shape[:-1], groups, group_size)


def _ungrouped(groups: Tensor, k: int) -> Tensor:
    return groups.flatten(-2)[..., :k]


def _scale(magnitude: Tensor, finite: Tensor, q_max: int) -> Tensor:
    scale = magnitude / torch.tensor(float(q_max))
    scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale)
    return torch.where(finite, scale, float("nan"))


def _codes(x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    usable = scale >= SMALLEST_NORMAL
    inverse = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
    low, high = torch.as_tensor(low).float(), torch.as_tensor(high).float()
    q = (torch.where(usable, x, 0.0) * inverse).clamp(low, high).round()
    return q.to(torch.int32)


def group_quantize(
    x: Tensor, group_size: int, num_bits: int = 4, is_unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    high = 2 ** (num_bits - (not is_unsigned)) - 1
    groups = _grouped(x.float(), group_size)
    finite = torch.isfinite(groups).all(-1, keepdim=True)
    safe = torch.where(finite, groups, 0.0)
    magnitude = safe.clamp(min=0) if is_unsigned else safe.abs()
    scale = _scale(magnitude.amax(-1, keepdim=True), finite, high)
    q = _codes(groups, scale, 0 if is_unsigned else -high, high)
    dtype = torch.uint8 if is_unsigned else torch.int8
    return _ungrouped(q, x.shape[-1]).to(dtype), scale.squeeze(-1)


def group_dequantize(
    q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    groups = _grouped(q.float(), group_size) * scales.unsqueeze(-1)
    return _ungrouped(groups, q.shape[-1]).to(dtype)


def quantize_activation(
    groups: Tensor, num_bits: int, act_format: str, clip: float, extent: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Tensor]:
    """int32 codes minus zero-points, and fp32 scales, of groups [..., g].

    Args:
        extent: dimensions that share a scale.
    """
    finite = torch.isfinite(groups)
    for dim in extent:
        finite = finite.all(dim, keepdim=True)
    safe = torch.where(finite, groups, 0.0)
    positive = safe.clamp(min=0).amax(extent, keepdim=True)
    negative = (-safe).clamp(min=0).amax(extent, keepdim=True)
    span = {
        "symmetric": torch.maximum(positive, negative),
        "unsigned": positive,
        "zero_point": positive + negative,
    }[act_format]
    levels = 2 ** (num_bits - (act_format == "symmetric")) - 1
    scale = _scale(torch.tensor(clip) * span, finite, levels)
    low = torch.full_like(scale, -levels if act_format == "symmetric" else 0)
    if act_format == "zero_point":
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        low = -(torch.tensor(clip) * negative * inverse).round().clamp(max=levels)
    high = levels if act_format == "symmetric" else levels + low
    return _codes(groups, scale, low, high), scale


def group_fake_quantize(
    x: Tensor,
    group_size: int,
    num_bits: int = 4,
    act_format: str = "symmetric",
    clip: float = 1.0,
) -> Tensor:
    codes, scale = quantize_activation(_grouped(x.float(), group_size), num_bits, act_format, clip)
    return _ungrouped(codes * scale, x.shape[-1]).to(x.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """[..., size] times the orthonormal Hadamard matrix, by butterflies; size is a power of two."""
    size, stride = x.shape[-1], 1
    while stride < size:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        stride *= 2
    return x * (1.0 / torch.tensor(float(size)).sqrt())


def group_hadamard(x: Tensor, group_size: int, rotation: int) -> Tensor:
    k, start, parts = x.shape[-1], 0, []
    while rotation > 1 and start < k:
        remaining, size = min(group_size - start % group_size, k - start), rotation
        while size > remaining:
            size //= 2
        parts.append(_hadamard(x[..., start : start + size].float()))
        start += size
    return torch.cat(parts, dim=-1).to(x.dtype) if parts else x.clone()


def _on_grid(values: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """The nearest code * scale. NaN stays NaN, and + 0.0 removes negative zeros."""
    inverse = torch.where(scale >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
    return ((values * inverse).clamp(-q_max, q_max).round() + 0.0) * scale


def gptq_block(
    w: Tensor, u: Tensor, scales: Tensor, col0: int, group_size: int, num_bits: int = 4
) -> Tensor:
    q_max = 2 ** (num_bits - 1) - 1
    errors = torch.zeros_like(w)
    for i in range(w.shape[1]):
        scale = scales[:, (col0 + i) // group_size]
        rounded = _on_grid(w[:, i], scale, q_max)
        errors[:, i] = (w[:, i] - rounded) / u[i, i]
        w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        w[:, i] = rounded
    return errors


def descend_block(
    w: Tensor,
    gradient: Tensor,
    h: Tensor,
    scales: Tensor,
    col0: int,
    group_size: int,
    num_bits: int = 4,
) -> None:
    q_max = 2 ** (num_bits - 1) - 1
    for i in range(w.shape[1]):
        scale = scales[:, (col0 + i) // group_size]
        rounded = _on_grid(w[:, i] + gradient[:, i] / h[i, i], scale, q_max)
        step = rounded - w[:, i]
        gradient[:, i:] -= step.unsqueeze(1) * h[i, i:]
        w[:, i] = rounded


def pack_nibbles(q: Tensor) -> Tensor:
    nibbles = torch.nn.functional.pad(q.to(torch.int32) & 15, (0, q.shape[-1] % 2))
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor, cols: int, is_unsigned: bool = False) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :cols]
    if is_unsigned:
        return nibbles
    return ((nibbles.to(torch.int32) ^ 8) - 8).to(torch.int8)


def weight_codes(
    w: Tensor,
    perm: Tensor,
    num_salient: int,
    group_size: int,
    rotation: int = 0,
    num_bits: int = 4,
    group_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """int32 codes [N, K4] of the INT4 channels in packed order, and bfloat16 scales [N, G]."""
    q_max = 2 ** (num_bits - 1) - 1
    k4 = w.shape[1] - num_salient
    w4 = group_hadamard(w.float()[:, perm.long()][:, :k4], group_size, rotation)
    groups = _grouped(w4, group_size)
    scale = groups.abs().amax(-1) / torch.tensor(float(q_max)) if k4 else torch.zeros(len(w), 0)
    if group_scales is not None:
        scale = group_scales
    scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale).bfloat16()
    return _ungrouped(_codes(groups, scale.float().unsqueeze(-1), -q_max, q_max), k4), scale


def salient_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K_s] and their bfloat16 scales [N, 1]."""
    largest = torch.nn.functional.pad(w.abs(), (0, 1)).amax(1, keepdim=True)  # 0 if K_s = 0
    scale = largest / torch.tensor(127.0)
    scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale).bfloat16()
    return _codes(w, scale.float(), -127, 127).to(torch.int8), scale


def salient_values(salient_weight: Tensor, salient_scales: Tensor | None) -> Tensor:
    """The dequantized salient weights, float32 [P, K_s, 16]."""
    values = salient_weight.float()
    return values if salient_scales is None else values * salient_scales.float().unsqueeze(1)


def pack_weight(
    w: Tensor,
    perm: Tensor,
    num_salient: int,
    group_size: int,
    rotation: int = 0,
    num_bits: int = 4,
    group_scales: Tensor | None = None,
    salient_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n, k = w.shape
    k4 = k - num_salient
    codes, scale = weight_codes(w, perm, num_salient, group_size, rotation, num_bits, group_scales)
    panels = -(-n // PANEL)

    def by_panel(matrix: Tensor, fill: float = 0) -> Tensor:
        """[N, C] -> [P, C, 16]"""
        padded = torch.full((panels * PANEL, matrix.shape[1]), fill, dtype=matrix.dtype)
        padded[:n] = matrix
        return padded.reshape(panels, PANEL, matrix.shape[1]).transpose(1, 2).contiguous()

    quads = []  # [P, 4, 16] each: the codes of four channels, plus 8
    for start in range(0, k4, group_size):
        group = by_panel(codes[:, start : min(start + group_size, k4)])
        for quad in group.split(QUAD, dim=1):
            full = torch.zeros(panels, QUAD, PANEL, dtype=torch.int32)
            full[:, : quad.shape[1]] = quad
            quads.append(full + 8)
    if len(quads) % 2:
        quads.append(torch.full((panels, QUAD, PANEL), 8, dtype=torch.int32))
    blocks = [even | odd << 4 for even, odd in zip(quads[::2], quads[1::2], strict=True)]
    qweight = torch.zeros(panels, len(blocks), BLOCK_BYTES, dtype=torch.uint8)
    for b, block in enumerate(blocks):
        qweight[:, b] = block.transpose(1, 2).reshape(panels, BLOCK_BYTES).to(torch.uint8)
    salient = w.float()[:, perm.long()][:, k4:]
    if salient_dtype != torch.int8:
        return qweight, by_panel(scale), by_panel(salient.to(salient_dtype)), None
    salient, row_scale = salient_codes(salient)
    return qweight, by_panel(scale), by_panel(salient), by_panel(row_scale).squeeze(1)


def unpack_weight(
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    out_features: int,
    group_size: int,
    rotation: int = 0,
) -> Tensor:
    k, num_salient = len(perm), salient_weight.shape[1]
    k4 = k - num_salient
    nibbles = torch.stack([qweight & 15, qweight >> 4], dim=2).to(torch.int32) - 8
    quads = nibbles.reshape(len(qweight), 2 * qweight.shape[1], PANEL, QUAD)
    columns, quad = [], 0
    for j, start in enumerate(range(0, k4, group_size)):
        channels = min(group_size, k4 - start)
        count = -(-channels // QUAD)
        group = quads[:, quad : quad + count].transpose(1, 2).flatten(2)
        columns.append(group[..., :channels].float() * scales[:, j].float().unsqueeze(-1))
        quad += count
    if columns:
        columns = [group_hadamard(torch.cat(columns, dim=-1), group_size, rotation)]
    columns.append(salient_values(salient_weight, salient_scales).transpose(1, 2))
    packed_order = torch.cat(columns, dim=-1).flatten(0, 1)[:out_features]
    w = torch.zeros(out_features, k)
    w[:, perm.long()] = packed_order
    return w


def unpack_rows(
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    rows: Tensor,
    out_features: int,
    group_size: int,
    rotation: int = 0,
) -> Tensor:
    packed = (qweight, scales, salient_weight, salient_scales, perm)
    return unpack_weight(*packed, out_features, group_size, rotation)[rows]


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 fused multiply-add: a * b + c, rounded once.

    The product is exact in float64. An inexact float64 sum is rounded to odd, so that its rounding
    to float32 still sees on which side of a tie the exact sum lies.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    # Round away from zero if the error has the sign of the sum, otherwise toward zero.
    away = (error > 0) == (total > 0)
    odd = torch.where(bits % 2 != 0, bits, torch.where(away, bits + 1, bits - 1))
    inexact = (error != 0) & torch.isfinite(total) & (total != 0)
    return torch.where(inexact, odd, bits).view(torch.float64).float()


def w4a4_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation: int = 0,
    num_bits: int = 4,
    act_format: str = "symmetric",
    per_token: bool = False,
    clip: float = 1.0,
) -> Tensor:
    k4 = len(perm) - salient_weight.shape[1]
    rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])[:, perm.long()]
    y = torch.zeros(len(rows), out_features)

    salient = rows[:, k4:]
    finite = torch.isfinite(salient).all(-1, keepdim=True)
    salient = torch.where(finite, salient, float("nan"))
    weights = salient_values(salient_weight, salient_scales)
    salient_rows = weights.permute(1, 0, 2).flatten(1)[:, :out_features]
    for s in range(salient.shape[1]):
        y = _fma(salient[:, s : s + 1], salient_rows[s], y)

    if k4:
        groups = _grouped(group_hadamard(rows[:, :k4], group_size, rotation), group_size)
        extent = (-2, -1) if per_token else (-1,)
        act_codes, act_scale = quantize_activation(groups, num_bits, act_format, clip, extent)
        act_scale = act_scale.expand(*groups.shape[:-1], 1)

        weight = unpack_weight(
            qweight,
            torch.ones_like(scales),
            torch.zeros_like(salient_weight),
            salient_scales,
            perm,
            out_features,
            group_size,
        )
        weight_groups = _grouped(weight[:, perm.long()][:, :k4].to(torch.int64), group_size)
        scale_rows = scales.float().permute(1, 0, 2).flatten(1)[:, :out_features]
        for j in range(groups.shape[-2]):
            dots = act_codes[:, j].to(torch.int64) @ weight_groups[:, j].T
            y = _fma(dots.float() * scale_rows[j], act_scale[:, j], y)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)
