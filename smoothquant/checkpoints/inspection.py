"""What a model is made of, in bytes: of a folder, and of a model before and after `quantize`."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError
from ..core.tensor_files import Header
from ..core.tensors import DTYPES, dtype_name
from ..layers.linear import QuantizedLinear
from ..models.modules import stored_bytes
from ..quantization.records import quantization_report
from .folder import load_quantized, open_quantized
from .manifest import FORMAT_VERSION
from .sizes import bytes_by_kind

ROWS = 3  # of a trial input


def inspect_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder of a quantized model holds, as plain JSON values; no tensor is read.

    "layers" has an entry for every parameter, as `quantization_report` has; "kinds" are those of
    `bytes_by_kind`.

    Raises:
        ValueError, CheckpointError: as `smoothquant.load_quantized`, but for tensors' values.
    """
    model, manifest, headers, _ = open_quantized(folder)
    held = {name: _bytes(header) for name, header in headers.items()}
    layers = []
    for record in quantization_report(model):
        entry = {**dataclasses.asdict(record), "shape": list(record.shape)}
        if record.action == "quantized":
            layer = model.get_submodule(record.name)
            entry["bytes"] = sum(
                held.get(f"{record.name}.{key}", 0) for key in layer.state_dict() if key != "bias"
            )
            entry["choices"] = manifest.linears[record.name]["choices"]
        else:
            name = next(n for n in (record.name, f"{record.name}.weight") if _is_tensor(model, n))
            entry["bytes"] = held.get(name, 0)
            if name in manifest.shared:
                entry["shared_with"] = manifest.shared[name]
            owner = headers[manifest.shared.get(name, name)]
            entry["bits_per_weight"] = 8.0 * DTYPES[owner.dtype].itemsize
        layers.append(entry)
    quantized = [entry for entry in layers if entry["action"] == "quantized"]
    weights = sum(math.prod(entry["shape"]) for entry in quantized)
    return {
        "folder": str(Path(folder).resolve()),
        "architecture": type(model).__name__,
        "format_version": FORMAT_VERSION,
        "dtype": dtype_name(manifest.dtype),
        "bytes": sum(held.values()),
        "tensors": len(held),
        "quantized_layers": len(quantized),
        "quantized_weights": weights,
        "bits_per_weight": 8 * sum(entry["bytes"] for entry in quantized) / max(1, weights),
        "kinds": bytes_by_kind(model, held),
        "config": manifest.config.to_dict(),
        "layers": layers,
    }


@torch.no_grad()
def verify_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a folder of a quantized model with all checks, and try its layers.

    Returns:
        {"folder", "tensors", "bytes", "layers", "checks"}; checks: in words, what was found true.

    Raises:
        ValueError, CheckpointError: as `smoothquant.load_quantized`; CheckpointError too for a size
            that is not the model's, or a layer that gives no finite number or not the same bits to
            a row alone and among others.
    """
    headers = open_quantized(folder).headers
    model = load_quantized(folder)
    size, stored = stored_bytes(model), sum(map(_bytes, headers.values()))
    if size != stored:
        raise CheckpointError(f"{folder}: its tensors take {stored} bytes, the model's {size}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        x = torch.randn(ROWS, layer.in_features, generator=generator)
        y = layer(x)
        if not torch.isfinite(y).all():
            raise CheckpointError(f"{folder}: linear {name} gives NaN or Inf for a normal input")
        if layer.config.backend == "int4" and not torch.equal(layer(x[1:2]), y[1:2]):
            raise CheckpointError(f"{folder}: linear {name} gives a row other bits among others")
    return {
        "folder": str(Path(folder).resolve()),
        "tensors": len(headers),
        "bytes": stored,
        "layers": len(layers),
        "checks": [
            "config.json, tensors, shapes and dtypes fit each other",
            "permutations are permutations; codes and scales are in their ranges; no NaN, no Inf",
            "the files' payload is the model's size, to the byte",
            "every quantized layer gives finite outputs, and a row the same bits in any batch",
        ],
    }


def _bytes(header: Header) -> int:
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize


def _is_tensor(model: nn.Module, name: str) -> bool:
    block, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(block), leaf, None), Tensor)
    except AttributeError:  # no such module
        return False
