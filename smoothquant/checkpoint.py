"""Quantized models on disk: a folder that is whole or absent, read with distrust.

config.json, generation_config.json   the model's own, by transformers
mixedquant.json                       format_version, model_class, config, linears, shared, dtypes
model.safetensors                     every distinct parameter and persistent buffer, once
"""

import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .config import MixedQuantConfig
from .errors import CheckpointError
from .files import atomic_folder
from .linear import QuantizedLinear, linear_class
from .model_size import distinct_tensors
from .moe import PARTS, W4A4Experts, expert_names
from .quantize import replace_module

FORMAT_VERSION = 2
MANIFEST = "mixedquant.json"
TENSORS = "model.safetensors"
MANIFEST_FIELDS = {
    "format_version": int,
    "model_class": str,
    "config": dict,
    "linears": dict,
    "shared": dict,
    "dtypes": dict,
}
LINEAR_FIELDS = {"num_salient": int, "bias": bool, "quantize_output": bool, "choices": dict}
# Fields of the config that `quantize` may settle for each layer.
LAYER_CHOICES = ("act_format", "act_clip", "rotation")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def save_quantized(
    model: nn.Module, folder: str | os.PathLike, tokenizer=None, *, overwrite: bool = False
) -> None:
    """Write a quantized transformers model to a folder.

    The folder is written beside its place under another name, flushed to the disk and renamed, so
    it is whole or not there.

    Args:
        model: quantized by `smoothquant.quantize` or its drop-in forms; either backend.
        folder: must not exist, or be empty, or with overwrite hold a quantized model: that is
            replaced as a whole.
        tokenizer: a transformers tokenizer to save with it, or None.

    Raises:
        ValueError: the model is not quantized, is no transformers model, or the folder is taken.
        OSError: the disk's own complaint; nothing is left behind.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not linears or not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise ValueError(
            f"model must be a quantized transformers model; got {type(model).__name__}"
        )
    config = getattr(model, "mixedquant_config", next(iter(linears.values())).config)
    common = config.to_dict()
    choices = {name: _choices(name, module.config, common) for name, module in linears.items()}
    folder = check_target(folder, overwrite=overwrite)
    tensors, shared = distinct_tensors(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "config": common,
        "linears": {
            name: {
                "num_salient": module.num_salient,
                "bias": module.bias is not None,
                "quantize_output": module.quantize_output,
                "choices": choices[name],
            }
            for name, module in linears.items()
        },
        "shared": shared,
        "dtypes": {
            name: _dtype_name(tensor.dtype) for name, tensor in [*tensors.items(), *_unsaved(model)]
        },
    }
    with atomic_folder(folder, overwrite=overwrite) as partial:
        model.config.save_pretrained(partial)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / TENSORS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _choices(name: str, own: MixedQuantConfig, common: dict[str, Any]) -> dict[str, Any]:
    """Where a layer's config differs from the model's fields."""
    fields = own.to_dict()
    differing = {field: value for field, value in fields.items() if value != common[field]}
    if not set(differing) <= set(LAYER_CHOICES):
        raise ValueError(f"all linears must have one MixedQuantConfig; {name} has another")
    return differing


def check_target(folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The absolute path that `save_quantized` would write to, links and dots resolved.

    Raises ValueError if it is taken: by anything but an empty folder, or, with overwrite, by
    anything but a folder that holds a quantized model.
    """
    path = Path(folder).resolve()
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not (free or (overwrite and (path / MANIFEST).is_file())):
        raise ValueError(
            f"folder exists already: {path} (overwrite=True replaces a folder with a {MANIFEST})"
        )
    return path


