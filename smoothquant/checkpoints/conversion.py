"""Quantize a checkpoint of any size with the memory of one decoder layer.

Float weights are memory-mapped, so the operating system loads what a layer needs and drops it
again. The model runs one decoder layer at a time (`smoothquant.calibration.blocks`). Each packed
layer is written to a file and mapped from there. Memory holds only the current layer and the hidden
states of the calibration tokens.

Finished layers are kept in the folder ``.<name of the target>.partial`` beside the target. After an
interruption, the same call resumes from there and produces the same bytes. The result is moved to
the target at the end, so that the target is complete or absent.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.collect import collect_stats
from ..calibration.stats_files import given_stats, load_stats, save_stats
from ..calibration.tokens import chosen_batches
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..core.errors import CheckpointError
from ..core.files import atomic_file, disk_errors, hidden_sibling, locked, publish_folder
from ..core.tensor_files import (
    CONFIG,
    INDEX,
    STORED_DTYPES,
    Header,
    Mapped,
    mapped_tensors,
    read_headers,
    read_json,
    remedy,
    stored_tensors,
    write_tensors,
)
from ..core.tensors import DTYPES, FLOATS, dtype_name
from ..core.version import __version__
from ..models.families import decoder_layers
from ..models.loading import (
    Companions,
    StoredNames,
    check_complete,
    check_unused,
    loaded_in_float32,
)
from ..models.modules import assign, distinct_tensors
from ..models.packed_weights import (
    PackedWeight,
    float_headers,
    packed_weights,
    warn_of_packed,
)
from ..quantization.checks import check_batches
from ..quantization.engine import Plan
from ..quantization.pipeline import Group
from ..quantization.records import LinearRecord, QuantizationReport
from .attachment import finish_and_attach
from .checksums import config_checksum, tensor_checksums
from .folder import check_target, float_model, usual_errors
from .manifest import CARD, Manifest, insert_linears, may_hold
from .model_card import model_card

logger = logging.getLogger("smoothquant")

UPCAST = ("bfloat16", "float16")
LAYOUT = 3  # of the files from which a conversion is resumed


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | str | os.PathLike | None = None,
    batches: Sequence[Tensor] | None = None,
    *,
    tokenizer: Any = None,
    spill: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a folder with a float model into a folder that `load_quantized` reads.

    The result equals, bit for bit, loading the model in its stored dtype and calling
    `smoothquant.quantize` and `save_quantized`, except that each decoder layer has a file of its
    own.

    Args:
        source: a folder with config.json and model.safetensors, or with shards and their index.
            FP8 and MXFP4 weights (`smoothquant.models.packed_weights`) are dequantized one at a
            time into files beside the target.
        target: as for `save_quantized`.
        config, stats, batches: as for `quantize`. Missing statistics are collected from the
            batches, one decoder layer at a time.
        tokenizer: the model's tokenizer; None loads it from `source`.
        spill: keep the hidden states between decoder layers and the matrices of GPTQ in files
            beside the target, not in memory.
        overwrite: replace a folder that holds a quantized model.
        progress: show progress bars.

    Returns:
        A record for every parameter, as from `quantization_report`.

    Raises:
        ValueError: there is no such folder, or the decoder layers of the model are unknown; also as
            `quantize` and `save_quantized`.
        CheckpointError: a source file is damaged, or a tensor is missing.
        RuntimeError: another conversion into `target` is running.
        OSError: the disk is full, or writing failed otherwise.
    """
    target = check_target(target, overwrite=overwrite)
    if not isinstance(config, MixedQuantConfig):
        raise TypeError(f"config must be a MixedQuantConfig; got {type(config).__name__}")
    if config.tune:
        raise ValueError(
            "tune=True needs the whole model in memory: use smoothquant.quantize and "
            "save_quantized (the command without --by-layer), or recipe='best'"
        )
    source, stats = _checked_source(source), given_stats(stats)
    headers, packed = _stored_weights(source)
    model, layers = float_source(source, headers)
    batches, config = chosen_batches(model, config, stats, batches, tokenizer or source)
    check_batches(config, batches)
    with (
        locked(hidden_sibling(target, "lock"), f"another conversion into {target} is running"),
        usual_errors(target),
        disk_errors(target),
    ):
        check_target(target, overwrite=overwrite)  # another one may have finished meanwhile
        work = hidden_sibling(target, "partial")
        _begin(work, _identity(source, headers, config, stats, batches))
        folder, mapped = work / "folder", Mapped()
        spilled = work / "spilled" if spill else None
        if progress:
            print(
                f"Keeping finished layers in {work} until the conversion is complete.", flush=True
            )
        try:
            _map_weights(model, source, headers, packed, mapped, work / "fused")

            def collect(
                model: nn.Module, batches: Sequence[Tensor], head: str | None
            ) -> dict[str, ChannelStats]:
                path = work / "stats.safetensors"
                collected = _statistics(
                    path, model, batches, spilled, progress, config.ignore, head
                )
                mapped.release()
                return collected

            plan = Plan(
                model, config, stats, batches, collect=collect, spill=spilled, progress=progress
            )
            conversion = _Conversion(plan, layers, folder, mapped)
            conversion.run()
            records = finish_and_attach(plan)
            conversion.write_rest(source)
            publish_folder(folder, target, overwrite=overwrite)
        except Exception:
            if folder.exists() and not any(folder.iterdir()):  # nothing to resume from
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        return records


