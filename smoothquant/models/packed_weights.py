"""FP8 and MXFP4 weights in the files of a float model, which are dequantized on reading.

transformers' method "fp8": `smoothquant.models.float8`.

The method "mxfp4", the format of GPT-OSS: instead of a weight ``X [..., K, N]``, the files
have the codes ``X_blocks [..., N, K / 32, 16]``, two 4-bit floats (e2m1) per byte, the first one in
the low bits, and ``X_scales [..., N, K / 32]``, the exponents of powers of two, plus 127. Both are
uint8.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.tensor_files import Header
from ..core.tensors import dtype_name
from .float8 import ACTIVATION_SCALES, SCALE, dequantized, float8_block, weight_scales

logger = logging.getLogger("smoothquant")

MXFP4 = "mxfp4"
DEQUANTIZED_MXFP4 = "mixedquant_mxfp4"  # the method under which transformers dequantizes such files
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # codes with one scale
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the codes 0 ... 7 stand for


class PackedWeight(NamedTuple):
    """A float weight that is stored in another format.

    parts: {name of a stored tensor that it is made of: its header}.
    header: its header as if it were stored itself.
    unpack: computes its values: unpack(*tensors of the parts, dtype=...).
    """

    parts: dict[str, Header]
    header: Header
    unpack: Callable[..., Tensor]


def packed_weights(
    source: object, quantization: Any, headers: Mapping[str, Header]
) -> dict[str, PackedWeight]:
    """{name of a weight: how it is stored} for the weights that are not stored as floats.

    Args:
        source: the folder, for messages.
        quantization: ``quantization_config`` in its config.json; None for a float model.
        headers: of all stored tensors.

    Raises:
        ValueError: the folder is quantized by another method.
        CheckpointError: codes or scales are missing, or do not fit.
    """
    if quantization is None:
        return {}
    fields = quantization if isinstance(quantization, dict) else {}
    if is_mxfp4(fields):
        return _mxfp4_weights(headers)
    block = float8_block(source, fields)
    return {
        name: PackedWeight(
            {name: headers[name], name + SCALE: scales},
            headers[name],
            functools.partial(dequantized, block=block),
        )
        for name, scales in weight_scales(headers, block).items()
    }


def is_mxfp4(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is that of MXFP4 weights."""
    return str(quantization.get("quant_method")) in (MXFP4, DEQUANTIZED_MXFP4)


def float_headers(
    headers: Mapping[str, Header], packed: Mapping[str, PackedWeight]
) -> dict[str, Header]:
    """The headers as if the packed weights were stored as floats, without scales of activations."""
    parts = {part for weight in packed.values() for part in weight.parts}
    floats = {
        name: header
        for name, header in headers.items()
        if name not in parts and name.rpartition(".")[2] not in ACTIVATION_SCALES
    }
    return floats | {name: weight.header for name, weight in packed.items()}


def warn_of_packed(source: object, quantization: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Log the one line that says that weights are dequantized."""
    what = "MXFP4" if is_mxfp4(quantization) else "FP8"
    logger.warning(
        "%s holds %s weights: they are dequantized to %s on reading",
        source,
        what,
        dtype_name(dtype),
    )


def _mxfp4_weights(headers: Mapping[str, Header]) -> dict[str, PackedWeight]:
    packed = {}
    stored = [name for name in headers if name.endswith((BLOCKS, SCALES))]
    for name in dict.fromkeys(part[: -len(BLOCKS)] for part in stored):
        parts = {}
        for part in (name + BLOCKS, name + SCALES):
            if part not in headers:
                path = next(headers[other].path for other in stored if other.startswith(name))
                raise CheckpointError(f"{path}: MXFP4 weight {name} has no {part}")
            parts[part] = headers[part]
            if headers[part].dtype != "uint8":
                raise CheckpointError(
                    f"{headers[part].path}: tensor {part} must be uint8; got {headers[part].dtype}"
                )
        codes, scales = parts.values()
        if len(codes.shape) < 3 or codes.shape != (*scales.shape, GROUP // 2):
            raise CheckpointError(
                f"{codes.path}: tensor {name}{BLOCKS} must have the shape of {name}{SCALES}, "
                f"{scales.shape}, and {GROUP // 2}; got {codes.shape}"
            )
        *outer, n, groups, _ = codes.shape
        header = Header(codes.path, (*outer, GROUP * groups, n), MXFP4)
        packed[name] = PackedWeight(parts, header, dequantized_mxfp4)
    return packed


def dequantized_mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of an MXFP4 weight.

    Args:
        codes: uint8 [..., N, K / 32, 16].
        scales: uint8 [..., N, K / 32].

    Returns:
        [..., K, N] in `dtype`, rounded once.
    """
    positive = torch.tensor(POSITIVE, device=codes.device)
    values = torch.cat([positive, -positive])
    *outer, n, groups, half = codes.shape
    out = torch.empty((*outer, 2 * half * groups, n), dtype=dtype, device=codes.device)
    # one matrix at a time: on the way, a value takes 17 bytes
    matrices = out.flatten(0, -3), codes.flatten(0, -4), scales.flatten(0, -3)
    for to, of_matrix, exponents in zip(*matrices, strict=True):
        pairs = torch.stack([of_matrix & 0x0F, of_matrix >> 4], dim=-1).flatten(-2)
        weight = torch.ldexp(values[pairs.int()], exponents.int()[..., None] - 127)
        to.copy_(weight.flatten(-2).T)
    return out
