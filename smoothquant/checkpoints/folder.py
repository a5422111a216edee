"""Quantized models on disk: a folder that is whole or absent, read with distrust.

config.json                   the model's own, by transformers, with a `manifest.Manifest` in it
generation_config.json        the model's own
README.md                     what it is and what was measured of it (`model_card`)
model.safetensors             every distinct parameter and persistent buffer, once; or shards of it
                              and model.safetensors.index.json, which says what is where

`model.save_pretrained` writes the same files and `AutoModelForCausalLM.from_pretrained` reads them
(`smoothquant.checkpoints.hf`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..core.config import MixedQuantConfig
from ..core.errors import CheckpointError
from ..core.files import atomic_folder
from ..core.tensor_files import (
    CONFIG,
    TENSORS,
    Header,
    check_file,
    read_json,
    stored_tensors,
    tensors_file,
)
from ..layers.linear import QuantizedLinear, is_quantized
from ..models.modules import assign, is_transformers_model, unsaved_buffers
from .attachment import attach
from .manifest import CARD, Manifest, check_headers, check_kept, check_linear, insert_linears


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    overwrite: bool = False,
    evaluation: Mapping[str, float] | None = None,
) -> None:
    """Write a quantized transformers model to a folder, with a model card.

    The folder is written beside its place under another name, flushed to the disk and renamed, so
    it is whole or not there.

    Args:
        model: quantized by `smoothquant.quantize` or its drop-in forms; either backend.
        folder: must not exist, or be empty, or with overwrite hold a quantized model: that is
            replaced as a whole.
        tokenizer: a transformers tokenizer to save with it, or None.
        evaluation: {what was measured, and on what: number}, for the card.

    Raises:
        ValueError: the model is not quantized, is no transformers model, or the folder is taken.
        OSError: the disk's own complaint; nothing is left behind.
    """
    from .model_card import model_card

    if not is_transformers_model(model) or not is_quantized(model):
        raise ValueError(
            f"model must be a quantized transformers model; got {type(model).__name__}"
        )
    attach(model)  # what cannot be saved is refused before anything is written
    folder, card = check_target(folder, overwrite=overwrite), model_card(model, evaluation)
    write_folder(model, folder, tokenizer, card, overwrite=overwrite)


def write_folder(
    model, folder: Path, tokenizer=None, card: str = "", *, overwrite: bool = False
) -> None:
    """`save_pretrained` of a transformers model, and a tokenizer and a card if there are, whole or
    not at all; folder: as `check_target` gave it."""
    with atomic_folder(folder, overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if card:
            (partial / CARD).write_text(card, encoding="utf-8")


def check_target(
    folder: str | os.PathLike, *, overwrite: bool = False, of_any_model: bool = False
) -> Path:
    """The absolute path that `save_quantized` would write to, links and dots resolved.

    Raises ValueError if it is taken: by anything but an empty folder, or, with overwrite, by
    anything but a folder that holds a quantized model (of_any_model: any model).
    """
    path = Path(folder).resolve()
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    replaceable = (path / CONFIG).is_file() if of_any_model else is_quantized_folder(path)
    if not (free or (overwrite and replaceable)):
        raise ValueError(
            f"folder exists already: {path} (overwriting replaces a folder with a "
            f"{'' if of_any_model else 'quantized '}model)"
        )
    return path


def is_quantized_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder's config.json says that it holds a model of this package."""
    try:
        fields = read_json(Path(folder) / CONFIG).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(fields, dict) and fields.get("quant_method") == MixedQuantConfig.quant_method


