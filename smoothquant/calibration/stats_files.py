"""Statistics of layer inputs in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..channels.statistics import STAT_DTYPES, ChannelStats
from ..core.errors import CheckpointError
from ..core.files import atomic_file
from ..core.tensor_files import raw_header

STATS_FORMAT = "mixedquant-stats"
STATS_VERSION = 1
# What activation scales may be stored as.
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_stats(stats: Mapping[str, ChannelStats], path: str | os.PathLike) -> None:
    """Write statistics to one safetensors file, whole or not at all: equal ones are equal bytes.

    An object that stands under several names is stored once and is one object again when loaded.
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
    """Put a safetensors file's metadata, which safetensors writes in random order, in one."""
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
    """Statistics as a caller gave them, read if they are in a file."""
    return load_stats(stats) if isinstance(stats, (str, os.PathLike)) else stats


def load_stats(path: str | os.PathLike) -> dict[str, ChannelStats]:
    """Read statistics that `save_stats` wrote, or published activation scales.

    Args:
        path: a file of `save_stats`, or what `load_act_scales` takes: a published
            ``act_scales/*.pt`` of max|x| per channel. Of these, mean, rms and max name the same
            channels (`ChannelStats.from_max`), and no code in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged or something else; the message names the file
            and what is wrong in it.
    """
    if Path(path).suffix in (".pt", ".pth"):
        return {name: ChannelStats.from_max(s) for name, s in load_act_scales(path).items()}
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != STATS_FORMAT:
        raise CheckpointError(f"{path}: not a file of calibration statistics")
    if metadata.get("version") != str(STATS_VERSION):
        raise CheckpointError(
            f"{path}: format version {metadata.get('version')!r}, this package reads "
            f"{STATS_VERSION}"
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
    """Write activation scales, whole or not at all: safetensors, or for .pt as published.

    A .pt file is read by code written for the published repositories.
    """
    # clones: safetensors refuses tensors that share memory
    scales = {name: scale.detach().cpu().clone().contiguous() for name, scale in scales.items()}
    with atomic_file(path) as temporary:
        if Path(path).suffix in (".pt", ".pth"):
            torch.save(scales, temporary)
        else:
            safetensors.torch.save_file(scales, temporary)


def load_act_scales(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read activation scales: name -> max|x| per channel, float32 [K], CPU.

    Args:
        path: a published .pt file (read with ``weights_only=True``: no code in it is run), a file
            of `save_act_scales`, or one of `save_stats`, whose abs_max is taken.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == STATS_FORMAT:
            return {name: entry.abs_max for name, entry in load_stats(path).items()}
        scales = tensors
    else:
        try:
            scales = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and the unpickler each raise their own
            # torch's words may advise to run the code in it
            said = "" if "weights_only" in str(error) else f": {error}"
            raise CheckpointError(
                f"{path}: not a readable file of tensors and nothing else{said}"
            ) from error
    if not isinstance(scales, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(scales).__name__}")
    for name, scale in scales.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: expected names of layers, found {name!r:.80}")
        # a view of few values may claim to be a vector of more than memory holds
        plain = isinstance(scale, Tensor) and scale.layout == torch.strided
        if not plain or scale.ndim != 1 or not scale.is_contiguous():
            raise CheckpointError(f"{path}: {name} is no vector of one scale per channel")
        if scale.dtype not in SCALE_DTYPES or scale.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is {scale.dtype} on {scale.device}, no floats")
        scales[name] = scale = scale.detach().float()
        if not torch.isfinite(scale).all() or (scale < 0).any():
            raise CheckpointError(f"{path}: {name} holds a negative or non-finite scale")
    return scales


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
