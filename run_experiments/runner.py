"""Computes a cell: one cell in, one result out."""

from __future__ import annotations

import copy
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from smoothquant.core.messages import naming
from smoothquant.core.tensor_files import raw_header
from smoothquant.evaluation.layer_report import by_kind, layer_report
from smoothquant.evaluation.perplexity import Evaluator, HeadLogits
from smoothquant.kernels import ops
from smoothquant.model_size import Byte, get_model_size
from smoothquant.models.modules import distinct_tensors, module_copy
from smoothquant.models.running import check_positions, check_token_ids
from smoothquant.quantization.records import LinearRecord
from smoothquant.quantization.undo import simulate, simulated_copy

from . import peers
from .grid import Cell
from .identity import check_source, model_identity, package_versions, wikitext_identity
from .store import Store, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Bench",
    "SafetensorError",
    "calibration_blocks",
    "package_versions",
    "run_cell",
    "saved_payload_bytes",
    "wikitext_identity",
]

HEAD_INPUTS = "head_inputs"  # the tensor that a baseline stores for comparisons
KEPT_LOGITS_BYTES = 1 << 30  # keep a baseline's logits in memory up to this size, else recompute


class Bench:
    """A model and the data that its cells share. Everything is loaded once, on first use.

    Args:
        source: anything `smoothquant.bundled.load_model` accepts: a bundled name, a folder or a
            Hugging Face id.
        dtype: a name in DTYPES, for the model's floating-point tensors.
        store: where finished calibrations and baselines are.
        progress: show progress bars.

    Raises:
        ValueError: source or dtype is invalid. Nothing is loaded yet.
    """

    def __init__(self, source: str, dtype: str, store: Store, *, progress: bool = True) -> None:
        check_source(source, dtype)
        self.source, self.dtype, self.store, self.progress = source, dtype, store, progress
        self.keep = False
        # (key, model) of the most accurate packed model so far, if `keep`, and its perplexity
        self.kept: tuple[str, nn.Module] | None = None
        self._kept_perplexity = math.inf
        self._loaded: tuple[nn.Module, Any] | None = None
        self._evaluators: dict[str, Evaluator] = {}
        self._stats: dict[str, Mapping] = {}
        self._blocks: dict[str, list[Tensor]] = {}
        self._references: dict[str, list[Tensor]] = {}

    def loaded(self) -> tuple[nn.Module, Any]:
        """Return (model, tokenizer). All cells share the model: do not change it."""
        if self._loaded is None:
            print(f"Loading {self.source} ...", file=sys.stderr, flush=True)
            self._loaded = load_model(self.source, dtype=getattr(torch, self.dtype))
        return self._loaded

    def offer(self, cell: Cell, model: nn.Module, perplexity: float | None) -> None:
        """Keep a cell's model if it is asked for and more accurate than the one kept before."""
        if self.keep and perplexity is not None and perplexity < self._kept_perplexity:
            self.kept, self._kept_perplexity = (cell.key, model), perplexity

    def identity(self) -> dict[str, Any]:
        """What a cell's key records about the model."""
        return model_identity(self.source, self.dtype)

    def check(self, cells: Sequence[Cell]) -> None:
        """Check that every cell can be computed, before the first one is.

        Raises:
            ValueError: the model has too few positions or token ids, a text has too few windows or
                blocks, or a method cannot quantize the model.
            RuntimeError: the model is not the one that the cells were planned for.
        """
        model, _ = self.loaded()
        identity = self.identity()
        for cell in cells:
            if cell.model != identity:
                changed = {*cell.model["files"].items()} ^ {*identity["files"].items()}
                names = ", ".join(sorted({name for name, _ in changed})) or "dtype"
                raise RuntimeError(
                    f"model: {self.source!r} is not the model that this sweep was planned for, or "
                    f"has changed since ({names}); run the sweep again for the current model"
                )
            if cell.calibration:
                self.blocks(cell.calibration)
            if cell.evaluation:
                with naming(windows="layer_windows" if cell.task == "layers" else "windows"):
                    self.evaluator(cell.evaluation)
            if "method" in (cell.config or {}):
                peers.check_model(model)

    def evaluator(self, evaluation: Mapping[str, Any]) -> Evaluator:
        """Return the evaluator for an evaluation; its windows are tokenized once."""
        name = json.dumps([evaluation[key] for key in ("sha256", "windows", "seqlen")])
        if name not in self._evaluators:
            model, tokenizer = self.loaded()
            check_positions(model, seqlen=evaluation["seqlen"])
            rows = wikitext(evaluation["split"])
            with naming(n_samples="windows", seq_len="seqlen"):
                evaluator = Evaluator(
                    rows,
                    tokenizer,
                    "cpu",
                    evaluation["windows"],
                    seq_len=evaluation["seqlen"],
                    progress=False,
                )
                evaluator.check_model(model)
            self._evaluators[name] = evaluator
        return self._evaluators[name]

    def stats(self, cell: Cell) -> Mapping:
        """Return the statistics of the calibration that a cell needs, which must be finished."""
        calibration = cell.needs[0]
        if calibration.key not in self._stats:
            self._stats[calibration.key] = load_stats(self.store.artifact(calibration))
        return self._stats[calibration.key]

    def blocks(self, calibration: Mapping[str, Any]) -> list[Tensor]:
        """Return the token blocks of a calibration."""
        name = json.dumps(dict(calibration), sort_keys=True)
        if name not in self._blocks:
            model, tokenizer = self.loaded()
            check_positions(model, calibration_block_size=calibration["block_size"])
            blocks = calibration_blocks(tokenizer, calibration)
            check_token_ids(model, torch.cat(blocks))
            self._blocks[name] = blocks
        return self._blocks[name]

    def reference(self, cell: Cell) -> nn.Module | HeadLogits | list[Tensor]:
        """Return what a quantized model is compared with on the same windows.

        This is the logits, from the head inputs that the finished baseline stored. If it stored
        none, it is the unquantized model itself.
        """
        model: Any = self.loaded()[0]
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


