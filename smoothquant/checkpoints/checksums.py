"""Checksums that tie the tensors, the choices and the config of a saved model together.

They find accidents: files of different models mixed up, tensors swapped, fields edited, bits lost.
Nothing protects a folder against someone who recomputes them. CRC-32 is enough for that, and zlib
computes it at 1.5 GB/s, so that loading checks every tensor in about a tenth of its time.

A checksum does not depend on how tensors are divided among files. Folders of earlier versions have
none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.tensor_files import CONFIG

# Fields of config.json that transformers sets on saving, or that are checked otherwise.
UNCHECKED = {
    "_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype",
    "transformers_version",
}  # fmt: skip


def tensor_checksums(tensors: Mapping[str, Tensor], linears: Collection[str]) -> dict[str, str]:
    """The checksums of a model's tensors, those of each quantized linear taken together.

    Args:
        tensors: by full name; those on meta are left out.
        linears: the names of the quantized linears.

    Returns:
        {name of a linear or of another tensor: CRC-32 in hex}.
    """
    units: dict[str, list[str]] = {}
    for name in sorted(tensors):
        module = name.rpartition(".")[0]
        units.setdefault(module if module in linears else name, []).append(name)
    checksums = {}
    for unit, names in units.items():
        if any(tensors[name].is_meta for name in names):
            continue
        checksum = 0
        for name in names:
            checksum = zlib.crc32(name.removeprefix(unit).encode(), checksum)
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            checksum = zlib.crc32(plain.view(torch.uint8).numpy().data, checksum)
        checksums[unit] = f"{checksum:08x}"
    return checksums


def config_checksum(fields: Mapping[str, Any]) -> dict[str, str]:
    """{"config.json": the checksum of those of its fields that define the float model}."""
    return {CONFIG: json_checksum({k: v for k, v in fields.items() if k not in UNCHECKED})}


def json_checksum(value: Any) -> str:
    """The checksum of a JSON value, whatever the order of its fields."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
