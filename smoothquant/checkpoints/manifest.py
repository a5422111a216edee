"""The description of a quantized model in its folder, and the checks made when it is read.

It is stored in config.json under ``quantization_config``, where transformers looks for it:

quant_method     "mixedquant"
plugin           what to install and import before transformers can load the folder, for whoever
                 reads config.json; folders of earlier versions lack it
format_version   version of these fields and of the tensors (docs/format.md)
config           the model's MixedQuantConfig
dtype            the model's dtype: that of every float tensor without an entry in dtypes
linears          {name of a quantized linear: num_salient; also bias and quantize_output if true,
                 choices, the fields in which its config differs from the model's; and table, the
                 format of an output head or embeddings (`core.config.table_config`)}. The weight of
                 embeddings is the linear "packed" in them
shared           {tensor: the stored tensor whose memory it shares}
dtypes           {tensor or unsaved buffer: its dtype}, if it is not the expected one
kept             {module that stays as it is: why}, for reasons that the model itself does not show:
                 no calibration token reached it. Left out if empty
checksums        {linear, other stored tensor, or "config.json": its CRC-32} (`checksums`)
checksum         the CRC-32 of all other fields. Folders of earlier versions lack the last two.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import MixedQuantConfig, table_config
from ..core.errors import CheckpointError
from ..core.tensor_files import CONFIG, Header
from ..core.tensors import DTYPES, FLOATS, dtype_name, is_finite
from ..core.version import DISTRIBUTION, __version__
from ..layers.embedding import QuantizedEmbedding
from ..layers.experts import W4A4Experts
from ..layers.int8 import Int8Linear, blank_table
from ..layers.linear import QuantizedLinear, linear_class
from ..models.families import decoder_layers
from ..models.kept import unlike_experts, unlike_linear
from ..models.linears import is_linear, linear_weight
from ..models.modules import distinct_tensors, module_places, replace_module, unsaved_buffers
from ..models.routing import expert_names, expert_weights, is_fused_experts, num_experts
from ..models.running import text_model
from ..models.tables import unlike_embedding
from ..quantization.checks import non_finite_parameters
from .checksums import config_checksum, json_checksum, tensor_checksums

logger = logging.getLogger("smoothquant")

FORMAT_VERSION = 3
CARD = "README.md"

FIELDS = {
    "quant_method": str,
    "format_version": int,
    "config": dict,
    "dtype": str,
    "linears": dict,
    "shared": dict,
    "dtypes": dict,
}
OPTIONAL = {"plugin": str, "kept": dict}
CHECKSUM_FIELDS = {"checksums": dict, "checksum": str}
PLUGIN = f"pip install {DISTRIBUTION}; import smoothquant"

# Fields of a linear's entry, and the defaults of those that may be omitted.
LINEAR_FIELDS = {
    "num_salient": int,
    "bias": bool,
    "quantize_output": bool,
    "choices": dict,
    "table": str,
}
LINEAR_DEFAULTS: dict[str, Any] = {
    "bias": False,
    "quantize_output": False,
    "choices": {},
    "table": "",
}

# Config fields that `quantize` may choose per layer.
LAYER_CHOICES = ("act_format", "act_clip", "rotation")


@dataclasses.dataclass
class Manifest:
    """The fields of ``quantization_config``; the module's docstring describes them.

    altered: ``checksum`` does not match the other fields that were read.
    """

    config: MixedQuantConfig
    dtype: torch.dtype = torch.float32
    linears: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    shared: dict[str, str] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    altered: bool = False

    @classmethod
    def of_model(cls, model: nn.Module) -> Manifest:
        """The manifest of a quantized model in its current state.

        Raises:
            ValueError: the model is not quantized, or cannot be saved.
        """
        linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        if not linears:
            raise ValueError(f"model must be quantized; got {type(model).__name__}")
        config = getattr(model, "mixedquant_config", None)
        if config is None:
            config = next((m.config for m in linears.values() if not m.table), None)
        if config is None:
            raise ValueError(f"model must have a mixedquant_config; got {type(model).__name__}")
        entries = {
            name: {
                "num_salient": module.num_salient,
                "bias": module.bias is not None,
                "quantize_output": module.quantize_output,
                "choices": _choices(name, module, config),
                "table": module.table,
            }
            for name, module in linears.items()
        }
        tensors, shared = distinct_tensors(model)
        manifest = cls(config, _main_dtype(model), entries, shared)
        blanks = {
            name: manifest.blank(name, m.in_features, m.out_features) for name, m in linears.items()
        }
        usual = usual_dtypes(model, manifest.dtype, blanks)
        manifest.dtypes = {
            name: tensor.dtype
            for name, tensor in {**tensors, **unsaved_buffers(model)}.items()
            if tensor.dtype != usual[name]
        }
        manifest.kept = dict(getattr(model, "mixedquant_unreached", {}))
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        fields = {
            "quant_method": MixedQuantConfig.quant_method,
            "plugin": PLUGIN,
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "dtype": dtype_name(self.dtype),
            "linears": {
                name: {
                    field: value
                    for field, value in entry.items()
                    if field not in LINEAR_DEFAULTS or value != LINEAR_DEFAULTS[field]
                }
                for name, entry in self.linears.items()
            },
            "shared": self.shared,
            "dtypes": {name: dtype_name(dtype) for name, dtype in self.dtypes.items()},
        }
        if self.kept:
            fields["kept"] = self.kept
        if self.checksums:
            fields["checksums"] = self.checksums
            fields["checksum"] = json_checksum(fields)
        return fields

    @classmethod
    def from_dict(cls, fields: Any, path: Path | str = CONFIG) -> Manifest:
        """Check and read the result of `to_dict`.

        Args:
            fields: the parsed JSON value.
            path: the file it was read from, for error messages.

        Raises:
            CheckpointError: `fields` is not a valid manifest.
        """
        path = f"{path}: quantization_config"
        if isinstance(fields, dict) and fields.get("format_version", FORMAT_VERSION) != (
            FORMAT_VERSION
        ):
            raise CheckpointError(
                f"{path}: format_version {fields['format_version']!r} is not {FORMAT_VERSION}, "
                f"the one that {DISTRIBUTION} {__version__} reads"
            )
        summed = isinstance(fields, dict) and any(field in fields for field in CHECKSUM_FIELDS)
        expected = FIELDS | CHECKSUM_FIELDS if summed else FIELDS
        if isinstance(fields, dict):
            expected = expected | {name: OPTIONAL[name] for name in OPTIONAL.keys() & fields.keys()}
        _check_fields(path, "it", fields, expected)
        if fields["quant_method"] != MixedQuantConfig.quant_method:
            raise CheckpointError(
                f"{path}: quant_method must be {MixedQuantConfig.quant_method!r}; got "
                f"{fields['quant_method']!r}"
            )
        try:
            config = MixedQuantConfig.from_dict(fields["config"])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: config: {error}") from error
        if not fields["linears"]:
            raise CheckpointError(f"{path}: linears is empty")
        linears = {}
        for name, entry in fields["linears"].items():
            linears[name] = LINEAR_DEFAULTS | entry if isinstance(entry, dict) else entry
            _check_fields(path, f"linear {name}", linears[name], LINEAR_FIELDS)
        for field in ("shared", "dtypes", "checksums", "kept"):
            entries = fields.get(field, {})
            _check_fields(path, field, entries, dict.fromkeys(entries, str))
        for name, dtype in [("the model", fields["dtype"]), *fields["dtypes"].items()]:
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: dtype of {name} is {dtype!r}")
        dtype = DTYPES[fields["dtype"]]
        if dtype not in FLOATS:
            raise CheckpointError(f"{path}: dtype of the model is {fields['dtype']!r}")
        dtypes = {name: DTYPES[dtype] for name, dtype in fields["dtypes"].items()}
        rest = {field: value for field, value in fields.items() if field != "checksum"}
        return cls(
            config,
            dtype,
            linears,
            dict(fields["shared"]),
            dtypes,
            dict(fields.get("checksums", {})),
            kept=dict(fields.get("kept", {})),
            altered=summed and fields["checksum"] != json_checksum(rest),
        )

    def renamed(self, rename: Callable[[str], str | None]) -> Manifest:
        """The manifest with every name replaced by rename(name), or left out where that is None."""

        def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
            pairs = ((rename(name), entry) for name, entry in entries.items())
            return {name: entry for name, entry in pairs if name is not None}

        owners = renamed({name: rename(owner) for name, owner in self.shared.items()})
        return dataclasses.replace(
            self,
            linears=renamed(self.linears),
            shared={name: owner for name, owner in owners.items() if owner is not None},
            dtypes=renamed(self.dtypes),
            kept=renamed(self.kept),
        )

    def blank(self, name: str, k: int, n: int) -> QuantizedLinear:
        """Build the layer of a linear with k inputs and n outputs on meta.

        Raises:
            ValueError, TypeError: the linear's entry is invalid.
        """
        entry = self.linears[name]
        if not set(entry["choices"]) <= set(() if entry["table"] else LAYER_CHOICES):
            raise ValueError(f"choices may name {', '.join(LAYER_CHOICES)} only")
        layer = {
            "bias": entry["bias"],
            "num_salient": entry["num_salient"],
            "dtype": self.dtype,
            "device": "meta",
        }
        if entry["table"]:
            if entry["quantize_output"]:
                raise ValueError("quantize_output must be false for a head or embeddings")
            if entry["table"] == "int8" and entry["num_salient"]:
                raise ValueError(f"num_salient must be 0 for int8; got {entry['num_salient']}")
            return blank_table(entry["table"], k, n, self.config, **layer)
        return linear_class(self.config)(
            k,
            n,
            config=dataclasses.replace(self.config, **entry["choices"]),
            quantize_output=entry["quantize_output"],
            **layer,
        )


def _choices(name: str, module: QuantizedLinear, model_config: MixedQuantConfig) -> dict[str, Any]:
    """The fields in which a layer's config differs from the model's."""
    if module.table:
        if module.config != table_config(model_config, module.table, module.in_features):
            raise ValueError(f"{name} must have the model's MixedQuantConfig; it differs")
        return {}
    # Not of to_dict, which leaves out fields at their default.
    names = [field.name for field in dataclasses.fields(MixedQuantConfig)]
    differing = {
        field: getattr(module.config, field)
        for field in names
        if getattr(module.config, field) != getattr(model_config, field)
    }
    if not set(differing) <= set(LAYER_CHOICES):
        raise ValueError(f"all linears must have the same MixedQuantConfig; {name} differs")
    return differing


def _check_fields(path: str, where: str, value: Any, fields: dict[str, type]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise CheckpointError(f"{path}: {where} must have the fields {', '.join(fields)}")
    for field, kind in fields.items():
        if type(value[field]) is not kind:
            raise CheckpointError(f"{path}: {field} of {where} must be {kind.__name__}")


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first float parameter, which transformers takes for the model's dtype."""
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)