def load_quantized(folder: str | os.PathLike) -> nn.Module:
    """Read a folder that `save_quantized` wrote: the same model, in evaluation mode, on the CPU.

    No code from the folder is run. Everything is checked before a kernel sees it, then the model is
    tried on three tokens. The attention implementation is not recorded: it is transformers'
    default, which ``model.set_attn_implementation`` changes; logits are the saved model's, bit for
    bit, under the same one.

    Raises:
        ValueError: no such folder.
        CheckpointError: a file is missing, broken or does not fit the others; the message names
            the file, and the tensor where there is one.
    """
    model, manifest, headers, dtypes = open_quantized(folder)
    tensors = _read(headers)
    tensors |= {name: tensors[owner] for name, owner in manifest.shared.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            own = {key: tensors[f"{name}.{key}"] for key in module.state_dict()}
            perm = f"{name}.perm"
            check_linear(headers[manifest.shared.get(perm, perm)].path, name, module, own)
    for name, buffer in unsaved_buffers(model).items():
        assign(model, name, buffer.to(dtypes[name]))
    model.load_state_dict(tensors, assign=True)
    check_kept(model, headers)
    model.mixedquant_config = manifest.config
    parameters = dict(model.named_parameters())
    for name, owner in manifest.shared.items():
        if owner in parameters:  # of the same memory already, but not yet the same object
            assign(model, name, parameters[owner])
    attach(model)
    _try(model.eval(), Path(folder) / CONFIG)
    return model


@torch.no_grad()
def _try(model: nn.Module, path: Path) -> None:
    """Refuse a configuration of which a model can be built, but none that runs."""
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return  # it takes more than tokens
    try:
        model(torch.zeros(1, 3, dtype=torch.int64))  # 3: wrong sizes of 1 would broadcast
    except Exception as error:  # whatever a broken configuration makes the model do
        raise CheckpointError(
            f"{path}: a {type(model).__name__} of it does not run: {error}"
        ) from error


class Opened(NamedTuple):
    """A folder of a quantized model whose files fit each other, none of its tensors read yet.

    model: with its quantized layers, parameters without memory. headers: of the tensors in the
    files. dtypes: of these and of the buffers that are built.
    """

    model: nn.Module
    manifest: Manifest
    headers: dict[str, Header]
    dtypes: dict[str, torch.dtype]


def open_quantized(folder: str | os.PathLike) -> Opened:
    """All of `load_quantized` that needs no tensor's values; the same errors."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder of a quantized model; got {folder}")
    path = folder / CONFIG
    fields = read_json(path)
    if "quantization_config" not in fields:
        raise CheckpointError(f"{path}: no quantization_config: this is no quantized model")
    manifest = Manifest.from_dict(fields["quantization_config"], path)
    headers = stored_tensors(folder)
    model = float_model(folder, fields.get("architectures"), len(headers))
    insert_linears(model, manifest, path)
    paths = {header.path for header in headers.values()} or {folder / TENSORS}
    dtypes = check_headers(model, manifest, headers, tensors_file(paths))
    return Opened(model, manifest, headers, dtypes)


def _read(headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """All tensors, out of the mapped files, which may change."""
    tensors = {}
    for path in {header.path: None for header in headers.values()}:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in (name for name, header in headers.items() if header.path == path):
                    tensors[name] = file.get_tensor(name).clone()
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    return tensors


def float_model(
    folder: Path, architectures: Any, num_tensors: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The float model of a folder, its parameters without memory.

    dtype: what the model is built in, as transformers builds it before it loads weights: a buffer
        such as Gemma's ``embed_scale``, which is not stored, has it.
    """
    import transformers

    path = folder / CONFIG
    model_class = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, model_class, None) if isinstance(model_class, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"{path}: architectures: {model_class!r} is no transformers model")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if not isinstance(config, cls.config_class):
            raise TypeError(f"it is of type {config.model_type!r}")
        # a hostile depth would take forever to build; every layer has tensors of its own
        if config.num_hidden_layers > num_tensors:
            raise ValueError(f"{config.num_hidden_layers} layers, but {num_tensors} tensors")
        with _parameters_on_meta(), _default_dtype(dtype):
            model = cls(config)
        path = folder / "generation_config.json"
        if os.path.lexists(path):
            check_file(path)
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a broken configuration makes the model class do
        raise CheckpointError(f"{path}: no {model_class} can be built from it: {error}") from error
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
        parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        parameter._is_hf_initialized = True  # transformers spares itself what would take time
        return parameter
    return None


# Stays registered: torch walks through its hooks in every thread that builds a module, and one
# that came or went meanwhile would break that walk.
register_module_parameter_registration_hook(_without_memory)