def run_cell(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Compute a cell and return its result as JSON values.

    Only the values under "run" (time, speed, machine) vary from run to run.

    Raises:
        ValueError: the cell does not fit the bench's model.
        RuntimeError: the payload of the saved file differs from the reported size.
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


def _part(part: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A part of a specification that the cell's task requires."""
    if part is None:
        raise ValueError("the cell's specification is incomplete")
    return part


def _calibrate(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, _ = bench.loaded()
    calibration = _part(cell.calibration)
    blocks = bench.blocks(calibration)
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
    """Draw token blocks, int64 [1, block_size], from all over the text.

    A block is running text, and the blocks come from many articles, as in normal use of a model.
    """
    with naming(
        num_blocks="calibration_blocks or gptq_blocks", block_size="calibration_block_size"
    ):
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
    evaluator = bench.evaluator(_part(cell.evaluation))
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
    """Quantize a copy of the bench's model by the cell's config.

    The bench's model is not changed. The copy shares all tensors that are not quantized.

    Args:
        cell: a "quantized" or "layers" cell.
        bench: the model and its calibration data.
        changes: config fields to replace.

    Returns:
        (quantized model, a record per layer, seconds for quantizing).
    """
    config = {**_part(cell.config), **changes}
    model, _ = bench.loaded()
    stats, batches = bench.stats(cell), bench.blocks(_part(cell.calibration))
    started = time.perf_counter()
    if "method" in config:
        # a deep copy: smoothing changes norms and weights in place
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
    """The config for packed integers, if they support its choices.

    A simulation is then made from the packed codes. It differs from them only in the arithmetic,
    also after GPTQ.
    """
    try:
        return MixedQuantConfig.from_dict({**fields, "backend": "int4"})
    except ValueError:  # more than 4 bits, or one scale for the whole batch
        return MixedQuantConfig.from_dict(dict(fields))


def _evaluate_quantized(cell: Cell, bench: Bench) -> dict[str, Any]:
    model, layers, quantize_seconds = quantized_model(cell, bench)
    evaluator = bench.evaluator(_part(cell.evaluation))
    with _timed(model) as seconds:
        nlls, kls, same = evaluator.token_comparison(model, bench.reference(cell))
    result = _scores(evaluator, nlls, seconds)
    kl = kls.mean().item()
    result["kl"] = kl if math.isfinite(kl) else None
    result["top1"] = same.double().mean().item()
    result["run"]["quantize_seconds"] = round(quantize_seconds, 3)
    result["model_bytes"] = get_model_size(model) // Byte
    result.update(_layer_totals(layers))
    if _part(cell.config).get("backend") == "int4":
        result["file_payload_bytes"] = saved_payload_bytes(model)
        if result["file_payload_bytes"] != result["model_bytes"]:
            raise RuntimeError(
                f"the saved file has {result['file_payload_bytes']} bytes of tensors, but the "
                f"reported size is {result['model_bytes']}"
            )
        bench.offer(cell, model, result["perplexity"])
    return result


def _measure_layers(cell: Cell, bench: Bench) -> dict[str, Any]:
    evaluator = bench.evaluator(_part(cell.evaluation))
    windows = [evaluator.window(index) for index in range(evaluator.num_windows)]
    model, _, _ = quantized_model(cell, bench, backend="int4")
    models = {"int4": model, "fake": simulated_copy(model)}
    errors = by_kind(layer_report(bench.loaded()[0], models, windows, progress=False))
    return {
        "tokens": sum(window.numel() for window in windows),
        "windows": evaluator.num_windows,
        "seqlen": evaluator.seq_len,
        "compared": list(errors[0].noise),
        # null means Inf (equal outputs) or NaN
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
    """Collect the seconds of each forward pass in the block."""
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
    # A model that overflows is a result too; JSON has only null for it.
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


def _layer_totals(layers: Sequence[LinearRecord]) -> dict[str, Any]:
    quantized = [layer for layer in layers if layer.action == "quantized"]
    elements = sum(math.prod(layer.shape) for layer in quantized)
    bits = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in quantized)
    return {
        "quantized_layers": len(quantized),
        "quantized_weights": elements,
        "bits_per_weight": bits / elements,
    }


def saved_payload_bytes(model: nn.Module) -> int:
    """Save a quantized model and return the bytes of tensors in its files, without headers."""
    attach(model)
    with tempfile.TemporaryDirectory(prefix="mixedquant-") as folder:
        # like `save_quantized`, but without flushing to disk
        cast("PreTrainedModel", model).save_pretrained(folder)
        return sum(_payload(path) for path in Path(folder).glob("*.safetensors"))


def _payload(path: Path) -> int:
    with open(path, "rb") as file:
        header_bytes, _ = raw_header(file)
    return path.stat().st_size - 8 - header_bytes
