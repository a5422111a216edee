"""Export quantized models to formats of other inference engines.

compressed-tensors (https://github.com/vllm-project/compressed-tensors), format "pack-quantized":
weights keep their exact values. Activations are quantized by the reader's own rule for "4 bits,
dynamic, per token or group"; for symmetric ones, it uses the scale max|x| / 7.5, where we use
max|x| / 7.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, W4A4Linear
from ..models.linears import is_conv1d
from ..models.modules import is_transformers_model, module_copy, module_places, replace_module
from ..quantization.undo import dequantize_tables, float_modules
from .folder import check_target, write_folder
from .manifest import Manifest

CODES_IN_INT32 = 8


class _Packed(nn.Module):
    """The tensors of a linear under their compressed-tensors names."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_packed", pack_int32(codes))
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_shape", torch.tensor(codes.shape))
        self.register_buffer("bias", bias)


@torch.no_grad()
def export_compressed_tensors(
    model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, *, overwrite: bool = False
) -> None:
    """Write a quantized transformers model in the compressed-tensors format, atomically.

    The format packs linears only: a quantized output head and embeddings are written in the model's
    dtype, with the values that their codes represent.

    Args:
        model: a model quantized with ``backend="int4"``; it is not changed.
        folder: must not exist or be empty; with `overwrite`, it may also hold a model.
        tokenizer: a transformers tokenizer to save with the model, or None.
        overwrite: replace a folder that holds a model.

    Raises:
        ValueError: the format cannot express the model (the message names the layer and the
            reason), or the folder is not free. Nothing is written.
        OSError: writing failed. Nothing is left behind.
    """
    if not is_transformers_model(model):
        raise ValueError(f"model must be a transformers model; got {type(model).__name__}")
    dtype = Manifest.of_model(model).dtype
    folder = check_target(folder, overwrite=overwrite, of_any_model=True)
    for name, module in model.named_modules():
        if isinstance(module, W4A4Experts):
            raise _not_expressible(name, "the format has no fused experts")
    for name, module in float_modules(model).items():
        if is_conv1d(module) and isinstance(model.get_submodule(name), QuantizedLinear):
            raise _not_expressible(name, "the format has no Conv1D layers, only nn.Linear")
    exported: Any = module_copy(model)
    dequantize_tables(exported, dtype)
    places = module_places(exported)
    schemes: list[tuple[dict[str, Any], list[str]]] = []
    for name, module in list(exported.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        if not isinstance(module, W4A4Linear):
            raise _not_expressible(name, "it is a simulation (backend='fake')")
        scheme = _scheme(name, module)
        scales = natural_scales(name, module, dtype)
        packed = _Packed(natural_codes(module), scales, module.bias)
        replace_module(exported, name, packed, places)
        same_scheme = next((names for other, names in schemes if other == scheme), None)
        if same_scheme is None:
            schemes.append((scheme, [name]))
        else:
            same_scheme.append(name)
    floats = [name for name, m in exported.named_modules() if isinstance(m, nn.Linear)]
    if exported.hf_quantizer is not None:
        exported.hf_quantizer.remove_quantization_config(exported)
    exported.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {**scheme, "targets": ["Linear"] if len(schemes) == 1 else names}
            for index, (scheme, names) in enumerate(schemes)
        },
        "ignore": floats,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    write_folder(exported, folder, tokenizer, overwrite=overwrite)


