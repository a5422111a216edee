"""What a cell's key says of the things it is computed from: model files, texts, packages."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .store import file_sha256

# Files of a model folder that take part in its numbers.
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
    """Version of every package that takes part in a cell's numbers; none of them is imported."""
    import smoothquant

    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"smoothquant": smoothquant.__version__, **packages}


def wikitext_identity(split: str) -> dict[str, Any]:
    """Name, split and sha256 of one of the bundled WikiText-2 texts."""
    from smoothquant.bundled import DATA, WIKITEXT_FILES

    path = DATA / "wikitext-2-raw" / WIKITEXT_FILES[split]
    return {"data": "wikitext-2-raw", "split": split, "sha256": file_sha256(path)}


def model_identity(source: str, dtype: str) -> dict[str, Any]:
    """Name, sha256 of the model's files, dtype.

    Args:
        source: what `smoothquant.bundled.load_model` takes: bundled name, folder, Hugging Face id.
            Loaded only to have it downloaded or converted, where it is not here yet.
        dtype: one of DTYPES, for the model's floating-point tensors.

    Raises:
        ValueError: source or dtype cannot be understood, or there are no model files.
    """
    check_source(source, dtype)
    folder = _folder(source)
    if folder is None:
        from smoothquant.bundled import load_model

        load_model(source)
        folder = _folder(source, whole=False)
    names = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
    digests = {name: file_sha256(folder / name) for name in sorted(names)}
    if not digests:
        raise ValueError(f"model: no model files in {str(folder)!r}")
    name = Path(source).resolve().name if os.path.isdir(source) else source
    return {"name": name, "files": digests, "dtype": dtype}


def check_source(source: str, dtype: str) -> None:
    """Raise ValueError if `model_identity` cannot understand its arguments; reads no file."""
    from smoothquant.bundled import check_model_name

    check_model_name(source)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def _folder(source: str, *, whole: bool = True) -> Path | None:
    """Where a model's files lie; None if they are not here yet."""
    from smoothquant.bundled import BUNDLED_MODELS, DATA, cache_folder

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
    # A download that was broken off leaves the small files only.
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return folder if has_weights or not whole else None
