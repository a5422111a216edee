"""Inspect and verify folders of quantized models."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError
from ..core.tensor_files import CONFIG, Header, read_json
from ..core.tensors import DTYPES, dtype_name
from ..layers.linear import QuantizedLinear
from ..models.modules import stored_bytes
from ..quantization.records import quantization_report
from .folder import load_quantized, open_quantized
from .manifest import FORMAT_VERSION, config_changed
from .sizes import bytes_by_kind

ROWS = 3  # of a test input


def inspect_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Describe a folder of a quantized model as plain JSON values, without reading tensors.

    "layers" has an entry for every parameter, like `quantization_report`; "kinds" is the result of
    `bytes_by_kind`.

    Raises:
        ValueError, CheckpointError: as `smoothquant.load_quantized`, except that tensor values are
            not checked.
    """
    model, manifest, headers, _ = open_quantized(folder)
    sizes = {name: _bytes(header) for name, header in headers.items()}
    layers = []
    for record in quantization_report(model):
        entry: dict[str, Any] = {**dataclasses.asdict(record), "shape": list(record.shape)}
        if record.action == "quantized":
            layer = model.get_submodule(record.name)
            entry["bytes"] = sum(
                sizes.get(f"{record.name}.{key}", 0) for key in layer.state_dict() if key != "bias"
            )
            entry["choices"] = manifest.linears[record.name]["choices"]
        else:
            name = next(n for n in (record.name, f"{record.name}.weight") if _is_tensor(model, n))
            entry["bytes"] = sizes.get(name, 0)
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
        "bytes": sum(sizes.values()),
        "tensors": len(sizes),
        "quantized_layers": len(quantized),
        "quantized_weights": weights,
        "bits_per_weight": 8 * sum(entry["bytes"] for entry in quantized) / max(1, weights),
        "kinds": bytes_by_kind(model, sizes),
        "config": manifest.config.to_dict(),
        "layers": layers,
    }


@torch.no_grad()
def verify_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Load a folder of a quantized model with all checks, and run its layers.

    Returns:
        {"folder", "tensors", "bytes", "layers", "checks"}, where "checks" describes the checks
        passed.

    Raises:
        ValueError, CheckpointError: as `smoothquant.load_quantized`. CheckpointError also if the
            size does not match the model, config.json was edited, a layer's output is not finite,
            or a row gets different bits alone and in a batch.
    """
    _, manifest, headers, _ = open_quantized(folder)
    model = load_quantized(folder)
    if config_changed(manifest, read_json(Path(folder) / CONFIG)):
        raise CheckpointError(
            f"{Path(folder) / CONFIG}: edited after the model was saved (its checksum differs); if "
            "the change is intended, load the model and save it again"
        )
    size, stored = stored_bytes(model), sum(map(_bytes, headers.values()))
    if size != stored:
        raise CheckpointError(
            f"{folder}: its tensors have {stored} bytes, but the model has {size}"
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        x = torch.randn(ROWS, layer.in_features, generator=generator)
        y = layer(x)
        if not torch.isfinite(y).all():
            raise CheckpointError(f"{folder}: linear {name} gives NaN or Inf for a normal input")
        if layer.config.backend == "int4" and not torch.equal(layer(x[1:2]), y[1:2]):
            raise CheckpointError(
                f"{folder}: linear {name} gives a row different bits alone and in a batch"
            )
    return {
        "folder": str(Path(folder).resolve()),
        "tensors": len(headers),
        "bytes": stored,
        "layers": len(layers),
        "checks": [
            "config.json, tensors, shapes and dtypes are consistent",
            "permutations are valid, codes and scales are in range, and no value is NaN or Inf",
            "the stored tensors have exactly the size of the model",
            "every quantized layer gives finite outputs, and a row gets the same bits in any batch",
            "tensors, choices and config are those that were saved"
            if manifest.checksums
            else "no checksums: an earlier version saved the folder",
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