def usual_dtypes(
    model: nn.Module, dtype: torch.dtype, blanks: Mapping[str, nn.Module] | None = None
) -> dict[str, torch.dtype]:
    """The expected dtypes of a model's stored tensors and unsaved buffers.

    Args:
        dtype: the model's dtype.
        blanks: {module name: freshly built module}, used instead of the model's own modules.
    """
    usual = {}
    for prefix, module in model.named_modules():
        module = (blanks or {}).get(prefix, module)
        quantized = isinstance(module, QuantizedLinear)
        unsaved = module._non_persistent_buffers_set
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                if quantized or tensor.dtype not in FLOATS:
                    expected = tensor.dtype
                else:
                    expected = torch.float32 if leaf in unsaved else dtype
                usual[f"{prefix}.{leaf}" if prefix else leaf] = expected
    return usual


def insert_linears(model: nn.Module, manifest: Manifest, path: Path | str = CONFIG) -> None:
    """Replace the linears of a float model that the manifest names by quantized layers on meta.

    Raises:
        CheckpointError: the manifest does not fit the model; path: the file to name.
    """
    modules, places = dict(model.named_modules()), module_places(model)
    shapes: dict[str, torch.Size] = {}
    blocks: dict[str, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        if is_linear(module) and not unlike_linear(module):
            shapes[name] = linear_weight(module).shape
        elif isinstance(module, nn.Embedding) and not unlike_embedding(module):
            shapes[f"{name}.packed"] = module.weight.shape
        # Not more experts than the manifest has entries: a malicious number would exhaust memory.
        elif (
            is_fused_experts(module)
            and 2 * num_experts(module) <= len(manifest.linears)
            and not unlike_experts(module)
        ):
            names = expert_names(name, module)
            blocks[name] = {key: full for full, key in names.items()}
            shapes |= {
                full: expert_weights(module, part).shape[1:] for full, (_, part) in names.items()
            }
    layers: dict[str, QuantizedLinear] = {}
    tied = tied_tables(manifest)
    for name in [*manifest.linears, *tied]:
        if name not in shapes:
            raise CheckpointError(f"{path}: the model has no linear {name}")
        n, k = shapes[name]
        try:
            layers[name] = manifest.blank(tied.get(name, name), k, n)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: linear {name}: {error}") from error
        embedding = modules.get(name.rpartition(".")[0])
        if name in modules:
            replace_module(model, name, layers[name], places)
        elif isinstance(embedding, nn.Embedding):
            replacement = QuantizedEmbedding(embedding, layers[name])
            replace_module(model, name.rpartition(".")[0], replacement, places)
    for block, matrices in blocks.items():
        missing = [name for name in matrices.values() if name not in layers]
        if not missing:
            experts = {key: layers[name] for key, name in matrices.items()}
            replace_module(model, block, W4A4Experts(experts, modules[block]), places)
        elif len(missing) < len(matrices):
            raise CheckpointError(f"{path}: linear {missing[0]} is missing")


def tied_tables(manifest: Manifest) -> dict[str, str]:
    """{further name of a table's packed weight: its first name}, for tied heads and embeddings."""
    modules = {n.rpartition(".")[0]: o.rpartition(".")[0] for n, o in manifest.shared.items()}
    return {
        name: owner
        for name, owner in modules.items()
        if owner in manifest.linears and manifest.linears[owner]["table"]
        if name not in manifest.linears
    }


def tie_tables(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let heads and embeddings that are one weight be one module, as before they were saved.

    Args:
        tied: from `tied_tables`.
    """
    for name, owner in tied.items():
        block, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(block), leaf, model.get_submodule(owner))


def check_headers(
    model: nn.Module,
    manifest: Manifest,
    headers: Mapping[str, Header],
    path: Path | str,
    *,
    only_linears: bool = False,
) -> dict[str, torch.dtype]:
    """Check that the stored tensors are exactly those that the model needs.

    Args:
        model: a model prepared by `insert_linears`.
        headers: {name: header} of the stored tensors.
        path: the file to name if no single file is to blame (see `tensors_file`).
        only_linears: check only the tensors of quantized linears.

    Returns:
        The dtypes of the stored tensors and of the unsaved buffers.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of the wrong shape or dtype.
    """
    expected = model.state_dict(keep_vars=True)
    unsaved = unsaved_buffers(model)
    shared = manifest.shared
    if only_linears:
        expected = {name: t for name, t in expected.items() if _in_linear(model, name)}
        headers = {name: header for name, header in headers.items() if name in expected}
        shared = {name: owner for name, owner in shared.items() if name in expected}
    names = set(headers)
    surplus = ((names | set(shared)) - set(expected)) | (names & set(shared))
    surplus |= set(shared.values()) - names
    for what, which in (
        ("lacks", sorted(set(expected) - names - set(shared))),
        ("should not have", sorted(surplus)),
    ):
        if which:
            where = headers[which[0]].path if which[0] in headers else path
            raise CheckpointError(f"{where}: {what} tensor {which[0]} ({len(which)} in all)")
    dtypes = usual_dtypes(model, manifest.dtype) | manifest.dtypes
    unknown = set(manifest.dtypes) - names - set(unsaved)
    if unknown and not only_linears:
        raise CheckpointError(f"{path}: dtypes must not name {min(unknown)}")
    for name, buffer in unsaved.items():
        if not may_hold(buffer, dtypes[name]):
            raise CheckpointError(f"{path}: dtypes: {name} must be {dtype_name(buffer.dtype)}")
    for name, header in headers.items():
        tensor, where = expected[name], f"{header.path}: tensor {name}"
        if header.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{where} must have shape {tuple(tensor.shape)}; got {header.shape}"
            )
        if header.dtype != dtype_name(dtypes[name]) or not may_hold(tensor, dtypes[name]):
            raise CheckpointError(
                f"{where} must not be {header.dtype}; {CONFIG} says {dtype_name(dtypes[name])}"
            )
    for name, owner in shared.items():
        if expected[name].shape != expected[owner].shape or not may_hold(
            expected[name], dtypes[owner]
        ):
            raise CheckpointError(
                f"{path}: tensor {name} and {owner}, which it shares memory with, differ in shape "
                "or dtype"
            )
    return dtypes


def _in_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear)


def may_hold(expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` is allowed for a tensor built like `expected`: floats may have been cast."""
    return dtype in (FLOATS if expected.dtype in FLOATS else {expected.dtype})


def check_linear(
    path: Path | str, name: str, module: QuantizedLinear, tensors: Mapping[str, Tensor]
) -> None:
    """Reject values that would be unsafe for the kernels or give wrong results.

    Args:
        path, name: the file and the name of the layer, for error messages.
        tensors: the tensors of the layer, by the keys of its state dict.

    Raises:
        CheckpointError: a tensor has an invalid value.
    """

    def faults() -> Iterator[tuple[str, str]]:
        natural = torch.arange(len(module.perm)).int()
        if not torch.equal(tensors["perm"].cpu().sort().values, natural):
            yield "perm", "is not a permutation of the channels"
        elif isinstance(module, Int8Linear) and not torch.equal(tensors["perm"].cpu(), natural):
            yield "perm", "must leave INT8 channels in their order"
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                yield key, "holds NaN or Inf"
        for key in ("scales", "salient_scales"):
            scales = tensors.get(key)
            if scales is not None and (scales.dtype != torch.bfloat16 or (scales < 0).any()):
                yield key, "must be bfloat16 and not negative"
        salient = tensors.get("salient_weight")
        if salient is not None and salient.dtype == torch.float32:
            yield "salient_weight", "must be bfloat16 or float16"
        if salient is not None and "salient_scales" in tensors and (salient == -128).any():
            yield "salient_weight", "holds the code -128"
        codes = tensors.get("qweight")
        # Planes of INT8 weights may have it; the kernels take it too.
        may_be_8 = module.planes > 1
        if codes is not None and not may_be_8 and ((codes < 0x10) | (codes & 0x0F == 0)).any():
            yield "qweight", "holds the code -8"

    for key, fault in faults():
        raise CheckpointError(f"{path}: tensor {name}.{key} {fault}")


def check_kept(model: nn.Module, headers: Mapping[str, Header], *, cast: bool = False) -> None:
    """Reject NaN and Inf in parameters that were not quantized. Buffers may use them as masks.

    Args:
        cast: the parameters were cast to another dtype, which may turn a number into Inf, so only
            NaN is rejected.

    Raises:
        CheckpointError: a parameter has such a value.
    """
    for name, largest in non_finite_parameters(model, headers.__contains__):
        if not cast or largest.isnan():
            what = "NaN" if cast else "NaN or Inf"
            raise CheckpointError(f"{headers[name].path}: tensor {name} holds {what}")


def check_checksums(
    manifest: Manifest, headers: Mapping[str, Header], tensors: Mapping[str, Tensor]
) -> None:
    """Reject a manifest or tensors other than those that were saved.

    Finds what no other check can: values that are valid, but not this model's.

    Args:
        manifest, headers, tensors: as stored.

    Raises:
        CheckpointError: a checksum differs.
    """
    folders = {header.path.parent for header in headers.values()}
    check_unaltered(manifest, min(folders) / CONFIG)
    for name, checksum in tensor_checksums(tensors, manifest.linears).items():
        if manifest.checksums.get(name, checksum) != checksum:
            what, stored = f"tensor {name} is not the one that was", name
            if name in manifest.linears:
                what = f"the tensors of linear {name} are not those that were"
                stored = next(key for key in headers if key.rpartition(".")[0] == name)
            raise CheckpointError(f"{headers[stored].path}: {what} saved (the checksum differs)")


def check_unaltered(manifest: Manifest, path: Path) -> None:
    """Reject a manifest that was edited, in the config.json at `path`."""
    if manifest.altered:
        raise CheckpointError(
            f"{path}: quantization_config was changed after the model was saved (its checksum "
            "differs)"
        )


def warn_of_changes(manifest: Manifest, path: Path, fields: Mapping[str, Any]) -> None:
    """Warn if config.json, at `path`, no longer describes the float model that was saved."""
    if config_changed(manifest, fields):
        logger.warning(
            "%s was edited after the model was saved: this may be another model. Save the model "
            "again if the change is intended",
            path,
        )


def config_changed(manifest: Manifest, fields: Mapping[str, Any]) -> bool:
    """Whether the fields of config.json that define the float model differ from those saved."""
    return manifest.checksums.get(CONFIG, "") not in ("", config_checksum(fields)[CONFIG])


@torch.no_grad()
def try_model(model: Any, path: Path | str, *, must_run: bool = True) -> None:
    """Run a model on three tokens, to reject a folder whose model is valid but useless.

    Does nothing for a model that needs inputs other than tokens.

    Args:
        path: the config.json to name.
        must_run: it is an error if the model does not run. It may not on this device, with an
            attention that is made for another one.

    Raises:
        CheckpointError: the model does not run, or a token gets NaN, +Inf or no finite logit.
    """
    if not decoder_layers(model):
        return  # it may need inputs other than tokens
    tokens = torch.zeros(1, 3, dtype=torch.int64)  # 3, as wrong sizes of 1 would broadcast
    try:
        output = text_model(model)(tokens.to(next(model.parameters()).device), return_dict=True)
    except Exception as error:  # a broken config may raise anything in the model
        if not must_run:
            logger.warning("%s was not tried: %s", type(model).__name__, error)
            return
        raise CheckpointError(
            f"{path}: the {type(model).__name__} built from it does not run: {error}"
        ) from error
    result = output.get("logits", output.get("last_hidden_state"))
    if isinstance(result, Tensor) and not result.float().amax(-1).isfinite().all():
        raise CheckpointError(
            f"{path}: the {type(model).__name__} built from it and the stored tensors gives NaN or "
            "Inf for three tokens"
        )
