"""Checked reading of the files in a model's folder: JSON, safetensors and their index."""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
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

# safetensors' names of dtypes -> torch's
STORED_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip


# {how a file begins: what it is, and what to do}
FOREIGN = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
    b"GGUF": "is a GGUF file: load it by AutoModelForCausalLM.from_pretrained(folder, "
    "gguf_file=name) of transformers, and save it by save_pretrained",
}
# Files of a model that may be pointers.
MODEL_FILES = ("*.safetensors", "*.json", "*.gguf", "*.bin", "*.model")


def check_file(path: Path) -> None:
    """Raise CheckpointError unless path is a regular file: reading a device or pipe may hang."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file{remedy(path.parent)}")


def remedy(path: str | os.PathLike) -> str:
    """What a file of another format is and what to do, to append to an error message.

    Args:
        path: a file or folder, which need not exist. In a folder, GGUF files are told only if no
            safetensors file is beside them.

    Returns:
        A text that begins with "; ", or "".
    """
    path = Path(path)
    found = [path]
    if os.path.isdir(path):
        found = sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
        if any(file.suffix == ".safetensors" for file in found):
            found = [file for file in found if file.suffix != ".gguf"]
    for file in filter(os.path.isfile, found):
        with suppress(OSError), open(file, "rb") as content:
            begin = content.read(max(map(len, FOREIGN)))
            for magic, text in FOREIGN.items():
                if begin.startswith(magic):
                    return f"; {file.name} {text}"
    return ""


MOST_JSON_BYTES = 2**28  # of a file: a million quantized layers


class Header(NamedTuple):
    """Where a tensor is stored, its shape and dtype.

    path: the safetensors file. dtype: torch's name of it ("bfloat16"), or safetensors' own name if
    torch has none.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(paths: Iterable[str | os.PathLike]) -> dict[str, Header]:
    """The headers of all tensors in some safetensors files, by name; reads no tensor data.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is in two of them.
    """
    headers: dict[str, Header] = {}
    for path in map(Path, paths):
        check_file(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    if name in headers:
                        raise CheckpointError(
                            f"{path}: tensor {name} is also in {headers[name].path}"
                        )
                    dtype = STORED_DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
                    headers[name] = Header(path, tuple(tensor.get_shape()), dtype)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}{remedy(path)}") from error
    return headers


def tensors_file(paths: Iterable[str | os.PathLike]) -> Path:
    """The file that errors about a missing tensor name: the only file, or the index of several."""
    first, *more = map(Path, paths)
    return first.with_name(INDEX) if more else first


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it holds anything else."""
    check_file(path)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise CheckpointError(f"{path}: more than {MOST_JSON_BYTES:,} bytes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}{remedy(path)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields


def stored_tensors(folder: Path) -> dict[str, Header]:
    """The headers of a checkpoint's tensors: those in its one file, or in all files of its index.

    Raises:
        CheckpointError: a file is damaged, or files and index disagree.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(folder / TENSORS):
            raise CheckpointError(
                f"{folder / TENSORS}: no such file{remedy(folder) or _pickle_remedy(folder)}"
            )
        return read_headers([folder / TENSORS])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must name a file for each tensor")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index}: tensor {name} is in {file!r}, which does not name a safetensors file "
                "in this folder"
            )
    headers = read_headers(folder / file for file in sorted(set(weight_map.values())))
    for name in sorted(set(headers) | set(weight_map)):
        if name not in headers or headers[name].path.name != weight_map.get(name):
            raise CheckpointError(f"{index}: tensor {name} is not in {weight_map.get(name)!r}")
    return headers


def _pickle_remedy(folder: Path) -> str:
    for path in sorted(folder.glob("pytorch_model*.bin")):
        load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')"
        return (
            f'; {path.name} holds pickled tensors: convert them by python -c "from transformers '
            f'import AutoModelForCausalLM; {load}.save_pretrained({str(folder)!r})"'
        )
    return ""


def raw_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The size in bytes of a safetensors file's JSON header, and the header itself.

    Checks nothing: read files of unknown origin with `read_headers`.
    """
    size = int.from_bytes(file.read(8), "little")
    return size, json.loads(file.read(size))


class Mapped:
    """Memory-mapped tensors of safetensors files: read-only views of the files' pages."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def read(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors of a file that `read_headers` accepted; dtypes: `STORED_DTYPES`."""
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
        """Return all pages to the system; later accesses read them from the disk again."""
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)


def mapped_tensors(
    headers: Mapping[str, Header], mapped: Mapped | None = None
) -> dict[str, Tensor]:
    """The tensors of some headers, memory-mapped; None makes a `Mapped` for them."""
    mapped = mapped or Mapped()
    tensors: dict[str, Tensor] = {}
    for path in {header.path: None for header in headers.values()}:
        tensors |= mapped.read(path, [n for n, header in headers.items() if header.path == path])
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, {"format": "pt"})
