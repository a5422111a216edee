"""Save and load folders of quantized models. Writing is atomic; reading trusts nothing.

config.json                   the transformers config, with a `manifest.Manifest` in it
generation_config.json        the transformers generation config
README.md                     the model card (`model_card`)
model.safetensors             every distinct parameter and persistent buffer, once; or shards and
                              their index, model.safetensors.index.json

`model.save_pretrained` writes the same files except the card, and
`AutoModelForCausalLM.from_pretrained` reads them (`smoothquant.checkpoints.hf`).
"""

from __future__ import annotations

import copy
import logging
import os
import re
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
from ..core.files import atomic_folder, restore_folder
from ..core.tensor_files import (
    CONFIG,
    TENSORS,
    Header,
    read_json,
    remedy,
    stored_tensors,
    tensors_file,
)
from ..layers.decoder import place_and_fuse
from ..layers.linear import QuantizedLinear, is_quantized
from ..models.loading import companions_of, load_config, transformers_class
from ..models.modules import assign, check_no_adapter, is_transformers_model, unsaved_buffers
from .attachment import attach
from .manifest import (
    CARD,
    Manifest,
    check_checksums,
    check_headers,
    check_kept,
    check_linear,
    check_unaltered,
    insert_linears,
    tie_tables,
    tied_tables,
    try_model,
    warn_of_changes,
)

logger = logging.getLogger("smoothquant")

# A model may have more parameters than its files have tensors: shared ones are built several times,
# and a stored tensor may become several. A model with still more is not the one in the files.
MOST_PARAMETERS_PER_TENSOR = 4
MORE_PARAMETERS = 1000


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    evaluation: Mapping[str, float] | None = None,
) -> None:
    """Write a quantized transformers model to a folder, with a model card.

    Writing is atomic: a temporary folder beside the target is flushed to disk and then renamed.

    Args:
        model: a transformers model quantized by this package, with either backend.
        folder: must not exist or be empty; with `overwrite`, it may also hold a quantized model,
            which is replaced as a whole.
        tokenizer: a transformers tokenizer or processor to save with the model. None copies the
            tokenizer's files from where the model was loaded from, if they are found there; a
            warning in the log says which.
        overwrite: replace a folder that holds a quantized model.
        evaluation: {"metric, dataset": number}, for the model card.

    Raises:
        ValueError: the model is not a quantized transformers model, its class is not one of
            transformers, it has an adapter of PEFT, or the folder is not free.
        OSError: writing failed. Nothing is left behind.
    """
    from .model_card import model_card

    check_no_adapter(model)
    if not is_transformers_model(model) or not is_quantized(model):
        raise ValueError(
            f"model must be a quantized transformers model; got {type(model).__name__}"
        )
    # a headless model with fused layers has a class of ours over that of transformers
    if transformers_class([type(model).__name__]) is not getattr(model, "float_class", type(model)):
        raise ValueError(
            f"model must have a class of transformers, or load_quantized cannot build it; got "
            f"{type(model).__name__}. model.save_pretrained saves it for "
            f"{type(model).__name__}.from_pretrained"
        )
    attach(model)  # rejects what cannot be saved before anything is written
    folder, card = check_target(folder, overwrite=overwrite), model_card(model, evaluation)
    if tokenizer is None:
        tokenizer = companions_of(model)
        if tokenizer is None:
            logger.warning("no tokenizer was found to save with the model; tokenizer= takes one")
        else:
            logger.warning("saving the tokenizer of %s with the model", model.name_or_path)
    write_folder(model, folder, tokenizer, card, overwrite=overwrite)