def pack_int32(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7], int8 [N, K], as eight 4-bit values (code + 8) per int32.

    The first code is in the lowest bits.

    Returns:
        int32 [N, ceil(K / 8)].
    """
    n, k = codes.shape
    padded = torch.zeros(n, -(-k // CODES_IN_INT32) * CODES_IN_INT32, dtype=torch.int64)
    padded[:, :k] = codes + 8
    shifts = 4 * torch.arange(CODES_IN_INT32)
    words = (padded.unflatten(1, (-1, CODES_IN_INT32)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _not_expressible(name: str, reason: str) -> ValueError:
    return ValueError(f"compressed-tensors cannot express {name}: {reason}")


def _scheme(name: str, layer: W4A4Linear) -> dict[str, Any]:
    """The entry of config_groups for a layer, without its targets."""
    config = layer.config
    checks: tuple[tuple[bool, str], ...] = (
        (
            layer.num_salient > 0,
            f"{layer.num_salient} of its channels are salient, which are 16-bit",
        ),
        (config.num_bits != 4, f"it has {config.num_bits} bits; only 4 are exported"),
        (
            config.activation_bits not in (4, 8),
            f"its activations have {config.activation_bits} bits; only 4 and 8 are exported",
        ),
        (config.rotation not in (0, 1), f"its channels are rotated (rotation={config.rotation})"),
        (config.act_clip != 1.0, f"its activations are clipped (act_clip={config.act_clip:g})"),
        (config.act_format == "unsigned", "its activations have unsigned codes"),
        (layer.quantize_output, "its outputs are quantized, too (quantize_output=True)"),
    )
    for unsupported, reason in checks:
        if unsupported:
            raise _not_expressible(name, reason)
    size = layer.group_size if _has_groups(layer) else None
    by_group = size and config.act_quant == "per_group"
    return {
        "weights": _arguments(size if config.weight_quant == "per_group" else None, "channel"),
        "input_activations": _arguments(
            size if by_group else None,
            "token",
            num_bits=config.activation_bits,
            symmetric=config.act_format == "symmetric",
        ),
        "output_activations": None,
        "format": "pack-quantized",
    }


def _arguments(
    group_size: int | None, whole: str, *, num_bits: int = 4, symmetric: bool = True
) -> dict[str, Any]:
    """QuantizationArgs of compressed-tensors; whole: the strategy if `group_size` is None."""
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else whole,
        "group_size": group_size,
        "dynamic": whole == "token",
    }


def _has_groups(layer: QuantizedLinear) -> bool:
    return layer.group_size < layer.in_features


def natural_codes(layer: W4A4Linear) -> Tensor:
    """The codes of a layer without rotation, int8 [N, K], with channels in natural order."""
    codes = layer.grid()[0].flatten(1)[:, : layer.in_features].to("cpu", torch.int8)
    natural = torch.empty_like(codes)
    natural[:, layer.perm.cpu().long()] = codes
    return natural


def natural_scales(name: str, layer: W4A4Linear, dtype: torch.dtype) -> Tensor:
    """The scales of a layer for runs of neighbouring channels: [N, G], or [N, 1] for whole rows.

    Raises:
        ValueError: its groups are not such runs, or the scales do not fit in `dtype`; the message
            has the layer's `name`.
    """
    scales = layer.group_scales().cpu()
    if _has_groups(layer):
        scales = scales[:, _groups_in_order(name, layer)]
    if not _has_groups(layer) or layer.config.weight_quant != "per_group":
        scales = scales[:, :1]
    stored = scales.to(dtype)
    if not torch.equal(stored.float(), scales):
        raise _not_expressible(name, f"its scales do not fit in {dtype}")
    return stored.contiguous()


def _groups_in_order(name: str, layer: W4A4Linear) -> Tensor:
    """The index of the group of each run of neighbouring channels: int64 [G]."""
    k, size = layer.in_features, layer.group_size
    if k % size:
        raise _not_expressible(name, f"its {k} channels are not a multiple of group_size={size}")
    group = torch.empty(k, dtype=torch.int64)
    group[layer.perm.cpu().long()] = torch.arange(k) // size
    runs = group.view(-1, size)
    if (runs != runs[:, :1]).any():
        raise _not_expressible(
            name,
            "its groups are not neighbouring channels (quantize with sort='none', or move "
            "permutations into other layers with fold_permutations)",
        )
    return runs[:, 0]
