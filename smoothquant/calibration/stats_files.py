"""Files of calibration statistics and activation scales."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..channels.statistics import STAT_DTYPES, ChannelStats
from ..core.errors import CheckpointError
from ..core.files import atomic_file
from ..core.tensor_files import raw_header, remedy

Entry = TypeVar("Entry")

STATS_FORMAT = "mixedquant-stats"
STATS_VERSION = 1
# Dtypes that files of activation scales may have.
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_stats(stats: Mapping[str, ChannelStats], path: str | os.PathLike) -> None:
    """Write statistics to a safetensors file, atomically. Equal statistics give equal bytes.

    An object that is stored under several names is written once, and is shared again after loading.
    """
    index_of: dict[int, int] = {}
    names: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    mean_only: list[int] = []
    for name, entry in stats.items():
        if not isinstance(entry, ChannelStats):
            raise TypeError(f"stats[{name!r}] must be ChannelStats; got {type(entry).__name__}")
        if id(entry) not in index_of:
            index = index_of[id(entry)] = len(index_of)
            tensors.update((f"{index}.{field}", t) for field, t in entry.to_dict().items())
            if entry.mean_only:
                mean_only.append(index)
        names[name] = index_of[id(entry)]
    metadata = {
        "format": STATS_FORMAT,
        "version": str(STATS_VERSION),
        "names": json.dumps(names),
        "mean_only": json.dumps(mean_only),
    }
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which safetensors writes in random order."""
    with open(path, "r+b") as file:
        size, header = raw_header(file)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def given_stats(
    stats: Mapping[str, ChannelStats] | str | os.PathLike | None,
) -> Mapping[str, ChannelStats] | None:
    """The statistics given, loaded first if they are a path."""
    return load_stats(stats) if isinstance(stats, (str, os.PathLike)) else stats


# transformers 4 had a linear for each matrix of an expert, and "block_sparse_moe" in Mixtral:
# (old part of a name, new part). An expert's gate and up projection read the same input.
RENAMED = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts\.\d+)\.(w1|w3|gate_proj|up_proj)$", r"\1.gate_up_proj"),
    (r"(\.experts\.\d+)\.w2$", r"\1.down_proj"),
)


def with_current_names(entries: Mapping[str, Entry], modules: Container[str]) -> dict[str, Entry]:
    """The entries, by names that the model has: those of transformers 4 are translated.

    Args:
        entries: {name of a linear or expert matrix: statistics or scales of its input}.
        modules: full names of the model's modules.
    """
    current = dict(entries)
    for name, entry in entries.items():
        new = name
        for old, part in RENAMED if name not in modules else ():
            new = re.sub(old, part, new)
        current.setdefault(new, entry)
    return current


def load_stats(path: str | os.PathLike) -> dict[str, ChannelStats]:
    """Read statistics written by `save_stats`, or published activation scales.

    Args:
        path: a file written by `save_stats`, or a published ``act_scales/*.pt`` file of max|x| per
            channel. Scales become statistics by `ChannelStats.from_max`; mean, rms and max then
            rank the channels alike. Code in the file is never run.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind. The message names the file
            and the problem.
    """
    if Path(path).suffix in (".pt", ".pth"):
        return {name: ChannelStats.from_max(s) for name, s in load_act_scales(path).items()}
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != STATS_FORMAT:
        raise CheckpointError(f"{path}: not a calibration statistics file")
    if metadata.get("version") != str(STATS_VERSION):
        raise CheckpointError(
            f"{path}: format version {metadata.get('version')!r} is not supported; this version of "
            f"smoothquant reads {STATS_VERSION}"
        )
    try:
        names, mean_only = json.loads(metadata["names"]), set(json.loads(metadata["mean_only"]))
        entries = {
            index: ChannelStats(
                {field: tensors[f"{index}.{field}"] for field in STAT_DTYPES}, index in mean_only
            )
            for index in set(names.values())
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged statistics: {error!r}") from error
    return {name: entries[index] for name, index in names.items()}


def save_act_scales(scales: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write activation scales to a .safetensors or .pt file, atomically.

    A .pt file has the published format, which the code of the published repositories reads.
    """
    # Cloned because safetensors rejects tensors that share memory.
    scales = {name: scale.detach().cpu().clone().contiguous() for name, scale in scales.items()}
    with atomic_file(path) as temporary:
        if Path(path).suffix in (".pt", ".pth"):
            buffer = io.BytesIO()  # torch reports a full disk in many ways
            torch.save(scales, buffer)
            temporary.write_bytes(buffer.getvalue())
        else:
            safetensors.torch.save_file(scales, temporary)


def load_act_scales(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read activation scales.

    Args:
        path: a published .pt file (loaded with ``weights_only=True``, so that no code in it runs),
            a file written by `save_act_scales`, or one written by `save_stats`, for its abs_max.

    Returns:
        {module name: max|x| per channel, float32 [K] on the CPU}.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == STATS_FORMAT:
            return {name: entry.abs_max for name, entry in load_stats(path).items()}
        scales = tensors
    else:
        try:
            scales = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and the unpickler raise errors of many types
            # torch's message may advise running the code in the file
            detail = "" if "weights_only" in str(error) else f": {error}"
            raise CheckpointError(
                f"{path}: not a readable file of tensors only{detail}{remedy(path)}"
            ) from error
    if not isinstance(scales, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors; got a {type(scales).__name__}")
    for name, scale in scales.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: expected layer names as keys; got {name!r:.80}")
        # An expanded view of a few values may claim more elements than fit in memory.
        plain = isinstance(scale, Tensor) and scale.layout == torch.strided
        if not plain or scale.ndim != 1 or not scale.is_contiguous():
            raise CheckpointError(f"{path}: {name} must be a vector of one scale per channel")
        if scale.dtype not in SCALE_DTYPES or scale.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {name} must be floating point on the CPU; got {scale.dtype} on "
                f"{scale.device}"
            )
        scales[name] = scale = scale.detach().float()
        if not torch.isfinite(scale).all() or (scale < 0).any():
            raise CheckpointError(f"{path}: {name} contains a negative or non-finite scale")
    return scales


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file: {error}{remedy(path)}"
        ) from error
