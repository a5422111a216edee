"""FP8 weights in the files of a float model, which are dequantized on reading.

The format of DeepSeek-V3, transformers' method "fp8". Beside a weight ``X [..., N, K]`` in
float8_e4m3fn, its file has the factors ``X_scale_inv``: one for each block of
``weight_block_size`` (rows, columns), of which the last may be smaller, or one for the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.tensor_files import Header
from ..core.tensors import DTYPES, FLOATS

METHOD = "fp8"
DEQUANTIZED = "mixedquant_fp8"  # the method under which transformers dequantizes such files
SCALE = "_scale_inv"
ACTIVATION_SCALES = ("activation_scale", "input_scale")  # of no use for a float model

# {method: the config with which transformers loads it as a float model}
REMEDIES = {
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}


def float8_block(source: object, quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size of a folder with FP8 weights; None for one scale per tensor.

    Args:
        source: the folder, for messages.
        quantization: ``quantization_config`` in its config.json.

    Raises:
        ValueError: it is another method, or not a block size.
    """
    method = str(quantization.get("quant_method"))
    if method not in (METHOD, DEQUANTIZED):
        remedy = "quantize the float model that it was made from"
        if method in REMEDIES:
            remedy = (
                f"transformers loads it with quantization_config={REMEDIES[method]}; save that "
                "float model by save_pretrained"
            )
        raise ValueError(
            f"source must hold a float model, or FP8 or MXFP4 weights; {source} is quantized by "
            f"{method!r:.80} ({remedy})"
        )
    block = quantization.get("weight_block_size", (128, 128))
    if block is None:
        return None
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(
            f"source: weight_block_size of {source} must be two positive integers; "
            f"got {block!r:.80}"
        )
    return block[0], block[1]


def weight_scales(
    headers: Mapping[str, Header], block: tuple[int, int] | None
) -> dict[str, Header]:
    """{name of an FP8 weight: header of its scales}.

    Args:
        headers: of all tensors in the model's files.
        block: from `float8_block`.

    Raises:
        CheckpointError: scales are missing, or do not fit their weight.
    """
    scales = {}
    for name, header in headers.items():
        if header.dtype != "float8_e4m3fn":
            continue
        factors = headers.get(name + SCALE)
        if factors is None:
            raise CheckpointError(f"{header.path}: FP8 tensor {name} has no {name}{SCALE}")
        if DTYPES.get(factors.dtype) not in FLOATS:
            raise CheckpointError(
                f"{factors.path}: tensor {name}{SCALE} must be float32, float16 or bfloat16; got "
                f"{factors.dtype}"
            )
        expected = _shape_of_scales(header.shape, block)
        if math.prod(factors.shape) != 1 and factors.shape != expected:
            raise CheckpointError(
                f"{factors.path}: tensor {name}{SCALE} must have shape {expected}; got "
                f"{factors.shape}"
            )
        scales[name] = factors
    return scales


def _shape_of_scales(shape: Sequence[int], block: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of the scales of a weight of this shape."""
    if block is None or len(shape) < 2:
        return ()
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantized(
    weight: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Tensor:
    """The values of an FP8 weight.

    Args:
        weight: float8_e4m3fn [..., N, K].
        scales: [..., ceil(N / rows), ceil(K / columns)] or a single number, in a dtype of floats.
        block: (rows, columns) of a block; None if there is one scale for the tensor.

    Returns:
        [..., N, K] in `dtype`, rounded once.

    """
    factors = scales.float()
    if factors.numel() > 1:
        assert block is not None, "weight_scales has checked it"
        factors = factors.repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
        factors = factors.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    else:
        factors = factors.view(())
    return (weight.float() * factors).to(dtype)
