"""One cell in, one result out."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import random
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant import ops
from smoothquant.bundled import (
    BUNDLED_MODELS,
    DATA,
    WIKITEXT_FILES,
    cache_folder,
    check_model_name,
    load_model,
    wikitext,
)
from smoothquant.calibration import collect_stats, load_stats, save_stats, token_blocks
from smoothquant.checkpoint import save_quantized
from smoothquant.config import MixedQuantConfig
from smoothquant.model_size import Byte, distinct_tensors, get_model_size
from smoothquant.ppl_eval import Evaluator
from smoothquant.quantize import quantize

from .grid import Cell
from .store import Store, file_sha256

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("smoothquant", "torch", "transformers")

# Files of a model folder that take part in its numbers.
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.bin",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def package_versions() -> dict[str, str]:
    """Version of every package that takes part in a cell's numbers."""
    return {name: import_module(name).__version__ for name in PACKAGES}


def wikitext_identity(split: str) -> dict[str, Any]:
    """Name, split and sha256 of one of the bundled WikiText-2 texts."""
    path = DATA / "wikitext-2-raw" / WIKITEXT_FILES[split]
    return {"data": "wikitext-2-raw", "split": split, "sha256": file_sha256(path)}


class Bench:
    """A model and what the cells of one sweep share, each thing made at most once, when needed.

    Args:
        source: what `smoothquant.bundled.load_model` takes: bundled name, folder, Hugging Face id.
        dtype: a name in DTYPES, for the model's floating-point tensors.
        store: where finished calibrations lie.
        progress: show progress bars.

    Raises:
        ValueError: source or dtype cannot be understood. Nothing is loaded yet.
    """

    def __init__(self, source: str, dtype: str, store: Store, *, progress: bool = True) -> None:
        check_model_name(source)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self.source, self.dtype, self.store, self.progress = source, dtype, store, progress
        self._loaded: tuple[nn.Module, Any] | None = None
        self._evaluators: dict[str, Evaluator] = {}
        self._stats: tuple[str, Mapping] | None = None

    @property
    def name(self) -> str:
        """The model's short name: bundled name, name of the folder, or Hugging Face id."""
        return Path(self.source).resolve().name if os.path.isdir(self.source) else self.source

    def loaded(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer); the model is shared by all cells and must not be changed."""
        if self._loaded is None:
            print(f"Loading {self.source} ...", file=sys.stderr, flush=True)
            self._loaded = load_model(self.source, dtype=DTYPES[self.dtype])
        return self._loaded

    def identity(self) -> dict[str, Any]:
        """Name, sha256 of the model's files, dtype; loads the model only to have it downloaded."""
        folder = self._folder()
        if folder is None:
            self.loaded()
            folder = self._folder()
        names = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
        digests = {name: file_sha256(folder / name) for name in sorted(names)}
        if not digests:
            raise ValueError(f"model: no model files in {str(folder)!r}")
        return {"name": self.name, "files": digests, "dtype": self.dtype}

    def _folder(self) -> Path | None:
        if self.source == "tiny-opt":
            return DATA / "tiny-opt"
        if self.source in BUNDLED_MODELS:
            folder = cache_folder() / self.source
            return folder if folder.is_dir() else None
        if os.path.isdir(self.source):
            return Path(self.source)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self.source, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        # A download that was broken off leaves the small files only.
        whole = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        return folder if whole or self._loaded else None

    def evaluator(self, evaluation: Mapping[str, Any]) -> Evaluator:
        """The test windows of an evaluation, tokenized once."""
        name = json.dumps(dict(evaluation), sort_keys=True)
        if name not in self._evaluators:
            model, tokenizer = self.loaded()
            check_seqlen(model, evaluation["seqlen"])
            rows = wikitext(evaluation["split"])
            try:
                self._evaluators[name] = Evaluator(
                    rows,
                    tokenizer,
                    "cpu",
                    evaluation["windows"],
                    seq_len=evaluation["seqlen"],
                    progress=False,
                )
            except ValueError as error:
                raise ValueError(f"windows, seqlen: {error}") from error
        return self._evaluators[name]

    def stats(self, calibration: Cell) -> Mapping:
        """The stored statistics of a finished calibration cell."""
        if self._stats is None or self._stats[0] != calibration.key:
            self._stats = calibration.key, load_stats(self.store.artifact(calibration))
        return self._stats[1]


def check_seqlen(model: nn.Module, seqlen: int) -> None:
    """Raise ValueError if the model has no positions for windows of `seqlen` tokens."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise ValueError(f"seqlen must be at most the model's {limit} positions; got {seqlen}")


def run_cell(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Do a cell's work and return its result, JSON values only.

    Everything under "run" (time, speed, machine) differs from run to run; all else is a function
    of the cell.

    Raises:
        ValueError: the cell does not fit the bench's model.
        RuntimeError: the saved file's payload differs from the reported size.
    """
    started = time.perf_counter()
    result = _TASKS[cell.task](cell, bench)
    result["run"].update(
        cell_seconds=round(time.perf_counter() - started, 3),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        chip=chip_name(),
        threads=torch.get_num_threads(),
        isa=ops.isa(),
    )
    return result


