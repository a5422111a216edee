"""Quantized models on disk: a folder that is whole or absent, read with distrust.

config.json, generation_config.json   the model's own, by transformers
mixedquant.json                       format_version, model_class, config, linears, shared, dtypes
model.safetensors                     every distinct parameter and persistent buffer, once
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import MixedQuantConfig
from .errors import CheckpointError
from .linear import QuantizedLinear, linear_class
from .model_size import distinct_tensors
from .moe import PARTS, W4A4Experts

FORMAT_VERSION = 1
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
LINEAR_FIELDS = {"num_salient": int, "bias": bool, "quantize_output": bool}
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def save_quantized(model: nn.Module, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a quantized transformers model to a folder.

    The folder is written beside its place under another name, flushed to the disk and renamed, so
    it is whole or not there.

    Args:
        model: quantized by `smoothquant.quantize` or its drop-in forms; either backend.
        folder: must not exist, or be empty, unless overwrite is true.

    Raises:
        ValueError: the model is not quantized, is no transformers model, or the folder is taken.
        OSError: the disk's own complaint; nothing is left behind.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not linears or not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise ValueError(
            f"model must be a quantized transformers model; got {type(model).__name__}"
        )
    config = next(iter(linears.values())).config
    odd = next((name for name, module in linears.items() if module.config != config), None)
    if odd:
        raise ValueError(f"all linears must have one MixedQuantConfig; {odd} has another")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ValueError(f"folder exists already: {folder} (overwrite=True replaces a folder)")
    tensors, shared = distinct_tensors(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "config": config.to_dict(),
        "linears": {
            name: {
                "num_salient": module.num_salient,
                "bias": module.bias is not None,
                "quantize_output": module.quantize_output,
            }
            for name, module in linears.items()
        },
        "shared": shared,
        "dtypes": {
            name: _dtype_name(tensor) for name, tensor in [*tensors.items(), *_unsaved(model)]
        },
    }
    with _appearing(folder) as partial:
        model.config.save_pretrained(partial)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / TENSORS, metadata={"format": "pt"})
        # safetensors lets only the owner read its files; a checkpoint is as open as its folder
        (partial / TENSORS).chmod((partial / MANIFEST).stat().st_mode & 0o777)


def load_quantized(folder: str | os.PathLike) -> nn.Module:
    """Read a folder that `save_quantized` wrote: the same model, in evaluation mode, on the CPU.

    No code from the folder is run. Everything is checked before a kernel sees it.

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
            tensors = {
                name: _read(path, file, name, expected[name], manifest["dtypes"].get(name))
                for name in names
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, owner in shared.items():
        if expected[name].shape != tensors[owner].shape:
            raise CheckpointError(f"{path}: tensor {name} has not the shape of its twin {owner}")
        tensors[name] = tensors[owner]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _check_linear(path, name, module, tensors)
    model.load_state_dict(tensors, assign=True)
    for name, buffer in _unsaved(model):
        dtype = getattr(torch, manifest["dtypes"].get(name, ""), None)
        if buffer.dtype in FLOATS and dtype in FLOATS:
            _assign(model, name, buffer.to(dtype))
    parameters = dict(model.named_parameters())
    for name, owner in shared.items():
        if owner in parameters:  # of the same memory already, but not yet the same object
            _assign(model, name, parameters[owner])
    return model.eval()


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes its name when it is complete and on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    replaced = partial.with_suffix(".replaced")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if folder.exists() and any(folder.iterdir()):
            folder.rename(replaced)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
        if (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a broken configuration makes the model class do
        raise CheckpointError(f"{path}: no {model_class} can be built from it: {error}") from error
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory, but real buffers: those that are not
    saved, such as rotary frequencies, exist nowhere else."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _insert_linears(model: nn.Module, manifest: dict[str, Any], path: Path) -> None:
    """Put layers without memory in the places that the manifest names."""
    experts: dict[str, dict[tuple[int, str], nn.Module]] = {}
    modules = dict(model.named_modules())
    for name, fields in manifest["linears"].items():
        module = modules.get(name)
        block, _, part = name.rpartition(".")
        block, _, index = block.rpartition(".")
        fused = getattr(modules.get(block), part, None) if part in PARTS else None
        if isinstance(module, nn.Linear):
            n, k = module.weight.shape
        elif isinstance(fused, Tensor) and index.isdecimal() and int(index) < len(fused):
            n, k = fused.shape[1:]
        else:
            raise CheckpointError(f"{path}: the model has no linear {name}")
        try:
            layer = linear_class(manifest["config"])(
                k,
                n,
                fields["bias"],
                config=manifest["config"],
                num_salient=fields["num_salient"],
                quantize_output=fields["quantize_output"],
                device="meta",
            )
        except ValueError as error:
            raise CheckpointError(f"{path}: linear {name}: {error}") from error
        if isinstance(module, nn.Linear):
            model.set_submodule(name, layer)
        else:
            experts.setdefault(block, {})[int(index), part] = layer
    for block, linears in experts.items():
        if len(linears) != len(modules[block].gate_up_proj) * len(PARTS):
            raise CheckpointError(f"{path}: experts of {block} are missing")
        model.set_submodule(block, W4A4Experts(linears, modules[block].act_fn))


def _check_names(path: Path, names: set[str], expected: set[str], shared: dict[str, str]) -> None:
    surplus = ((names | set(shared)) - expected) | (names & set(shared))
    surplus |= set(shared.values()) - names
    for what, which in (
        ("lacks", sorted(expected - names - set(shared))),
        ("should not have", sorted(surplus)),
    ):
        if which:
            raise CheckpointError(f"{path}: {what} tensor {which[0]} ({len(which)} such)")


def _read(path: Path, file, name: str, expected: Tensor, recorded: str | None) -> Tensor:
    shape = tuple(file.get_slice(name).get_shape())
    if shape != tuple(expected.shape):
        raise CheckpointError(
            f"{path}: tensor {name} must have shape {tuple(expected.shape)}; got {shape}"
        )
    tensor = file.get_tensor(name).clone()  # out of the mapped file, which may change
    allowed = FLOATS if expected.dtype in FLOATS else {expected.dtype}
    if tensor.dtype not in allowed or _dtype_name(tensor) != recorded:
        raise CheckpointError(
            f"{path}: tensor {name} must not be {_dtype_name(tensor)}; {MANIFEST} says {recorded}"
        )
    return tensor


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
        if "scales" in own and (own["scales"].dtype != torch.bfloat16 or (own["scales"] < 0).any()):
            yield "scales", "must be bfloat16 and not negative"
        if "salient_weight" in own and own["salient_weight"].dtype == torch.float32:
            yield "salient_weight", "must be bfloat16 or float16"
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