def load_quantized(folder: str | os.PathLike) -> nn.Module:
    """Read a folder that `save_quantized` wrote: the same model, in evaluation mode, on the CPU.

    No code from the folder is run. Everything is checked before a kernel sees it. The attention
    implementation is not recorded: it is transformers' default, which
    ``model.set_attn_implementation`` changes; logits are the saved model's, bit for bit, under the
    same one.

    Raises:
        ValueError: no such folder.
        CheckpointError: a file is missing, broken or does not fit the others; the message names
            the file, and the tensor where there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder of a quantized model; got {folder}")
    manifest = _manifest(folder / MANIFEST)
    shared, path = manifest["shared"], folder / TENSORS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            model = _float_model(folder, manifest["model_class"], len(names))
            _insert_linears(model, manifest, folder / MANIFEST)
            expected = model.state_dict(keep_vars=True)
            _check_names(path, set(names), set(expected), shared)
            unsaved = dict(_unsaved(model))
            dtypes = _dtypes(folder / MANIFEST, manifest["dtypes"], names, unsaved)
            tensors = {
                name: _read(path, file, name, expected[name], dtypes[name]) for name in names
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, owner in shared.items():
        if not (
            expected[name].shape == tensors[owner].shape
            and _may_hold(expected[name], tensors[owner].dtype)
        ):
            raise CheckpointError(
                f"{path}: tensor {name} has not the shape and dtype of its twin {owner}"
            )
        tensors[name] = tensors[owner]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _check_linear(path, name, module, tensors)
    for name, buffer in unsaved.items():
        _assign(model, name, buffer.to(dtypes[name]))
    model.load_state_dict(tensors, assign=True)
    model.mixedquant_config = manifest["config"]
    parameters = dict(model.named_parameters())
    for name, owner in shared.items():
        if owner in parameters:  # of the same memory already, but not yet the same object
            _assign(model, name, parameters[owner])
    return model.eval()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_fields(path, "the file", manifest, MANIFEST_FIELDS)
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {manifest['format_version']} is not {FORMAT_VERSION}, "
            "the one that this version of the package reads"
        )
    try:
        manifest["config"] = MixedQuantConfig.from_dict(manifest["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: config: {error}") from error
    if not manifest["linears"]:
        raise CheckpointError(f"{path}: linears is empty")
    for name, fields in manifest["linears"].items():
        _check_fields(path, f"linear {name}", fields, LINEAR_FIELDS)
    for field in ("shared", "dtypes"):
        _check_fields(path, field, manifest[field], dict.fromkeys(manifest[field], str))
    for name, dtype in manifest["dtypes"].items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: dtype of {name} is {dtype!r}")
    return manifest


def _check_fields(path: Path, where: str, value: Any, fields: dict[str, type]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise CheckpointError(f"{path}: {where} must have the fields {', '.join(fields)}")
    for field, kind in fields.items():
        if type(value[field]) is not kind:
            raise CheckpointError(f"{path}: {field} of {where} must be {kind.__name__}")


def _float_model(folder: Path, model_class: str, num_tensors: int) -> nn.Module:
    """The model that was quantized, its parameters without memory."""
    import transformers

    path = folder / "config.json"
    cls = getattr(transformers, model_class, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / MANIFEST}: model_class {model_class!r} is no transformers model"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if not isinstance(config, cls.config_class):
            raise TypeError(f"it is of type {config.model_type!r}")
        # a hostile depth would take forever to build; every layer has tensors of its own
        if config.num_hidden_layers > num_tensors:
            raise ValueError(f"{config.num_hidden_layers} layers, but {num_tensors} tensors")
        with _parameters_on_meta():
            model = cls(config)
        path = folder / "generation_config.json"
        if path.exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a broken configuration makes the model class do
        raise CheckpointError(f"{path}: no {model_class} can be built from it: {error}") from error
    return model


_building = threading.local()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds inside get parameters without memory, but real buffers:
    those that are not saved, such as rotary frequencies, exist nowhere else."""
    _building.here = True
    try:
        yield
    finally:
        _building.here = False


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if getattr(_building, "here", False) and parameter.device.type != "meta":
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return None


# Stays registered: torch walks through its hooks in every thread that builds a module, and one
# that came or went meanwhile would break that walk.
register_module_parameter_registration_hook(_without_memory)


