"""What a cell's key records about its inputs: model files, texts and package versions."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smoothquant
from smoothquant.bundled import BUNDLED_MODELS, cache_folder, check_model_name, load_model
from smoothquant.core.texts import DATA, WIKITEXT_FILES

from .store import file_sha256

# Files of a model folder that affect its numbers.
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.bin",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
DTYPES = ("float32", "bfloat16", "float16")


def package_versions() -> dict[str, str]:
    """Return the version of every package that affects a cell's numbers, without importing them."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"smoothquant": smoothquant.__version__, **packages}


def wikitext_identity(split: str) -> dict[str, Any]:
    """Return the name, split and sha256 of a bundled WikiText-2 text."""
    path = DATA / "wikitext-2-raw" / WIKITEXT_FILES[split]
    return {"data": "wikitext-2-raw", "split": split, "sha256": file_sha256(path)}


def model_identity(source: str, dtype: str) -> dict[str, Any]:
    """Return the model's name, the sha256 of its files, and dtype.

    Args:
        source: anything `smoothquant.bundled.load_model` accepts: a bundled name, a folder or a
            Hugging Face id. The model is loaded only if it still has to be downloaded or converted.
        dtype: one of DTYPES, for the model's floating-point tensors.

    Raises:
        ValueError: source or dtype is invalid, or there are no model files.
    """
    check_source(source, dtype)
    folder = _folder(source)
    if folder is None:
        load_model(source)
        folder = _folder(source, whole=False)
    digests = {}
    if folder is not None:
        names = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
        digests = {name: file_sha256(folder / name) for name in sorted(names)}
    if not digests:
        raise ValueError(f"model: no model files in {str(folder)!r}")
    name = Path(source).resolve().name if os.path.isdir(source) else source
    return {"name": name, "files": digests, "dtype": dtype}


def check_source(source: str, dtype: str) -> None:
    """Raise ValueError if `model_identity` would refuse these arguments. Reads no file."""
    check_model_name(source)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def _folder(source: str, *, whole: bool = True) -> Path | None:
    """Return the folder of a model's files, or None if they are not on this machine yet."""
    if source == "tiny-opt":
        return DATA / "tiny-opt"
    if source in BUNDLED_MODELS:
        folder = cache_folder() / source
        return folder if folder.is_dir() else None
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # An interrupted download leaves only the small files.
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return folder if has_weights or not whole else None
