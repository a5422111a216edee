"""MixedQuant's torch ops, ``torch.ops.mixedquant.*``, and the control of their kernels.

- `smoothquant.kernels.reference` specifies every op in plain torch. Results are bit-identical on
  all instruction sets.
- All ops work under ``torch.compile(fullgraph=True)`` and ``torch.export``. They are pure, except
  ``channel_stats_update``, ``gptq_block`` and ``descend_block``, which update arguments in place.
- An invalid argument raises ValueError; the message names the op, the argument and the value.
- CUDA tensors are accepted if :func:`has_cuda` is true. Results are bit-identical to the CPU's,
  except for the sums in ``w4a4_linear``. Only ``pack_weight`` waits for the GPU. An invalid index
  in ``perm`` or ``rows`` gives NaN instead of an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# Loads the compiled kernels. Names imported "as" themselves are public in `smoothquant.ops`.
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
from .layout import MIN_CLIP as MIN_CLIP
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
        argmax: int64 [K], index of the first row with max|x|, counted over all updates.
    """
    _ops.channel_stats_update(x, count, abs_max, minimum, abs_sum, sq_sum, argmax)


def sort_keys(stats: ChannelStats, key: str) -> Tensor:
    """Sort keys of K channels.

    Args:
        stats: :class:`smoothquant.channels.statistics.ChannelStats` of the channels.
        key: "argmax" (index of the row with max|x|), "max" (max|x|), "mean3std" (mean + 3 STD of
            |x|, population STD) or "rms" (sqrt of mean x^2).

    Returns:
        float64 [K].
    """
    return _ops.sort_keys(
        stats.count, stats.abs_max, stats.abs_sum, stats.sq_sum, stats.argmax, key
    )


def argsort(keys: Tensor, descending: bool = False) -> Tensor:
    """Stable argsort of float64 [K] keys: int64 [K]. NaN comes last in both directions."""
    return _ops.argsort(keys, descending)


