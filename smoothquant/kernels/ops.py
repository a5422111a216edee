"""The torch ops of MixedQuant, ``torch.ops.mixedquant.*``, and control of the kernels behind them.

Every op is a pure function of its arguments (but ``channel_stats_update``, which says what it
writes), works under ``torch.compile(fullgraph=True)`` and ``torch.export``, and gives the same bits
on every instruction set; `smoothquant.kernels.reference` specifies each in plain torch. Wrong
arguments raise ValueError naming the op, the argument and the value. On CUDA tensors they run where
:func:`has_cuda` says so, with the same bits but for the sums of ``w4a4_linear``; nothing there
waits for the GPU but ``pack_weight``, and a bad index in ``perm`` makes NaN in place of an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

# Loads the compiled kernels. What is imported here as itself is part of `smoothquant.ops`.
from .control import CudaKernel as CudaKernel
from .control import build_info as build_info
from .control import cuda_kernels as cuda_kernels
from .control import forced_cuda_kernel as forced_cuda_kernel
from .control import has_cuda as has_cuda
from .control import isa as isa
from .control import set_cuda_kernel as set_cuda_kernel
from .control import set_isa as set_isa
from .control import supported_isas as supported_isas
from .layout import BLOCK_BYTES as BLOCK_BYTES
from .layout import PACKED as PACKED
from .layout import PANEL as PANEL
from .layout import QUAD as QUAD
from .layout import SEGMENT_QUADS as SEGMENT_QUADS
from .layout import num_groups, num_quads
from .layout import packed_dtypes as packed_dtypes
from .layout import packed_shapes as packed_shapes

if TYPE_CHECKING:
    from ..channels.statistics import ChannelStats


_ops = torch.ops.mixedquant


def channel_stats_update(
    x: Tensor,
    count: Tensor,
    abs_max: Tensor,
    minimum: Tensor,
    abs_sum: Tensor,
    sq_sum: Tensor,
    argmax: Tensor,
) -> None:
    """Add the rows of x to running statistics of its K channels, in place.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        count: int64 [], rows seen so far.
        abs_max, minimum: float32 [K], max|x| and min x.
        abs_sum, sq_sum: float64 [K], sum|x| and sum x^2, added in row order.
        argmax: int64 [K], row (counted from the first ever) of the first max|x|.
    """
    _ops.channel_stats_update(x, count, abs_max, minimum, abs_sum, sq_sum, argmax)


def sort_keys(stats: ChannelStats, key: str) -> Tensor:
    """Sort keys, float64 [K], of K channels.

    Args:
        stats: :class:`smoothquant.channels.statistics.ChannelStats` of the channels.
        key: "argmax" (row of max|x|), "max" (max|x|), "mean3std" (mean + 3 STD of |x|, population
            STD) or "rms" (sqrt of mean x^2).
    """
    return _ops.sort_keys(
        stats.count, stats.abs_max, stats.abs_sum, stats.sq_sum, stats.argmax, key
    )


def argsort(keys: Tensor, descending: bool = False) -> Tensor:
    """Stable argsort of float64 [K] keys: int64 [K]; NaN last in either direction."""
    return _ops.argsort(keys, descending)


def group_quantize(
    x: Tensor, group_size: int, num_bits: int = 4, is_unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize each row's groups of `group_size` values symmetrically.

    s = max|x| / q_max, q = clamp(round_half_even(x * (1/s)), -q_max, q_max) in fp32 with
    q_max = 2^(num_bits-1) - 1. Unsigned: s = max(x, 0) / q_max, q in [0, q_max] with
    q_max = 2^num_bits - 1.
    A group of zeros has s = 0 and q = 0; a group with NaN or Inf has s = NaN and q = 0.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: any integer >= 1; the last group of a row may be short.
        num_bits: 2-8.

    Returns:
        q: int8 (uint8 if unsigned), x's shape; scales: float32 [..., ceil(K / group_size)].
    """
    return _ops.group_quantize(x, group_size, num_bits, is_unsigned)


