"""One cell in, one result out."""

from __future__ import annotations

import copy
import datetime
import json
import math
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from smoothquant import quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration.collect import collect_stats
from smoothquant.calibration.stats_files import load_stats, save_stats
from smoothquant.calibration.tokens import draw_blocks
from smoothquant.checkpoints.attachment import attach
from smoothquant.cli.doctor import chip_name
from smoothquant.core.config import MixedQuantConfig
from smoothquant.core.files import atomic_file
from smoothquant.evaluation.layer_report import by_kind, layer_report
from smoothquant.evaluation.perplexity import Evaluator, HeadLogits
from smoothquant.kernels import ops
from smoothquant.model_size import Byte, get_model_size
from smoothquant.models.modules import distinct_tensors, module_copy
from smoothquant.quantization.records import LinearRecord
from smoothquant.quantization.undo import simulate, simulated_copy

from . import peers
from .grid import Cell
from .identity import check_source, model_identity, package_versions, wikitext_identity
from .store import Store, file_sha256

__all__ = [
    "Bench",
    "SafetensorError",
    "calibration_blocks",
    "check_seqlen",
    "package_versions",
    "run_cell",
    "saved_payload_bytes",
    "wikitext_identity",
]

HEAD_INPUTS = "head_inputs"  # the tensor that a baseline leaves for comparisons
KEPT_LOGITS_BYTES = 1 << 30  # of a baseline, from cell to cell; more are computed anew


class Bench:
    """A model and what the cells of one sweep share, each thing made at most once, when needed.

    Args:
        source: what `smoothquant.bundled.load_model` takes: bundled name, folder, Hugging Face id.
        dtype: a name in DTYPES, for the model's floating-point tensors.
        store: where finished calibrations and baselines lie.
        progress: show progress bars.

    Raises:
        ValueError: source or dtype cannot be understood. Nothing is loaded yet.
    """

    def __init__(self, source: str, dtype: str, store: Store, *, progress: bool = True) -> None:
        check_source(source, dtype)
        self.source, self.dtype, self.store, self.progress = source, dtype, store, progress
        self._loaded: tuple[nn.Module, Any] | None = None
        self._evaluators: dict[str, Evaluator] = {}
        self._stats: dict[str, Mapping] = {}
        self._blocks: dict[str, list[Tensor]] = {}
        self._references: dict[str, list[Tensor]] = {}

    def loaded(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer); the model is shared by all cells and must not be changed."""
        if self._loaded is None:
            print(f"Loading {self.source} ...", file=sys.stderr, flush=True)
            self._loaded = load_model(self.source, dtype=getattr(torch, self.dtype))
        return self._loaded

    def identity(self) -> dict[str, Any]:
        """What a cell's key says of the model."""
        return model_identity(self.source, self.dtype)

    def check(self, cells: Sequence[Cell]) -> None:
        """Find what the model or the texts cannot give before any of the cells is computed.

        Raises:
            ValueError: more tokens than the model has positions or the texts have windows, or a
                model that a method cannot quantize.
            RuntimeError: the model is not the one that the cells are of.
        """
        model, _ = self.loaded()
        found = self.identity()
        for cell in cells:
            if cell.model != found:
                changed = sorted({*cell.model["files"].items()} ^ {*found["files"].items()})
                raise RuntimeError(
                    f"model: {self.source!r} is not what this sweep was planned for, or changed "
                    f"since ({', '.join(sorted({name for name, _ in changed})) or 'dtype'}); run "
                    "the sweep again for the model as it is now"
                )
            if cell.calibration:
                check_seqlen(model, cell.calibration["block_size"])
            if cell.evaluation:
                self.evaluator(cell.evaluation)
            if "method" in (cell.config or {}):
                peers.check_model(model)

    def evaluator(self, evaluation: Mapping[str, Any]) -> Evaluator:
        """The test windows of an evaluation, tokenized once."""
        name = json.dumps([evaluation[key] for key in ("sha256", "windows", "seqlen")])
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

    def stats(self, cell: Cell) -> Mapping:
        """The stored statistics of the finished calibration that a cell uses."""
        calibration = cell.needs[0]
        if calibration.key not in self._stats:
            self._stats[calibration.key] = load_stats(self.store.artifact(calibration))
        return self._stats[calibration.key]

    def blocks(self, calibration: Mapping[str, Any]) -> list[Tensor]:
        """The token blocks of a calibration."""
        name = json.dumps(dict(calibration), sort_keys=True)
        if name not in self._blocks:
            self._blocks[name] = calibration_blocks(self.loaded()[1], calibration)
        return self._blocks[name]

    def reference(self, cell: Cell) -> nn.Module | HeadLogits | list[Tensor]:
        """What a quantized model is compared with: logits from the stored head inputs of the
        finished baseline of the same windows, or the model itself where it left none."""
        model, _ = self.loaded()
        _, baseline = cell.needs
        path = self.store.artifact(baseline)
        if not path.is_file():
            return model
        if baseline.key in self._references:
            return self._references[baseline.key]
        # read a window at a time
        inputs = safetensors.safe_open(path, framework="pt").get_slice(HEAD_INPUTS)
        head = model.get_output_embeddings()
        logits = HeadLogits(head, inputs)
        windows, tokens, _ = inputs.get_shape()
        if windows * tokens * head.weight[:, 0].nbytes > KEPT_LOGITS_BYTES:
            return logits
        return self._references.setdefault(baseline.key, [logits[i] for i in range(windows)])


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
    model, _ = bench.loaded()
    blocks = bench.blocks(cell.calibration)
    check_seqlen(model, cell.calibration["block_size"])
    stats = collect_stats(model, blocks, progress=bench.progress)
    path = bench.store.artifact(cell)
    save_stats(stats, path)
    return {
        "tokens": sum(block.numel() for block in blocks),
        "layer_inputs": len({id(entry) for entry in stats.values()}),
        "artifact_sha256": file_sha256(path),
        "run": {},
    }