def _calibrate(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, tokenizer = bench.loaded()
    blocks = calibration_blocks(tokenizer, cell.calibration)
    check_seqlen(model, cell.calibration["block_size"])
    stats = collect_stats(model, blocks, progress=bench.progress)
    path = bench.store.artifact(cell)
    save_stats(stats, path)
    return {
        "tokens": sum(block.numel() for block in blocks),
        "layer_inputs": len({id(entry) for entry in stats.values()}),
        # Of the file, not of the statistics: equal tensors do not make equal files.
        "run": {"artifact_sha256": file_sha256(path)},
    }


def calibration_blocks(tokenizer: Any, calibration: Mapping[str, Any]) -> list[Tensor]:
    """Token blocks int64 [1, block_size], drawn by the seed from all over the texts.

    Running text inside of a block, many articles across blocks: what a model reads in use.
    """
    rows = wikitext(calibration["split"])
    every = token_blocks(rows, tokenizer, None, calibration["block_size"])
    wanted = calibration["blocks"]
    if wanted > len(every):
        raise ValueError(
            f"calibration blocks must be at most the {len(every)} of {calibration['block_size']} "
            f"tokens in the {calibration['split']} texts; got {wanted}"
        )
    chosen = random.Random(calibration["seed"]).sample(range(len(every)), wanted)
    return [every[index] for index in sorted(chosen)]


def _evaluate_baseline(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, _ = bench.loaded()
    elements = sum(t.numel() for t in distinct_tensors(model)[0].values() if t.is_floating_point())
    return {
        **_perplexity(model, cell, bench),
        "model_bytes": get_model_size(model) // Byte,
        "model_bytes_16_bit": 2 * elements,
    }


def _evaluate_quantized(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, _ = bench.loaded()
    config = MixedQuantConfig.from_dict(dict(cell.config))
    calibration = Cell(
        "calibration", model=cell.model, versions=cell.versions, calibration=cell.calibration
    )
    stats = bench.stats(calibration)
    started = time.perf_counter()
    model = module_copy(model)
    layers = quantize(model, config, stats, progress=False)
    quantize_seconds = time.perf_counter() - started
    result = _perplexity(model, cell, bench)
    result["run"]["quantize_seconds"] = round(quantize_seconds, 3)
    result["model_bytes"] = get_model_size(model) // Byte
    result.update(_layer_totals(layers))
    if config.backend == "int4":
        result["file_payload_bytes"] = saved_payload_bytes(model)
        if result["file_payload_bytes"] != result["model_bytes"]:
            raise RuntimeError(
                f"the saved file holds {result['file_payload_bytes']} bytes of tensors, "
                f"the reported size is {result['model_bytes']}"
            )
    return result


_TASKS = {
    "calibration": _calibrate,
    "baseline": _evaluate_baseline,
    "quantized": _evaluate_quantized,
}


def module_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules but share its tensors, so that layers can be swapped for nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _perplexity(model: nn.Module, cell: Cell, bench: Bench) -> dict[str, Any]:
    evaluator = bench.evaluator(cell.evaluation)
    started = time.perf_counter()
    nlls = evaluator.token_nlls(model)
    seconds = time.perf_counter() - started
    nll = nlls.mean()
    perplexity = nll.exp()
    # A model that overflows is a result too; null is what JSON has for it.
    finite = bool(torch.isfinite(perplexity))
    return {
        "perplexity": perplexity.item() if finite else None,
        "nll": nll.item() if finite else None,
        "tokens": nlls.numel(),
        "windows": evaluator.num_windows,
        "seqlen": evaluator.seq_len,
        "run": {
            "seconds": round(seconds, 3),
            "tokens_per_s": round(evaluator.num_windows * evaluator.seq_len / seconds, 1),
        },
    }


def _layer_totals(layers: list) -> dict[str, Any]:
    quantized = [layer for layer in layers if layer.action == "quantized"]
    elements = sum(math.prod(layer.shape) for layer in quantized)
    bits = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in quantized)
    return {
        "quantized_layers": len(quantized),
        "quantized_weights": elements,
        "bits_per_weight": bits / elements,
    }


def saved_payload_bytes(model: nn.Module) -> int:
    """Save a quantized model and return the bytes of tensors in its file, headers left out."""
    with tempfile.TemporaryDirectory(prefix="mixedquant-") as parent:
        folder = Path(parent) / "model"
        save_quantized(model, folder)
        return sum(_payload(path) for path in folder.glob("*.safetensors"))


def _payload(path: Path) -> int:
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - header


def chip_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