def group_dequantize(
    q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q * s, rounded once to `dtype`; the inverse of :func:`group_quantize`.

    Args:
        q: int8 or uint8 [..., K].
        scales: float32 [..., ceil(K / group_size)].
    """
    return _ops.group_dequantize(q, scales, group_size, dtype)


def group_fake_quantize(
    x: Tensor,
    group_size: int,
    num_bits: int = 4,
    act_format: str = "symmetric",
    clip: float = 1.0,
) -> Tensor:
    """x quantized and dequantized, group by group, as :func:`w4a4_linear` does with activations.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: >= 1; the last group of a row may be short.
        num_bits: 2-8, for "zero_point" 2-7.
        act_format, clip: as in :func:`w4a4_linear`.

    Returns:
        x's shape and dtype; rounded to it once.
    """
    return _ops.group_fake_quantize(x, group_size, num_bits, act_format, clip)


def group_hadamard(x: Tensor, group_size: int, rotation: int) -> Tensor:
    """Rotate each row's groups in blocks of `rotation` channels.

    Where fewer channels are left in a group, blocks have the largest power of two that fits. Each
    block is multiplied with the orthonormal Hadamard matrix of its size (Sylvester's order), in
    fp32 butterflies from stride 1 up; applied twice it gives x back, but for rounding.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: >= 1.
        rotation: 0 (none) or a power of two up to 512.

    Returns:
        x's shape and dtype.
    """
    return _ops.group_hadamard(x, group_size, rotation)


def pack_nibbles(q: Tensor) -> Tensor:
    """Low four bits of int8 or uint8 [..., K], two to a byte, first in the low nibble.

    Returns:
        uint8 [..., ceil(K / 2)]; the last high nibble of an odd row is 0.
    """
    return _ops.pack_nibbles(q)


def unpack_nibbles(packed: Tensor, cols: int, is_unsigned: bool = False) -> Tensor:
    """The inverse of :func:`pack_nibbles`: int8 in [-8, 7], or uint8 in [0, 15], [..., cols]."""
    return _ops.unpack_nibbles(packed, cols, is_unsigned)


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
    """Quantize and pack the weight of a linear layer (layout: docs/format.md).

    Args:
        w: [N, K], float32, float16 or bfloat16, finite.
        perm: int32 [K], a bijection: INT4 channels first, the `num_salient` salient ones last.
        group_size: >= 1; the last group may be short.
        rotation: the INT4 channels are rotated first, as by :func:`group_hadamard`.
        num_bits: 2-4, codes in [-q_max, q_max], q_max = 2^(num_bits-1) - 1.
        group_scales: float32 [N, G] to use in place of max|w| / q_max; rounded to bfloat16.
        salient_dtype: bfloat16 or float16, or int8: codes in [-127, 127] of a scale per output
            channel, max|w| / 127 over its salient weights, rounded to bfloat16.

    Returns:
        With P = ceil(N / 16) panels, B blocks and G = ceil((K - num_salient) / group_size) groups:
        qweight uint8 [P, B, 64], scales bfloat16 [P, G, 16],
        salient_weight of salient_dtype [P, num_salient, 16],
        salient_scales bfloat16 [P, 16] of int8, else None.
    """
    return _ops.pack_weight(
        w, perm, num_salient, group_size, rotation, num_bits, group_scales, salient_dtype
    )


def gptq_block(
    w: Tensor, u: Tensor, scales: Tensor, col0: int, group_size: int, num_bits: int = 4
) -> Tensor:
    """One block of GPTQ's column loop (Frantar et al., 2022), in place.

    Column by column, w is rounded to its grid, and the error, divided by u's diagonal, is taken
    from the columns to the right in the proportions of u's row.

    Args:
        w: float32 [N, b], contiguous; becomes code * scale.
        u: float32 [b, b], the block of the upper Cholesky factor of the inverse Hessian.
        scales: float32 [N, G]; column i is in group (col0 + i) // group_size.

    Returns:
        float32 [N, b], the divided errors, for the columns right of the block.
    """
    return _ops.gptq_block(w, u, scales, col0, group_size, num_bits)


def descend_block(
    w: Tensor,
    gradient: Tensor,
    h: Tensor,
    scales: Tensor,
    col0: int,
    group_size: int,
    num_bits: int = 4,
) -> None:
    """One block of coordinate descent on (target - w) h (target - w)^T, in place.

    Column by column, w moves to the point of its grid of least error, all other columns as they
    are, and the gradient follows it.

    Args:
        w: float32 [N, b], contiguous, code * scale; stays on that grid.
        gradient: float32 [N, b], contiguous: these columns of (target - w) h over the whole weight.
        h: float32 [b, b], the block of the positive definite matrix.
        scales: float32 [N, G]; column i is in group (col0 + i) // group_size.
    """
    _ops.descend_block(w, gradient, h, scales, col0, group_size, num_bits)


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
    """The weight that packed tensors stand for: float32 [N, K], channels in natural order."""
    return _ops.unpack_weight(
        qweight, scales, salient_weight, salient_scales, perm, out_features, group_size, rotation
    )


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
    quantized_input: Tensor | None = None,
) -> Tensor:
    """The fused W4A4 linear: x's INT4 channels are quantized per token and group, multiplied with
    the packed INT4 weight in integers, and the salient channels are added in fp32.

    y = sum_salient x w  +  sum_groups sa sw (sum (qa - z) qw)  +  bias, in fp32 and in that order.
    Per token and group (per token if `per_token`), of the rotated channels,

    - "symmetric": sa = clip max|x| / (2^(num_bits-1) - 1), z = 0;
    - "unsigned": sa = clip max(x, 0) / (2^num_bits - 1), z = 0, what is negative saturates at 0;
    - "zero_point": sa = clip (max(x, 0) + max(-x, 0)) / (2^num_bits - 1),
      z = round(clip max(-x, 0) / sa).

    A token's result
    depends on that token alone. A token that holds NaN or Inf has NaN outputs; other tokens are
    untouched.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides, any number of tokens.
        qweight, scales, salient_weight, salient_scales: from :func:`pack_weight` with the same
            `perm` and `group_size`.
        bias: [N], float32, float16 or bfloat16, or None.
        rotation: as given to :func:`pack_weight`.
        num_bits: 2-4 bits of the activations.
        clip: in (0, 1].
        quantized_input: x as :func:`quantize_input` gives it for the same choices, for layers that
            read one x; of x itself shape and dtype are left to say. A ValueError where it was made
            for another number of tokens or channels, group size or instruction set, and on CUDA,
            where every layer quantizes its input itself.

    Returns:
        [..., N] in x's dtype. On CUDA the products with salient channels, and up to 64 tokens those
        of groups too, are added in another order than on the CPU, the same in every call: the last
        bits of a token's result differ from the CPU's, and between calls of up to 64 tokens and of
        more, not otherwise with the tokens beside it.
    """
    return _ops.w4a4_linear(
        x,
        qweight,
        scales,
        salient_weight,
        salient_scales,
        perm,
        bias,
        out_features,
        group_size,
        rotation,
        num_bits,
        act_format,
        per_token,
        clip,
        quantized_input,
    )


def quantize_input(
    x: Tensor,
    perm: Tensor,
    num_salient: int,
    group_size: int,
    rotation: int = 0,
    num_bits: int = 4,
    act_format: str = "symmetric",
    per_token: bool = False,
    clip: float = 1.0,
) -> Tensor:
    """The first half of :func:`w4a4_linear`: x quantized, to be multiplied with several weights.

    Arguments are those of `w4a4_linear`, with the number of salient channels given directly.

    Returns:
        uint8, one dimension, for `quantized_input` of `w4a4_linear`. How x lies in it depends on
        the instruction set and is no file format.
    """
    return _ops.quantize_input(
        x, perm, num_salient, group_size, rotation, num_bits, act_format, per_token, clip
    )


def _on_one_device(op: str, **tensors: Tensor | None) -> None:
    """A layer whose tensors are half on the meta device would answer with whatever is in memory."""
    devices = {name: t.device.type for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"mixedquant::{op}: all tensors must be on one device; got {devices}")


def _check_channels(op: str, x: Tensor, perm: Tensor) -> None:
    if x.shape[-1] != perm.shape[0]:
        raise ValueError(
            f"mixedquant::{op}: x must end in {perm.shape[0]} channels; got shape {list(x.shape)}"
        )


@torch.library.register_fake("mixedquant::channel_stats_update")
def _(x, count, abs_max, minimum, abs_sum, sq_sum, argmax):
    return None


@torch.library.register_fake("mixedquant::sort_keys")
def _(count, abs_max, abs_sum, sq_sum, argmax, key):
    return abs_max.new_empty(abs_max.shape, dtype=torch.float64)


@torch.library.register_fake("mixedquant::argsort")
def _(keys, descending):
    return keys.new_empty(keys.shape, dtype=torch.int64)


@torch.library.register_fake("mixedquant::group_quantize")
def _(x, group_size, num_bits, is_unsigned):
    q = x.new_empty(x.shape, dtype=torch.uint8 if is_unsigned else torch.int8)
    groups = num_groups(x.shape[-1], group_size)
    return q, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


@torch.library.register_fake("mixedquant::group_dequantize")
def _(q, scales, group_size, dtype):
    _on_one_device("group_dequantize", q=q, scales=scales)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.register_fake("mixedquant::group_fake_quantize")
def _(x, group_size, num_bits, act_format, clip):
    return x.new_empty(x.shape)


@torch.library.register_fake("mixedquant::group_hadamard")
def _(x, group_size, rotation):
    return x.new_empty(x.shape)


@torch.library.register_fake("mixedquant::gptq_block")
def _(w, u, scales, col0, group_size, num_bits):
    _on_one_device("gptq_block", w=w, u=u, scales=scales)
    return w.new_empty(w.shape)


@torch.library.register_fake("mixedquant::descend_block")
def _(w, gradient, h, scales, col0, group_size, num_bits):
    _on_one_device("descend_block", w=w, gradient=gradient, h=h, scales=scales)


@torch.library.register_fake("mixedquant::pack_nibbles")
def _(q):
    return q.new_empty((*q.shape[:-1], (q.shape[-1] + 1) // 2), dtype=torch.uint8)


@torch.library.register_fake("mixedquant::unpack_nibbles")
def _(packed, cols, is_unsigned):
    dtype = torch.uint8 if is_unsigned else torch.int8
    return packed.new_empty((*packed.shape[:-1], cols), dtype=dtype)


@torch.library.register_fake("mixedquant::pack_weight")
def _(w, perm, num_salient, group_size, rotation, num_bits, group_scales, salient_dtype):
    _on_one_device("pack_weight", w=w, perm=perm, group_scales=group_scales)
    shapes = packed_shapes(*w.shape, num_salient, group_size)
    dtypes = packed_dtypes(salient_dtype)
    return tuple(
        None if dtype is None else w.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


@torch.library.register_fake("mixedquant::unpack_weight")
def _(qweight, scales, salient_weight, salient_scales, perm, out_features, group_size, rotation):
    packed = dict(zip(PACKED, (qweight, scales, salient_weight, salient_scales), strict=True))
    _on_one_device("unpack_weight", **packed, perm=perm)
    return qweight.new_empty((out_features, perm.shape[0]), dtype=torch.float32)


@torch.library.register_fake("mixedquant::w4a4_linear")
def _(
    x,
    qweight,
    scales,
    salient_weight,
    salient_scales,
    perm,
    bias,
    out_features,
    group_size,
    rotation,
    num_bits,
    act_format,
    per_token,
    clip,
    quantized_input,
):
    packed = dict(zip(PACKED, (qweight, scales, salient_weight, salient_scales), strict=True))
    others = {"perm": perm, "bias": bias, "quantized_input": quantized_input}
    _on_one_device("w4a4_linear", x=x, **packed, **others)
    _check_channels("w4a4_linear", x, perm)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("mixedquant::quantize_input")
def _(x, perm, num_salient, group_size, rotation, num_bits, act_format, per_token, clip):
    _on_one_device("quantize_input", x=x, perm=perm)
    _check_channels("quantize_input", x, perm)
    k = perm.shape[0]
    groups, group_quads, last_quads = num_quads(k - num_salient, group_size)
    per_token_bytes = 4 * num_salient
    for count, quads in ((groups - 1, group_quads), (1, last_quads)):
        if groups:
            per_token_bytes += 4 * count * (quads + 1 + -(-quads // SEGMENT_QUADS))
    tokens = x.numel() // k if k else x.shape[:-1].numel()
    # what the instruction set with the largest tiles needs, and the label of csrc/torch/library.cpp
    return x.new_empty((tokens + 16) * per_token_bytes + 256 + 64, dtype=torch.uint8)