def calibration_blocks(tokenizer: Any, calibration: Mapping[str, Any]) -> list[Tensor]:
    """Token blocks int64 [1, block_size], drawn by the seed from all over the texts.

    Running text inside of a block, many articles across blocks: what a model reads in use.
    """
    return draw_blocks(
        wikitext(calibration["split"]),
        tokenizer,
        calibration["blocks"],
        calibration["block_size"],
        calibration["seed"],
    )


def _evaluate_baseline(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, _ = bench.loaded()
    elements = sum(t.numel() for t in distinct_tensors(model)[0].values() if t.is_floating_point())
    evaluator = bench.evaluator(cell.evaluation)
    with _timed(model) as seconds:
        nlls, head_inputs = evaluator.head_inputs(model)
    result = _scores(evaluator, nlls, seconds)
    path = bench.store.artifact(cell)
    if head_inputs is not None:
        with atomic_file(path) as temporary:
            safetensors.torch.save_file({HEAD_INPUTS: head_inputs}, temporary)
        result["artifact_sha256"] = file_sha256(path)
    return {
        **result,
        "model_bytes": get_model_size(model) // Byte,
        "model_bytes_16_bit": 2 * elements,
    }


def quantized_model(
    cell: Cell, bench: Bench, **changes: Any
) -> tuple[nn.Module, list[LinearRecord], float]:
    """A quantized model by the cell's config, its records and the seconds it took.

    The bench's model stays as it is, and shares all tensors that are not quantized.
    """
    config = {**cell.config, **changes}
    model, _ = bench.loaded()
    stats, batches = bench.stats(cell), bench.blocks(cell.calibration)
    started = time.perf_counter()
    if "method" in config:
        # SmoothQuant changes norms and weights where they are
        model = copy.deepcopy(model)
        method = peers.METHODS[config["method"]]
        layers = method(model, stats, batches, config["group_size"])
    else:
        model = module_copy(model)
        layers = quantize(model, _packable(config), stats, batches, progress=False)
        if config["backend"] == "fake":
            simulate(model)
    return model, layers, time.perf_counter() - started


def _packable(fields: Mapping[str, Any]) -> MixedQuantConfig:
    """The config with packed integers in place of a simulation where they can hold its choices: the
    simulation of their codes then differs from them by the arithmetic alone, also after GPTQ."""
    try:
        return MixedQuantConfig.from_dict({**fields, "backend": "int4"})
    except ValueError:  # more than 4 bits, a scale of the whole live batch
        return MixedQuantConfig.from_dict(dict(fields))


def _evaluate_quantized(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, layers, quantize_seconds = quantized_model(cell, bench)
    evaluator = bench.evaluator(cell.evaluation)
    with _timed(model) as seconds:
        nlls, kls, same = evaluator.token_comparison(model, bench.reference(cell))
    result = _scores(evaluator, nlls, seconds)
    kl = kls.mean().item()
    result["kl"] = kl if math.isfinite(kl) else None
    result["top1"] = same.double().mean().item()
    result["run"]["quantize_seconds"] = round(quantize_seconds, 3)
    result["model_bytes"] = get_model_size(model) // Byte
    result.update(_layer_totals(layers))
    if cell.config.get("backend") == "int4":
        result["file_payload_bytes"] = saved_payload_bytes(model)
        if result["file_payload_bytes"] != result["model_bytes"]:
            raise RuntimeError(
                f"the saved file holds {result['file_payload_bytes']} bytes of tensors, "
                f"the reported size is {result['model_bytes']}"
            )
    return result


def _measure_layers(cell: Cell, bench: Bench) -> dict[str, Any]:
    evaluator = bench.evaluator(cell.evaluation)
    windows = [evaluator.window(index) for index in range(evaluator.num_windows)]
    model, _, _ = quantized_model(cell, bench, backend="int4")
    models = {"int4": model, "fake": simulated_copy(model)}
    errors = by_kind(layer_report(bench.loaded()[0], models, windows, progress=False))
    return {
        "tokens": sum(window.numel() for window in windows),
        "windows": evaluator.num_windows,
        "seqlen": evaluator.seq_len,
        "compared": list(errors[0].noise),
        # null stands for Inf (equal outputs) and NaN alike
        "errors": [
            {
                "layer": error.layer,
                "kind": error.kind,
                "decibels": {
                    name: value if math.isfinite(value) else None
                    for name, value in error.decibels.items()
                },
            }
            for error in errors
        ],
        "run": {},
    }


_TASKS = {
    "calibration": _calibrate,
    "baseline": _evaluate_baseline,
    "quantized": _evaluate_quantized,
    "layers": _measure_layers,
}


@contextmanager
def _timed(model: nn.Module) -> Iterator[list[float]]:
    """Collects the seconds of each forward pass inside."""
    seconds: list[float] = []
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        seconds.append(time.perf_counter() - started[0])

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _scores(evaluator: Evaluator, nlls: Tensor, forward_seconds: list[float]) -> dict[str, Any]:
    nll, seconds = nlls.mean(), sum(forward_seconds)
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
    attach(model)
    with tempfile.TemporaryDirectory(prefix="mixedquant-") as folder:
        # as `save_quantized` does, but nothing needs to be on the disk when it is measured
        model.save_pretrained(folder)
        return sum(_payload(path) for path in Path(folder).glob("*.safetensors"))


def _payload(path: Path) -> int:
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - header
