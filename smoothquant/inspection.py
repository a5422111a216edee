"""What a model is made of, in bytes: of a folder, and of a model before and after `quantize`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_quantized, open_quantized
from .config import MixedQuantConfig
from .errors import CheckpointError
from .families import known_inputs, output_heads
from .linear import QuantizedLinear, linear_class
from .manifest import DTYPES, FORMAT_VERSION, Header, dtype_name
from .model_size import Byte, distinct_tensors, get_model_size
from .moe import W4A4Experts
from .quantize import (
    checked_groups,
    module_copy,
    module_places,
    quantization_report,
    replace_module,
)
from .sorting import ChannelStats

# What a quantized linear's tensors count as.
PARTS_OF_LINEAR = {
    "qweight": "4-bit codes",
    "scales": "scales",
    "salient_weight": "salient weights",
    "salient_scales": "salient weights",
    "perm": "permutations",
    "simulated_weight": "simulated weights",
    "bias": "biases",
}
ROWS = 3  # of a trial input


def bytes_by_kind(model: nn.Module, held: Mapping[str, int] | None = None) -> dict[str, int]:
    """What a model's bytes are spent on: {kind: bytes}, shared tensors once.

    held: {tensor: bytes} of the distinct tensors, in the place of the model's own.
    """
    if held is None:
        held = {name: tensor.nbytes for name, tensor in distinct_tensors(model)[0].items()}
    items = known_inputs(model)
    heads, routers = output_heads(model), {item.router for item in items}
    fused = {item.experts for item in items}
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds: Counter[str] = Counter()
    for name, size in held.items():
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        if isinstance(module, QuantizedLinear):
            kind = PARTS_OF_LINEAR[leaf]
        elif isinstance(module, nn.Embedding):
            kind = "embeddings"
        elif leaf == "bias":
            kind = "biases"
        elif block in heads:
            kind = "output head"
        elif block in fused or (isinstance(module, nn.Linear) and block not in routers):
            kind = "float linears"
        else:
            kind = "norms and others"
        kinds[kind] += size
    return dict(kinds)


def planned_bytes(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None = None,
    *,
    stats_to_come: bool = False,
) -> dict[str, int]:
    """`bytes_by_kind` of what `quantize` would make of a float model, which stays as it is; the
    same errors for arguments that do not fit it. Nothing is packed.

    stats_to_come: the model will be calibrated; an input whose statistics or weights' values are
        not there counts with the average share of salient channels.
    """
    _, groups = checked_groups(model, config, stats, stats_to_come=stats_to_come)
    config = config.settled()  # what is found by trial takes no bytes
    planned = module_copy(model)
    places = module_places(planned)
    blocks: dict[str, dict[tuple[int, str], QuantizedLinear]] = {}
    for group in groups:
        for name, (weight, bias) in zip(group.names, group.matrices(model), strict=True):
            n, k = weight.shape
            layer = linear_class(config)(
                k,
                n,
                bias is not None,
                config=config,
                num_salient=group.num_salient,
                dtype=weight.dtype,
                device="meta",
            )
            if group.expert:
                blocks.setdefault(group.expert[0], {})[group.expert[1:]] = layer
            else:
                replace_module(planned, name, layer, places)
    for name, layers in blocks.items():
        experts = W4A4Experts(layers, model.get_submodule(name).act_fn)
        replace_module(planned, name, experts, places)
    return bytes_by_kind(planned)


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
    size, stored = get_model_size(model) // Byte, sum(map(_bytes, headers.values()))
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