class _Conversion:
    """Packs the decoder layers of a model one by one into files of a folder."""

    def __init__(self, plan: Plan, layers: list[str], folder: Path, mapped: Mapped) -> None:
        self.plan, self.config = plan, plan.config
        model: Any = plan.model
        self.model = model
        self.layers, self.folder, self.mapped = layers, folder, mapped
        # The manifest lists how the config of each layer differs from this one.
        self.model.mixedquant_config = self.config
        self.checksums: dict[str, str] = {}

    def path(self, index: int) -> Path:
        """The file of a layer; after the last layer, that of the remaining tensors."""
        return self.folder / f"model-{index + 1:05}-of-{len(self.layers) + 1:05}.safetensors"

    def _description(self, index: int) -> Path:
        """The file that describes a finished layer, for resuming."""
        return self.folder.parent / f"layer-{index + 1:05}.json"

    def run(self) -> None:
        """Pack and write every decoder layer that an earlier run did not finish, and pack what is
        outside the layers."""
        rest = len(self.layers)
        groups_of: dict[int, list[Group]] = {index: [] for index in range(rest + 1)}
        for group in self.plan.groups:
            groups_of[self._layer_of(group.name)].append(group)
        unfinished = {}
        for index, groups in groups_of.items():
            if index < rest and self.path(index).exists():
                self._restore(index)
            else:
                unfinished[index] = groups
        # Calibration tokens run through all layers in one pass; without them, layers are
        # independent.
        passes = list(unfinished.values())
        if self.config.needs_tokens:
            passes = [[g for g in self.plan.groups if self._layer_of(g.name) in unfinished]]
        records: dict[int, list[LinearRecord]] = {}
        with self.plan.bar() as bar:
            for groups in filter(None, passes):
                for record in self.plan.pack(groups):
                    index = self._layer_of(record.name)
                    layer_records = records.setdefault(index, [])
                    layer_records.append(record)
                    bar.update()
                    count = sum(len(group.names) for group in groups_of[index])
                    if index < rest and len(layer_records) == count:
                        self._write(index, layer_records)

    def _layer_of(self, name: str) -> int:
        """The index of the decoder layer that a module is in; one more for any other."""
        for index, layer in enumerate(self.layers):
            if name.startswith(layer + "."):
                return index
        return len(self.layers)

    def _tensors(self, index: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The distinct tensors and the aliases of a layer, by full name."""
        prefix = self.layers[index] + "."
        tensors, aliases = distinct_tensors(self.model)
        return (
            {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
            {name: owner for name, owner in aliases.items() if name.startswith(prefix)},
        )

    def _write(self, index: int, records: list[LinearRecord]) -> None:
        """Write a packed layer to its file and map it from there."""
        prefix = self.layers[index] + "."
        linears = Manifest.of_model(self.model).to_dict()["linears"]
        tensors = self._tensors(index)[0]
        checksums = tensor_checksums(tensors, linears)
        self.checksums |= checksums
        description = {
            "linears": {name: e for name, e in linears.items() if name.startswith(prefix)},
            "checksums": checksums,
            "records": [dataclasses.asdict(record) for record in records],
        }
        # Not in the file's metadata, which safetensors writes in random order.
        with atomic_file(self._description(index)) as partial:
            partial.write_text(json.dumps(description), encoding="utf-8")
        write_tensors(tensors, self.path(index))
        del tensors
        self._map(index)
        self.mapped.release()

    def _restore(self, index: int) -> None:
        """Replace a float layer by the quantized one that an earlier run wrote."""
        path = self._description(index)
        description = read_json(path)
        fields = Manifest(self.config, next(self.model.parameters()).dtype).to_dict()
        fields["linears"] = description["linears"]
        insert_linears(self.model, Manifest.from_dict(fields, path), path)
        self._map(index)
        self.checksums |= description["checksums"]
        for fields in description["records"]:
            record = LinearRecord(**{**fields, "shape": tuple(fields["shape"])})
            self.plan.records[record.name] = record

    def _map(self, index: int) -> None:
        tensors, aliases = self._tensors(index)
        mapped = self.mapped.read(self.path(index), tensors)
        mapped |= {name: mapped[owner] for name, owner in aliases.items() if owner in mapped}
        for name, tensor in mapped.items():
            assign(self.model, name, tensor)

    def write_rest(self, source: Path) -> None:
        """Write the tensors outside the layers, the index, config, tokenizer and model card."""
        inside = tuple(layer + "." for layer in self.layers)
        tensors = distinct_tensors(self.model)[0]
        last = self.path(len(self.layers))
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
        write_tensors(rest, last)
        places = {
            name: (last if name in rest else self.path(self._layer_of(name))).name
            for name in tensors
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.dtype = next(self.model.parameters()).dtype
        manifest = self.model.config.quantization_config
        manifest.checksums = (
            self.checksums
            | tensor_checksums(rest, manifest.linears)
            | config_checksum(json.loads(self.model.config.to_json_string()))
        )
        self.model.config.save_pretrained(self.folder)
        Companions(source).save_pretrained(self.folder)
        (self.folder / CARD).write_text(model_card(self.model), encoding="utf-8")


def float_source(source: Path, headers: Mapping[str, Header]) -> tuple[nn.Module, list[str]]:
    """The float model of a folder, with its parameters on meta, and its decoder layers."""
    fields = read_json(source / CONFIG)
    model = float_model(source, fields.get("architectures"), headers, _main_dtype(fields, headers))
    vars(model.config).pop("quantization_config", None)  # of FP8 weights
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"source: the decoder layers of {type(model).__name__} are unknown; load the model "
            "and use smoothquant.quantize instead"
        )
    return model.eval(), layers


def float_shapes(source: str | os.PathLike) -> nn.Module:
    """The float model of a folder, with its parameters on meta in the dtype of the files.

    Raises:
        ValueError, CheckpointError: as `convert`.
    """
    headers, packed = _stored_weights(_checked_source(source))
    model, _ = float_source(Path(source), headers)
    return model.to(_main_dtype(read_json(Path(source) / CONFIG) if packed else {}, headers))


def _stored_weights(source: Path) -> tuple[dict[str, Header], dict[str, PackedWeight]]:
    """The headers of a folder's float weights, and how those are stored that are not floats; raises
    the errors of `packed_weights`."""
    headers = stored_tensors(source)
    quantization = read_json(source / CONFIG).get("quantization_config")
    packed = packed_weights(source, quantization, headers)
    return headers if quantization is None else float_headers(headers, packed), packed


def _main_dtype(fields: Mapping[str, Any], headers: Mapping[str, Header]) -> torch.dtype:
    """The dtype that transformers loads a folder in: the one in config.json, else that of most
    stored values."""
    named = DTYPES.get(str(fields.get("dtype") or fields.get("torch_dtype")))
    if named in FLOATS:
        return named
    sizes: collections.Counter[torch.dtype] = collections.Counter(dict.fromkeys(FLOATS, 0))
    for header in headers.values():
        if DTYPES.get(header.dtype) in FLOATS:
            sizes[DTYPES[header.dtype]] += math.prod(header.shape)
    return sizes.most_common(1)[0][0]


def _checked_source(source: str | os.PathLike) -> Path:
    if not (Path(source) / CONFIG).is_file():
        raise ValueError(
            f"source must be a model folder with a config.json; got {source}{remedy(source)}"
        )
    return Path(source)


def _map_weights(
    model: Any,
    source: Path,
    headers: Mapping[str, Header],
    packed: Mapping[str, PackedWeight],
    mapped: Mapped,
    fused: Path,
) -> None:
    """Map a model's parameters from the files of `source`.

    Parameters that transformers builds from several tensors on loading, such as the experts of a
    layer, are built one at a time and stored in files of the folder `fused`. `packed` weights
    are dequantized there, and routers that transformers loads in float32 upcast.
    """
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    named = StoredNames(model)
    expected = named.expected
    check_unused(source, model, headers, named)
    floats = _unpacked(source, model, packed, mapped)
    readable = {
        name: header
        for name, header in headers.items()
        if name not in floats and header.dtype in STORED_DTYPES.values()
    }
    stored = mapped_tensors(readable, mapped)
    loaded: dict[str, tuple[Path, Tensor]] = {}
    parts: dict[str, WeightConverter | Callable[[], Tensor]] = {}
    for key in sorted(headers, key=dot_natural_key):
        name, pattern = named(key)
        if name in expected and key not in stored and key not in floats:
            raise _unusable(headers[key], key)
        if name in expected and pattern is None and key in floats:
            parts[name] = floats[key]
        elif name in expected and headers[key].dtype in UPCAST and loaded_in_float32(model, name):
            parts[name] = stored[key].float
        elif name in expected and pattern is None:
            loaded[name] = headers[key].path, stored[key]
        elif name in expected and pattern is not None:
            part: Any = parts.setdefault(name, copy.deepcopy(named.converters[pattern]))
            # annotated as a Future, but transformers accepts tensors, and functions that return one
            tensor = floats.get(key, partial(stored.__getitem__, key)) if floats else stored[key]
            part.add_tensor(name, key, pattern, tensor)
    for number, (name, part) in enumerate(parts.items()):
        path = fused / f"{number:05}.safetensors"
        if not path.exists():
            try:
                built: Any = (
                    {name: part()}
                    if callable(part)
                    else part.convert(name, model=model, config=model.config)
                )
            except Exception as error:  # wrong shapes may raise anything in transformers
                raise CheckpointError(f"{source}: cannot build {name}: {error}") from error
            built = {key: t[0] if isinstance(t, list) else t for key, t in built.items()}
            write_tensors(built, path)
            del built
            mapped.release()
        names = read_headers([path])
        loaded |= {key: (source, t) for key, t in mapped.read(path, names).items()}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    check_complete(source, model, set(expected) - set(loaded) - set(tied), ())
    for name, (path, tensor) in loaded.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name} must have shape {tuple(expected[name].shape)}; "
                f"got {tuple(tensor.shape)}"
            )
        if not may_hold(expected[name], tensor.dtype):
            raise _unusable(Header(path, tuple(tensor.shape), dtype_name(tensor.dtype)), name)
        assign(model, name, tensor)
    # As when transformers loads a model: of two stored weights that differ, none is given up.
    apart = [
        name
        for name, owner in tied.items()
        if name in loaded and owner in loaded and not _same(loaded[name][1], loaded[owner][1])
    ]
    model.tie_weights()
    for name in apart:
        assign(model, name, loaded[name][1])


def _unpacked(
    source: Path, model: nn.Module, packed: Mapping[str, PackedWeight], mapped: Mapped
) -> dict[str, Callable[[], Tensor]]:
    """{name of a packed weight: function that dequantizes it to the model's dtype}."""
    if not packed:
        return {}
    parts = {part: header for weight in packed.values() for part, header in weight.parts.items()}
    stored, dtype = mapped_tensors(parts, mapped), next(model.parameters()).dtype
    warn_of_packed(source, read_json(source / CONFIG)["quantization_config"], dtype)
    return {
        name: partial(weight.unpack, *(stored[part] for part in weight.parts), dtype=dtype)
        for name, weight in packed.items()
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _unusable(header: Header, name: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path}: tensor {name} must be float32, float16 or bfloat16; got {header.dtype} "
        "(save a float model by save_pretrained of transformers)"
    )


def _statistics(
    path: Path,
    model: nn.Module,
    batches: Sequence[Tensor],
    spill: Path | None,
    progress: bool,
    ignore: Sequence[str],
    head: str | None,
) -> dict[str, ChannelStats]:
    """Collect statistics into a file, unless an earlier run did; read them from there."""
    if not path.exists():
        stats = collect_stats(
            model, batches, by_layer=True, spill=spill, progress=progress, ignore=ignore, head=head
        )
        save_stats(stats, path)
    return load_stats(path)


def _identity(
    source: Path,
    headers: Mapping[str, Header],
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None,
    batches: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """What identifies a conversion: only the same one is resumed."""
    digest = hashlib.sha256()
    for batch in batches or ():
        digest.update(json.dumps(batch.tolist()).encode())
    for name, entry in sorted((stats or {}).items()):
        digest.update(name.encode())
        for tensor in entry.to_dict().values():
            digest.update(tensor.numpy().tobytes())
    paths = sorted({header.path for header in headers.values()})
    return {
        "version": __version__,
        "layout": LAYOUT,
        "model": config_checksum(read_json(source / CONFIG)),
        "config": config.to_dict(),
        "calibration": digest.hexdigest(),
        "source": {str(p.resolve()): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths},
    }


def _begin(work: Path, identity: dict[str, Any]) -> None:
    """Create the working folder, or resume from it if it belongs to the same conversion."""
    path = work / "conversion.json"
    text = json.dumps(identity, sort_keys=True, indent=1, default=str) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        logger.warning("resuming the conversion in %s", work)
        for leftover in work.rglob(".*.tmp"):  # from a killed process
            leftover.unlink()
        return
    if work.exists():
        logger.warning("starting over: %s belongs to another conversion", work)
        shutil.rmtree(work)
    (work / "folder").mkdir(parents=True)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