def group_quantize(
    x: Tensor, group_size: int, num_bits: int = 4, is_unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize each row in groups of `group_size` values, without zero-points.

    Signed: s = max|x| / q_max and q = clamp(round_half_even(x * (1/s)), -q_max, q_max) in fp32,
    with q_max = 2^(num_bits-1) - 1. Unsigned: s = max(x, 0) / q_max and q in [0, q_max], with q_max
    = 2^num_bits - 1. A group of zeros gets s = 0 and q = 0; a group with NaN or Inf gets s = NaN
    and q = 0.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: >= 1; the last group of a row may be shorter.
        num_bits: 2-8.

    Returns:
        q: int8 (uint8 if unsigned), x's shape; scales: float32 [..., ceil(K / group_size)].
    """
    return _ops.group_quantize(x, group_size, num_bits, is_unsigned)


def group_dequantize(
    q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of :func:`group_quantize`: q * s, rounded once to `dtype`.

    Args:
        q: int8 or uint8 [..., K].
        scales: float32 [..., ceil(K / group_size)].

    Returns:
        dtype [..., K].
    """
    return _ops.group_dequantize(q, scales, group_size, dtype)


def group_fake_quantize(
    x: Tensor,
    group_size: int,
    num_bits: int = 4,
    act_format: str = "symmetric",
    clip: float = 1.0,
) -> Tensor:
    """Quantize and dequantize x in groups, as :func:`w4a4_linear` does with activations.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: >= 1; the last group of a row may be shorter.
        num_bits: 2-8, or 2-7 with "zero_point".
        act_format, clip: as in :func:`w4a4_linear`.

    Returns:
        A tensor with x's shape and dtype, rounded once.
    """
    return _ops.group_fake_quantize(x, group_size, num_bits, act_format, clip)


def group_hadamard(x: Tensor, group_size: int, rotation: int) -> Tensor:
    """Rotate each group of a row in blocks of `rotation` channels.

    Each block is multiplied by the orthonormal Hadamard matrix of its size (Sylvester's order),
    with fp32 butterflies from stride 1 up. At the end of a group, blocks shrink to the largest
    power of two that fits. Up to rounding, the rotation is its own inverse.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: >= 1.
        rotation: 0 (none) or a power of two up to 512.

    Returns:
        A tensor with x's shape and dtype.
    """
    return _ops.group_hadamard(x, group_size, rotation)


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack the low four bits of int8 or uint8 [..., K], two values per byte, low nibble first.

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
        perm: int32 [K], a permutation: INT4 channels first, then `num_salient` salient channels.
        group_size: >= 1; the last group may be shorter.
        rotation: rotate the INT4 channels first, with :func:`group_hadamard`.
        num_bits: 2-4; codes are in [-q_max, q_max], q_max = 2^(num_bits-1) - 1.
        group_scales: float32 [N, G], used instead of max|w| / q_max; rounded to bfloat16.
        salient_dtype: bfloat16, float16 or int8. int8 has codes in [-127, 127] and a scale per
            output channel: max|w| / 127 over its salient weights, rounded to bfloat16.

    Returns:
        With P = ceil(N / 16) panels, B blocks and G = ceil((K - num_salient) / group_size) groups:
        qweight uint8 [P, B, 64], scales bfloat16 [P, G, 16],
        salient_weight of salient_dtype [P, num_salient, 16],
        salient_scales bfloat16 [P, 16] for int8, else None.
    """
    return _ops.pack_weight(
        w, perm, num_salient, group_size, rotation, num_bits, group_scales, salient_dtype
    )


def gptq_block(
    w: Tensor, u: Tensor, scales: Tensor, col0: int, group_size: int, num_bits: int = 4
) -> Tensor:
    """One block of GPTQ's column loop (Frantar et al., 2022), in place.

    For each column i, from the left: round it to its grid, divide the error by u[i, i], and
    subtract the result times u[i, j] from every column j to the right.

    Args:
        w: float32 [N, b], contiguous; overwritten with code * scale.
        u: float32 [b, b], diagonal block of the upper Cholesky factor of the inverse Hessian.
        scales: float32 [N, G]; column i is in group (col0 + i) // group_size.
        col0: index of the block's first column.

    Returns:
        float32 [N, b], the divided errors, for updating the columns right of the block. NaN, in w
        or from 0 / 0 at a zero diagonal of u, makes the columns computed from it NaN.
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

    Each column of w, from the left, moves to the grid point with the least error while all other
    columns stay fixed; the gradient is updated with it. NaN stays NaN, as in :func:`gptq_block`.

    Args:
        w: float32 [N, b], contiguous, code * scale; stays on that grid.
        gradient: float32 [N, b], contiguous: this block's columns of (target - w) h, computed over
            all columns.
        h: float32 [b, b], diagonal block of the positive definite matrix.
        scales: float32 [N, G]; column i is in group (col0 + i) // group_size.
        col0: index of the block's first column.
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
    """Dequantize the result of :func:`pack_weight`: float32 [N, K], channels in natural order."""
    return _ops.unpack_weight(
        qweight, scales, salient_weight, salient_scales, perm, out_features, group_size, rotation
    )


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
    """Chosen rows of the result of :func:`unpack_weight`, for embeddings.

    Args:
        rows: int64 [T], output channels in [0, out_features), in any order and any number of times.

    Returns:
        float32 [T, K].

    Raises:
        ValueError: an index is outside [0, out_features); on CUDA, its row is NaN instead.
    """
    return _ops.unpack_rows(
        qweight,
        scales,
        salient_weight,
        salient_scales,
        perm,
        rows,
        out_features,
        group_size,
        rotation,
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
    """Fused W4A4 linear layer.

    Quantizes the INT4 channels of x per token and group, multiplies them with the packed INT4
    weight in integers, and adds the salient channels in fp32:

    y = sum_salient x w  +  sum_groups sa sw (sum (qa - z) qw)  +  bias, in fp32 and in this order.

    sa and z are computed from the rotated channels, per token and group (per token if `per_token`):

    - "symmetric": sa = clip max|x| / (2^(num_bits-1) - 1), z = 0;
    - "unsigned": sa = clip max(x, 0) / (2^num_bits - 1), z = 0; negative values saturate at 0;
    - "zero_point": sa = clip (max(x, 0) + max(-x, 0)) / (2^num_bits - 1),
      z = round(clip max(-x, 0) / sa).

    A token's result depends on that token only. If a token contains NaN or Inf, its outputs are
    NaN; other tokens are unaffected.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides, any number of tokens.
        qweight, scales, salient_weight, salient_scales: from :func:`pack_weight` with the same
            `perm` and `group_size`.
        bias: [N], float32, float16 or bfloat16, or None.
        rotation: as given to :func:`pack_weight`.
        num_bits: bits of the activations, 2-8 (2-7 for "unsigned" and "zero_point").
        clip: in [2^-10, 1].
        quantized_input: the result of :func:`quantize_input` for x and the same options, shared by
            all layers that read x. Of x, only shape and dtype are then used. CPU only.

    Returns:
        [..., N] in x's dtype. CUDA adds the products with salient channels, and for up to 64 tokens
        also those of the groups, in another fixed order than the CPU. A token's last bits therefore
        differ between CPU and CUDA, and on CUDA between calls with up to and with more than 64
        tokens. They never depend on the other tokens in any other way.

    Raises:
        ValueError: an argument is invalid; quantized_input is given on CUDA, was made for another
            number of tokens or channels or another group size, or for an instruction set that this
            processor lacks.
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
    """The first half of :func:`w4a4_linear`: quantize x once, for several weights.

    Args:
        num_salient: number of salient channels.
        x, perm, group_size, rotation, num_bits, act_format, per_token, clip: as in `w4a4_linear`.

    Returns:
        uint8, one-dimensional, for `quantized_input` of `w4a4_linear`. Its layout depends on the
        instruction set, so it must not be stored. `w4a4_linear` uses the same instruction set, even
        if another one is forced in between.
    """
    return _ops.quantize_input(
        x, perm, num_salient, group_size, rotation, num_bits, act_format, per_token, clip
    )


def _fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Register a fake kernel, whose parameters are named as in the op's schema.

    It is called only with arguments that pass these checks, the same for all ops:

    - All tensors are on one device. With some of them on the meta device, torch calls the fake
      kernel, and the caller would get uninitialized memory.
    - `clip` is in [MIN_CLIP, 1].
    """

    def register(kernel: Callable[..., Any]) -> None:
        signature = inspect.signature(kernel)

        def checked(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            devices = {n: a.device.type for n, a in arguments.items() if isinstance(a, Tensor)}
            if len(set(devices.values())) > 1:
                raise ValueError(
                    f"mixedquant::{op}: all tensors must be on one device; got {devices}"
                )
            clip = arguments.get("clip", 1.0)
            if not MIN_CLIP <= clip <= 1.0:
                raise ValueError(f"mixedquant::{op}: clip must be in [2^-10, 1]; got {clip:g}")
            return kernel(**arguments)

        torch.library.register_fake(f"mixedquant::{op}", checked)

    return register


def _check_channels(op: str, x: Tensor, perm: Tensor) -> None:
    if x.shape[-1] != perm.shape[0]:
        raise ValueError(
            f"mixedquant::{op}: x must end in {perm.shape[0]} channels; got shape {list(x.shape)}"
        )


@_fake("channel_stats_update")
def _(
    x: Tensor,
    count: Tensor,
    abs_max: Tensor,
    minimum: Tensor,
    abs_sum: Tensor,
    sq_sum: Tensor,
    argmax: Tensor,
) -> None:
    return None


@_fake("sort_keys")
def _(
    count: Tensor, abs_max: Tensor, abs_sum: Tensor, sq_sum: Tensor, argmax: Tensor, key: str
) -> Tensor:
    return abs_max.new_empty(abs_max.shape, dtype=torch.float64)


@_fake("argsort")
def _(keys: Tensor, descending: bool) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.int64)


@_fake("group_quantize")
def _(x: Tensor, group_size: int, num_bits: int, is_unsigned: bool) -> tuple[Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.uint8 if is_unsigned else torch.int8)
    groups = num_groups(x.shape[-1], group_size)
    return q, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


@_fake("group_dequantize")
def _(q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@_fake("group_fake_quantize")
def _(x: Tensor, group_size: int, num_bits: int, act_format: str, clip: float) -> Tensor:
    return x.new_empty(x.shape)


@_fake("group_hadamard")
def _(x: Tensor, group_size: int, rotation: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("gptq_block")
def _(w: Tensor, u: Tensor, scales: Tensor, col0: int, group_size: int, num_bits: int) -> Tensor:
    return w.new_empty(w.shape)


@_fake("descend_block")
def _(
    w: Tensor,
    gradient: Tensor,
    h: Tensor,
    scales: Tensor,
    col0: int,
    group_size: int,
    num_bits: int,
) -> None:
    return None


@_fake("pack_nibbles")
def _(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], (q.shape[-1] + 1) // 2), dtype=torch.uint8)


@_fake("unpack_nibbles")
def _(packed: Tensor, cols: int, is_unsigned: bool) -> Tensor:
    dtype = torch.uint8 if is_unsigned else torch.int8
    return packed.new_empty((*packed.shape[:-1], cols), dtype=dtype)


@_fake("pack_weight")
def _(
    w: Tensor,
    perm: Tensor,
    num_salient: int,
    group_size: int,
    rotation: int,
    num_bits: int,
    group_scales: Tensor | None,
    salient_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    n, k = w.shape
    shapes = packed_shapes(n, k, num_salient, group_size)
    dtypes = packed_dtypes(salient_dtype)
    return tuple(
        None if dtype is None else w.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


@_fake("unpack_weight")
def _(
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    out_features: int,
    group_size: int,
    rotation: int,
) -> Tensor:
    return qweight.new_empty((out_features, perm.shape[0]), dtype=torch.float32)


@_fake("unpack_rows")
def _(
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    rows: Tensor,
    out_features: int,
    group_size: int,
    rotation: int,
) -> Tensor:
    return qweight.new_empty((rows.shape[0], perm.shape[0]), dtype=torch.float32)


@_fake("w4a4_linear")
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    salient_weight: Tensor,
    salient_scales: Tensor | None,
    perm: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation: int,
    num_bits: int,
    act_format: str,
    per_token: bool,
    clip: float,
    quantized_input: Tensor | None,
) -> Tensor:
    _check_channels("w4a4_linear", x, perm)
    return x.new_empty((*x.shape[:-1], out_features))


@_fake("quantize_input")
def _(
    x: Tensor,
    perm: Tensor,
    num_salient: int,
    group_size: int,
    rotation: int,
    num_bits: int,
    act_format: str,
    per_token: bool,
    clip: float,
) -> Tensor:
    _check_channels("quantize_input", x, perm)
    k = perm.shape[0]
    groups, group_quads, last_quads = num_quads(k - num_salient, group_size)
    per_token_bytes = 4 * num_salient
    for count, quads in ((groups - 1, group_quads), (1, last_quads)):
        if groups:
            per_token_bytes += 4 * count * (quads + 1 + -(-quads // SEGMENT_QUADS))
    tokens = x.numel() // k if k else x.shape[:-1].numel()
    # The largest size of any instruction set, plus the label of csrc/torch/library.cpp.
    return x.new_empty((tokens + 16) * per_token_bytes + 256 + 64, dtype=torch.uint8)
