"""What a folder says about its quantized model, and the distrust with which that is read.

It stands in config.json under ``quantization_config``, where transformers looks for it:

quant_method     "mixedquant"
format_version   of these fields and of the tensors (docs/format.md)
config           the model's MixedQuantConfig
dtype            of the model, so of every float tensor that is named nowhere below
linears          {name of a quantized linear: num_salient and, where they differ from false and the
                 model's config, bias, quantize_output and choices}
shared           {tensor: the tensor of the file whose memory it shares}
dtypes           {tensor or unsaved buffer: its dtype}, where it has another than expected
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import MixedQuantConfig
from ..core.errors import CheckpointError
from ..core.tensor_files import CONFIG, Header
from ..core.tensors import DTYPES, FLOATS, dtype_name, is_finite
from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear, linear_class
from ..models.modules import distinct_tensors, module_places, replace_module, unsaved_buffers
from ..models.routing import PARTS, expert_names
from ..quantization.checks import non_finite_parameters

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

# Of a linear, with what they are where they are left out.
LINEAR_FIELDS = {"num_salient": int, "bias": bool, "quantize_output": bool, "choices": dict}
LINEAR_DEFAULTS = {"bias": False, "quantize_output": False, "choices": {}}

# Fields of the config that `quantize` may settle for each layer.
LAYER_CHOICES = ("act_format", "act_clip", "rotation")


@dataclasses.dataclass
class Manifest:
    """The fields of ``quantization_config``, checked: see the module's description."""

    config: MixedQuantConfig
    dtype: torch.dtype = torch.float32
    linears: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    shared: dict[str, str] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_model(cls, model: nn.Module) -> Manifest:
        """That of a quantized model as it is now; ValueError for a model that cannot be saved."""
        linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        if not linears:
            raise ValueError(f"model must be a quantized one; got {type(model).__name__}")
        config = getattr(model, "mixedquant_config", next(iter(linears.values())).config)
        common = config.to_dict()
        entries = {
            name: {
                "num_salient": module.num_salient,
                "bias": module.bias is not None,
                "quantize_output": module.quantize_output,
                "choices": _choices(name, module.config, common),
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
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "quant_method": MixedQuantConfig.quant_method,
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

    @classmethod
    def from_dict(cls, fields: Any, path: Path | str = CONFIG) -> Manifest:
        """The inverse of `to_dict`; CheckpointError, naming the path, for anything it is not."""
        path = f"{path}: quantization_config"
        if isinstance(fields, dict) and fields.get("format_version", FORMAT_VERSION) != (
            FORMAT_VERSION
        ):
            raise CheckpointError(
                f"{path}: format_version {fields['format_version']!r} is not {FORMAT_VERSION}, "
                "the one that this version of the package reads"
            )
        _check_fields(path, "it", fields, FIELDS)
        if fields["quant_method"] != MixedQuantConfig.quant_method:
            raise CheckpointError(f"{path}: quant_method is {fields['quant_method']!r}")
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
        for field in ("shared", "dtypes"):
            _check_fields(path, field, fields[field], dict.fromkeys(fields[field], str))
        for name, dtype in [("the model", fields["dtype"]), *fields["dtypes"].items()]:
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: dtype of {name} is {dtype!r}")
        dtype = DTYPES[fields["dtype"]]
        if dtype not in FLOATS:
            raise CheckpointError(f"{path}: dtype of the model is {fields['dtype']!r}")
        dtypes = {name: DTYPES[dtype] for name, dtype in fields["dtypes"].items()}
        return cls(config, dtype, linears, dict(fields["shared"]), dtypes)

    def renamed(self, rename: Callable[[str], str]) -> Manifest:
        """With rename(name) in the place of each name."""
        linears, shared, dtypes = (
            {rename(name): value for name, value in fields.items()}
            for fields in (self.linears, self.shared, self.dtypes)
        )
        shared = {name: rename(owner) for name, owner in shared.items()}
        return dataclasses.replace(self, linears=linears, shared=shared, dtypes=dtypes)

    def blank(self, name: str, k: int, n: int) -> QuantizedLinear:
        """A linear's layer without memory; ValueError or TypeError if its entry makes none."""
        entry = self.linears[name]
        if not set(entry["choices"]) <= set(LAYER_CHOICES):
            raise ValueError(f"choices may name {', '.join(LAYER_CHOICES)} only")
        return linear_class(self.config)(
            k,
            n,
            entry["bias"],
            config=dataclasses.replace(self.config, **entry["choices"]),
            num_salient=entry["num_salient"],
            quantize_output=entry["quantize_output"],
            dtype=self.dtype,
            device="meta",
        )


def _choices(name: str, own: MixedQuantConfig, common: dict[str, Any]) -> dict[str, Any]:
    """Where a layer's config differs from the model's fields."""
    fields = own.to_dict()
    differing = {field: value for field, value in fields.items() if value != common[field]}
    if not set(differing) <= set(LAYER_CHOICES):
        raise ValueError(f"all linears must have one MixedQuantConfig; {name} has another")
    return differing


def _check_fields(path: str, where: str, value: Any, fields: dict[str, type]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise CheckpointError(f"{path}: {where} must have the fields {', '.join(fields)}")
    for field, kind in fields.items():
        if type(value[field]) is not kind:
            raise CheckpointError(f"{path}: {field} of {where} must be {kind.__name__}")


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first float parameter, as transformers has it."""
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)


def usual_dtypes(
    model: nn.Module, dtype: torch.dtype, blanks: Mapping[str, nn.Module] | None = None
) -> dict[str, torch.dtype]:
    """What a model of a dtype stores its tensors as, and has its unsaved buffers in.

    blanks: in the place of modules, where the model's own are not as they were built.
    """
    usual = {}
    for prefix, module in model.named_modules():
        module = (blanks or {}).get(prefix, module)
        quantized = isinstance(module, QuantizedLinear)
        unsaved = module._non_persistent_buffers_set
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                of_floats = (
                    tensor.dtype if quantized else torch.float32 if leaf in unsaved else dtype
                )
                name = f"{prefix}.{leaf}" if prefix else leaf
                usual[name] = of_floats if tensor.dtype in FLOATS else tensor.dtype
    return usual


def insert_linears(model: nn.Module, manifest: Manifest, path: Path | str = CONFIG) -> None:
    """Put layers without memory in the places of a float model that the manifest names."""
    modules, places = dict(model.named_modules()), module_places(model)
    shapes: dict[str, torch.Size] = {}
    blocks: dict[str, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        fused = [getattr(module, part, None) for part in PARTS]
        if isinstance(module, nn.Linear):
            shapes[name] = module.weight.shape
        # no more experts than the manifest may name: a hostile number would fill the memory
        elif all(isinstance(t, Tensor) and 2 * len(t) <= len(manifest.linears) for t in fused):
            names = expert_names(name, module)
            blocks[name] = {key: full for full, key in names.items()}
            shapes |= {full: getattr(module, part).shape[1:] for full, (_, part) in names.items()}
    layers: dict[str, nn.Module] = {}
    for name in manifest.linears:
        if name not in shapes:
            raise CheckpointError(f"{path}: the model has no linear {name}")
        n, k = shapes[name]
        try:
            layers[name] = manifest.blank(name, k, n)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: linear {name}: {error}") from error
        if name in modules:
            replace_module(model, name, layers[name], places)
    for block, names in blocks.items():
        lacking = [name for name in names.values() if name not in layers]
        if not lacking:
            experts = {key: layers[name] for key, name in names.items()}
            replace_module(model, block, W4A4Experts(experts, modules[block].act_fn), places)
        elif len(lacking) < len(names):
            raise CheckpointError(f"{path}: linear {lacking[0]} is missing")


def check_headers(
    model: nn.Module,
    manifest: Manifest,
    headers: Mapping[str, Header],
    path: Path | str,
    *,
    only_linears: bool = False,
) -> dict[str, torch.dtype]:
    """Refuse files that do not hold what a model of `insert_linears` needs.

    Args:
        path: `tensors_file`, for the message where no one file is to blame.
        only_linears: leave all but the quantized linears aside.

    Returns:
        The dtypes of the tensors in the files and of the buffers that are built.
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
            raise CheckpointError(f"{where}: {what} tensor {which[0]} ({len(which)} such)")
    dtypes = usual_dtypes(model, manifest.dtype) | manifest.dtypes
    odd = set(manifest.dtypes) - names - set(unsaved)
    if odd and not only_linears:
        raise CheckpointError(f"{path}: dtypes must not name {min(odd)}")
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
                f"{path}: tensor {name} has not the shape and dtype of its twin {owner}"
            )
    return dtypes


def _in_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear)


def may_hold(expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a model built with one dtype may hold another here: floats may have been cast."""
    return dtype in (FLOATS if expected.dtype in FLOATS else {expected.dtype})


def check_linear(path: Path, name: str, module: QuantizedLinear, own: Mapping[str, Tensor]) -> None:
    """Refuse values that the kernels or the mathematics could not stand; own: of module's keys."""

    def faults() -> Iterator[tuple[str, str]]:
        if not torch.equal(own["perm"].cpu().sort().values, torch.arange(module.in_features).int()):
            yield "perm", "is no permutation of the channels"
        for key, tensor in own.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                yield key, "holds NaN or Inf"
        for key in ("scales", "salient_scales"):
            if key in own and (own[key].dtype != torch.bfloat16 or (own[key] < 0).any()):
                yield key, "must be bfloat16 and not negative"
        if "salient_weight" in own and own["salient_weight"].dtype == torch.float32:
            yield "salient_weight", "must be bfloat16 or float16"
        if "salient_scales" in own and (own["salient_weight"] == -128).any():
            yield "salient_weight", "holds the code -128"
        if "qweight" in own and ((own["qweight"] < 0x10) | (own["qweight"] & 0x0F == 0)).any():
            yield "qweight", "holds the code -8"

    for key, fault in faults():
        raise CheckpointError(f"{path}: tensor {name}.{key} {fault}")


def check_kept(model: nn.Module, headers: Mapping[str, Header], *, cast: bool = False) -> None:
    """Refuse NaN and Inf in parameters that were not quantized; buffers may mask with them.

    cast: they were cast to another dtype, which may make Inf of a number, but never NaN.
    """
    for name, largest in non_finite_parameters(model, headers.__contains__):
        if not cast or largest.isnan():
            what = "NaN" if cast else "NaN or Inf"
            raise CheckpointError(f"{headers[name].path}: tensor {name} holds {what}")