def _insert_linears(model: nn.Module, manifest: dict[str, Any], path: Path) -> None:
    """Put layers without memory in the places that the manifest names."""
    linears = manifest["linears"]
    modules = dict(model.named_modules())
    shapes: dict[str, torch.Size] = {}
    blocks: dict[str, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        fused = [getattr(module, part, None) for part in PARTS]
        if isinstance(module, nn.Linear):
            shapes[name] = module.weight.shape
        # no more experts than the manifest may name: a hostile number would fill the memory
        elif all(isinstance(t, Tensor) and 2 * len(t) <= len(linears) for t in fused):
            names = expert_names(name, module)
            blocks[name] = {key: full for full, key in names.items()}
            shapes |= {full: getattr(module, part).shape[1:] for full, (_, part) in names.items()}
    layers: dict[str, nn.Module] = {}
    common = manifest["config"]
    for name, fields in linears.items():
        if name not in shapes:
            raise CheckpointError(f"{path}: the model has no linear {name}")
        n, k = shapes[name]
        try:
            if not set(fields["choices"]) <= set(LAYER_CHOICES):
                raise ValueError(f"choices may name {', '.join(LAYER_CHOICES)} only")
            layers[name] = linear_class(common)(
                k,
                n,
                fields["bias"],
                config=dataclasses.replace(common, **fields["choices"]),
                num_salient=fields["num_salient"],
                quantize_output=fields["quantize_output"],
                device="meta",
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: linear {name}: {error}") from error
        if name in modules:
            replace_module(model, name, layers[name])
    for block, names in blocks.items():
        lacking = [name for name in names.values() if name not in layers]
        if not lacking:
            experts = {key: layers[name] for key, name in names.items()}
            replace_module(model, block, W4A4Experts(experts, modules[block].act_fn))
        elif len(lacking) < len(names):
            raise CheckpointError(f"{path}: linear {lacking[0]} is missing")


def _check_names(path: Path, names: set[str], expected: set[str], shared: dict[str, str]) -> None:
    surplus = ((names | set(shared)) - expected) | (names & set(shared))
    surplus |= set(shared.values()) - names
    for what, which in (
        ("lacks", sorted(expected - names - set(shared))),
        ("should not have", sorted(surplus)),
    ):
        if which:
            raise CheckpointError(f"{path}: {what} tensor {which[0]} ({len(which)} such)")


def _dtypes(
    path: Path, recorded: dict[str, str], names: list[str], unsaved: dict[str, Tensor]
) -> dict[str, torch.dtype]:
    """The recorded dtype of every tensor in the file and of every buffer that is only built."""
    odd = set(recorded) ^ {*names, *unsaved}
    if odd:
        raise CheckpointError(f"{path}: dtypes must not name or lack {min(odd)}")
    dtypes = {name: DTYPES[dtype] for name, dtype in recorded.items()}
    for name, buffer in unsaved.items():
        if not _may_hold(buffer, dtypes[name]):
            raise CheckpointError(f"{path}: dtypes: {name} must be {_dtype_name(buffer.dtype)}")
    return dtypes


def _read(path: Path, file, name: str, expected: Tensor, dtype: torch.dtype) -> Tensor:
    shape = tuple(file.get_slice(name).get_shape())
    if shape != tuple(expected.shape):
        raise CheckpointError(
            f"{path}: tensor {name} must have shape {tuple(expected.shape)}; got {shape}"
        )
    tensor = file.get_tensor(name).clone()  # out of the mapped file, which may change
    if tensor.dtype != dtype or not _may_hold(expected, dtype):
        raise CheckpointError(
            f"{path}: tensor {name} must not be {_dtype_name(tensor.dtype)}; "
            f"{MANIFEST} says {_dtype_name(dtype)}"
        )
    return tensor


def _may_hold(expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a model built with one dtype may hold another here: floats may have been cast."""
    return dtype in (FLOATS if expected.dtype in FLOATS else {expected.dtype})


def _check_linear(
    path: Path, name: str, module: QuantizedLinear, tensors: dict[str, Tensor]
) -> None:
    """Refuse values that the kernels or the mathematics could not stand."""

    def faults() -> Iterator[tuple[str, str]]:
        own = {key: tensors[f"{name}.{key}"] for key in module.state_dict()}
        if not torch.equal(own["perm"].sort().values, torch.arange(module.in_features).int()):
            yield "perm", "is no permutation of the channels"
        for key, tensor in own.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
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


def _unsaved(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are built, not saved; a cast model has cast them too."""
    saved = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    block, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(block), leaf, tensor)