def write_folder(
    model: Any, folder: Path, tokenizer: Any = None, card: str = "", *, overwrite: bool = False
) -> None:
    """Write a transformers model, and optionally a tokenizer and a model card, atomically.

    Args:
        folder: as returned by `check_target`.
    """
    with usual_errors(folder), atomic_folder(folder, overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if card:
            (partial / CARD).write_text(card, encoding="utf-8")


@contextmanager
def usual_errors(folder: Path) -> Iterator[None]:
    """Raise what `check_target` raises if `folder` was taken after it had been checked."""
    try:
        yield
    except FileExistsError:
        check_target(folder)
        raise


def check_target(
    folder: str | os.PathLike, *, overwrite: bool = False, of_any_model: bool = False
) -> Path:
    """Check that `save_quantized` may write to a folder.

    Args:
        overwrite: also accept a folder that holds a quantized model.
        of_any_model: with `overwrite`, accept a folder that holds any model.

    Returns:
        The absolute path, with links and dots resolved.

    Raises:
        ValueError: the path exists and is neither an empty folder nor one that may be overwritten.
    """
    path = Path(folder).resolve()
    restore_folder(path)
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    replaceable = (path / CONFIG).is_file() if of_any_model else is_quantized_folder(path)
    if not (free or (overwrite and replaceable)):
        raise ValueError(
            f"folder already exists: {path} (only a folder with a "
            f"{'' if of_any_model else 'quantized '}model can be overwritten)"
        )
    return path


def is_quantized_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder's config.json declares a model quantized by this package."""
    try:
        fields = read_json(Path(folder) / CONFIG).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(fields, dict) and fields.get("quant_method") == MixedQuantConfig.quant_method


def load_quantized(folder: str | os.PathLike) -> nn.Module:
    """Load a folder written by `save_quantized`, on the CPU and in evaluation mode.

    No code from the folder is run. All files are checked before any kernel runs, with their
    checksums; then the model is run on three tokens. A config.json whose fields for the float model
    were edited gives a warning.

    The attention implementation is not stored. The loaded model has transformers' default, which
    ``model.set_attn_implementation`` changes. With the same implementation, logits are
    bit-identical to those of the saved model.

    Raises:
        ValueError: there is no such folder.
        CheckpointError: a file is missing, damaged, inconsistent with the others or not the one
            that was saved, or the model gives no finite logits. The message names the file and, if
            there is one, the tensor.
    """
    model, manifest, headers, dtypes = open_quantized(folder)
    stored = _read(headers)
    tensors = stored | {name: stored[owner] for name, owner in manifest.shared.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layer_tensors = {key: tensors[f"{name}.{key}"] for key in module.state_dict()}
            perm = f"{name}.perm"
            path = headers[manifest.shared.get(perm, perm)].path
            check_linear(path, name, module, layer_tensors)
    for name, buffer in unsaved_buffers(model).items():
        if buffer.is_meta and not buffer.numel():  # only its dtype counts
            buffer = torch.empty(buffer.shape)
        assign(model, name, buffer.to(dtypes[name]))
    model.load_state_dict(tensors, assign=True)
    check_kept(model, headers)
    check_checksums(manifest, headers, stored)
    parameters = dict(model.named_parameters())
    for name, owner in manifest.shared.items():
        if owner in parameters:  # it shares the memory already; make it the same object
            assign(model, name, parameters[owner])
    attach(model)
    place_and_fuse(model)
    try_model(model.eval(), Path(folder) / CONFIG)
    return model


class Opened(NamedTuple):
    """A folder of a quantized model whose headers are consistent; no tensor is read yet.

    Attributes:
        model: the model with its quantized layers and its parameters on meta.
        manifest: its manifest.
        headers: headers of the stored tensors.
        dtypes: dtypes of the stored tensors and of the buffers that are not stored.
    """

    model: Any
    manifest: Manifest
    headers: dict[str, Header]
    dtypes: dict[str, torch.dtype]


def open_quantized(folder: str | os.PathLike) -> Opened:
    """Do everything in `load_quantized` that does not read tensors; raises the same errors."""
    folder = Path(folder)
    if not folder.is_dir():
        restore_folder(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be a quantized model folder; got {folder}{remedy(folder)}")
    path = folder / CONFIG
    fields = read_json(path)
    if "quantization_config" not in fields:
        raise CheckpointError(f"{path}: not a quantized model: it has no quantization_config")
    manifest = Manifest.from_dict(fields["quantization_config"], path)
    headers = stored_tensors(folder)
    model = float_model(folder, fields.get("architectures"), headers)
    model.mixedquant_config, model.mixedquant_unreached = manifest.config, manifest.kept
    insert_linears(model, manifest, path)
    paths = {header.path for header in headers.values()} or {folder / TENSORS}
    dtypes = check_headers(model, manifest, headers, tensors_file(paths))
    tie_tables(model, tied_tables(manifest))
    check_unaltered(manifest, path)
    warn_of_changes(manifest, path, fields)
    return Opened(model, manifest, headers, dtypes)


def _read(headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """Copies of all tensors, independent of the files, which may change later."""
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
    folder: Path,
    architectures: Any,
    headers: Mapping[str, Header],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build the float transformers model of a folder, with its parameters on meta.

    A config may ask for any amount of memory and time. The model is therefore built twice: first
    entirely on meta, to compare its size with that of the files.

    Args:
        architectures: this field of the folder's config.json.
        headers: headers of the stored tensors.
        dtype: torch's default dtype during the build, as transformers sets it before it loads
            weights. Buffers that are not stored, such as Gemma's ``embed_scale``, get it.

    Raises:
        CheckpointError: the config does not describe a transformers model of the files' size.
    """
    from transformers import GenerationConfig

    path = folder / CONFIG
    model_class = transformers_class(architectures)
    if model_class is None:
        raise CheckpointError(
            f"{path}: architectures must name a transformers model; got {architectures!r:.80}"
        )
    check_counts(path, read_json(path), headers)
    try:
        config = load_config(folder, local_files_only=True)
        if not isinstance(config, model_class.config_class):
            raise TypeError(f"its model type is {config.model_type!r}")
        # A malicious depth would take forever to build.
        most = MOST_PARAMETERS_PER_TENSOR * len(headers) + MORE_PARAMETERS
        with _build_lock, _default_dtype(dtype):
            with _parameters_on_meta(most), torch.device("meta"):
                _check_size(model_class(copy.deepcopy(config)), headers)
            with _parameters_on_meta(most):
                model = model_class(config)
        path = folder / "generation_config.json"
        if os.path.lexists(path):
            read_json(path)  # checks more than transformers does
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a broken config may raise anything in the model class
        raise CheckpointError(
            f"{path}: cannot build a {model_class.__name__} from it: {error}"
        ) from error
    return model


# Counts in config.json for which lists and modules are built in Python, and tokens (of a chunk) to
# which short texts are padded.
COUNT = re.compile(r"(num|n)_(?!param|position|ctx)|.*(layers|labels|experts|heads|chunk_size)$")
MOST_COUNT = 2**14  # transformers takes 50 us for a label
UNSAVED_BYTES = 2**27  # of buffers, besides the size of the files


def check_counts(path: Path, fields: Any, headers: Mapping[str, Header]) -> None:
    """Reject counts in a config that no tensor on disk can match.

    Raises:
        CheckpointError: a count, at any depth, is above `MOST_COUNT` and above the largest
            dimension of a tensor.
    """
    largest = max((size for header in headers.values() for size in header.shape), default=0)
    most = max(MOST_COUNT, largest)
    if isinstance(fields, dict):
        for name, value in fields.items():
            if isinstance(value, (int, float)) and COUNT.match(name) and value > most:
                shown = f"{min(value, 10**300):.10g}"  # a longer integer cannot be formatted
                raise CheckpointError(
                    f"{path}: {name} is {shown}, but no dimension of a stored tensor exceeds "
                    f"{largest}"
                )
            check_counts(path, value, headers)
    elif isinstance(fields, list):
        for value in fields:
            check_counts(path, value, headers)


def _check_size(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Reject a model that is larger than the files can make it; a value has at least 4 bits."""
    stored = sum(path.stat().st_size for path in {header.path for header in headers.values()})
    kept = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    unsaved = sum(tensor.nbytes for tensor in unsaved_buffers(model).values())
    if sum(kept.values()) > 2 * stored or unsaved > stored + UNSAVED_BYTES:
        raise ValueError(
            f"it has {sum(kept.values()):,} values and {unsaved:,} bytes of buffers, but the files "
            f"have {stored:,} bytes"
        )


# torch's default dtype belongs to the process: one model is built at a time.
_build_lock = threading.Lock()


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
def _parameters_on_meta(most: int) -> Iterator[None]:
    """Create parameters of modules that this thread builds on meta, but buffers for real.

    Buffers that are not saved, such as rotary frequencies, exist nowhere else.

    Args:
        most: number of parameters at which to raise ValueError.
    """
    _building.left = most
    try:
        yield
    finally:
        del _building.left


def _move_to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    left = getattr(_building, "left", None)
    if left is None:
        return None
    if left == 0:
        raise ValueError("it has far more parameters than the files have tensors")
    _building.left = left - 1
    on_meta: Any = parameter
    if not parameter.is_meta:
        on_meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    on_meta._is_hf_initialized = True  # lets transformers skip the slow initialization
    return on_meta


# Never removed: torch iterates over its hooks in every thread that builds a module, and changing
# them meanwhile would break the iteration.
register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]
