"""The files in a model's folder, read with distrust: JSON, safetensors and their index."""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .files import atomic_file
from .tensors import DTYPES

CONFIG = "config.json"
TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# As safetensors calls them.
STORED_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def check_file(path: Path) -> None:
    """Refuse what has no end or never begins to answer: a device, a pipe, a folder."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")


class Header(NamedTuple):
    """Of a tensor in a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(paths: Iterable[str | os.PathLike]) -> dict[str, Header]:
    """The tensors in files, none of them read; CheckpointError for a name in two of them."""
    headers: dict[str, Header] = {}
    for path in map(Path, paths):
        check_file(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    if name in headers:
                        raise CheckpointError(f"{path}: tensor {name} is in {headers[name].path}")
                    dtype = STORED_DTYPES.get(part.get_dtype(), part.get_dtype())
                    headers[name] = Header(path, tuple(part.get_shape()), dtype)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    return headers


def tensors_file(paths: Iterable[str | os.PathLike]) -> Path:
    """What to blame for a tensor that none of a folder's files holds: the one file, or the index of
    several."""
    first, *more = map(Path, paths)
    return first.with_name(INDEX) if more else first


def read_json(path: Path) -> dict[str, Any]:
    check_file(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds no object")
    return fields


def stored_tensors(folder: Path) -> dict[str, Header]:
    """What the folder's one safetensors file holds, or all those that its index names."""
    index = folder / INDEX
    if not os.path.lexists(index):
        return read_headers([folder / TENSORS])
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: weight_map must name a file for each tensor")
    for name, file in placed.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(f"{index}: tensor {name} is in {file!r}, no file of the folder")
    headers = read_headers(folder / file for file in sorted(set(placed.values())))
    for name in sorted(set(headers) | set(placed)):
        if name not in headers or headers[name].path.name != placed.get(name):
            raise CheckpointError(f"{index}: tensor {name} is not in {placed.get(name)!r}")
    return headers


def raw_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The size in bytes of a safetensors file's JSON header, and the header itself. For files that
    are known to be sound: `read_headers` is what reads those of others."""
    size = int.from_bytes(file.read(8), "little")
    return size, json.loads(file.read(size))


class Mapped:
    """Tensors of safetensors files in the files' own pages: read-only, and no memory of the
    process's own."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def read(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors of a file that `manifest.read_headers` has found sound."""
        with open(path, "rb") as file:
            size, entries = raw_header(file)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(pages)
        tensors = {}
        for name in names:
            dtype = DTYPES[STORED_DTYPES[entries[name]["dtype"]]]
            begin, end = entries[name]["data_offsets"]
            flat = torch.empty(0, dtype=dtype)
            if end > begin:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The given buffer is not writable")
                    count = (end - begin) // dtype.itemsize
                    flat = torch.frombuffer(
                        pages, dtype=dtype, count=count, offset=8 + size + begin
                    )
            tensors[name] = flat.view(entries[name]["shape"])
        return tensors

    def release(self) -> None:
        """Let the system have all pages back; what is used again is read again."""
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, {"format": "pt"})
