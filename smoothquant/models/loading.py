"""Load configs, models and tokenizers with transformers, from a folder or from Hugging Face.

Code in a model repository never runs: every call says ``trust_remote_code=False``. Without it,
transformers asks on stdin whether it may run the code. `tests/test_architecture.py` checks that no
other module makes such calls.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckpointError
from .float8 import DEQUANTIZED, METHOD
from .linears import is_linear
from .packed_weights import DEQUANTIZED_MXFP4, MXFP4

# {method: the one under which transformers loads a float model from such files}
AS_FLOAT = {METHOD: DEQUANTIZED, MXFP4: DEQUANTIZED_MXFP4}

TOKENIZER_FILES = (
    "tokenizer*", "*vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.tokenizer",
    "tekken.json", "bpe.codes", "dict.txt",
)  # fmt: skip

# All files that accompany the weights and keep their contents when the weights are quantized.
COMPANIONS = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "*processor_config.json", "normalizer.json",
)  # fmt: skip


def load_config(name_or_folder: str | os.PathLike, **where: Any) -> Any:
    """Load a transformers config; raises what transformers raises.

    Args:
        where: more arguments of ``from_pretrained``, such as ``revision``.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False, **where)


def transformers_class(architectures: Any) -> Any:
    """The transformers model class that a config's ``architectures`` names first; None if there is
    no such class."""
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model else None


def load_pretrained(
    name_or_folder: str | os.PathLike, dtype: torch.dtype | str = "auto", **where: Any
) -> Any:
    """Load a model with all its weights, as the class that its config names.

    A config that names no transformers class is loaded by AutoModelForCausalLM. FP8 and MXFP4
    weights are dequantized (`packed_weights`).

    Args:
        dtype: dtype of the floating-point tensors; "auto" for the stored one.
        where: more arguments of ``from_pretrained``, such as ``revision``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: a weight is missing, or a tensor of a linear is not used.
        Exception: what transformers raises.
    """
    from transformers import AutoModelForCausalLM

    where.setdefault("local_files_only", os.path.isdir(name_or_folder))
    config = load_config(name_or_folder, **where)
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") in AS_FLOAT:
        method = AS_FLOAT[quantization["quant_method"]]
        config.quantization_config = {**quantization, "quant_method": method}
    cls = transformers_class(config.architectures)
    if cls is None:
        cls = AutoModelForCausalLM
    elif not isinstance(config, cls.config_class or ()):
        raise TypeError(f"a {cls.__name__} cannot have the model type {config.model_type!r}")
    model, info = cls.from_pretrained(
        name_or_folder,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        **where,
    )
    check_complete(name_or_folder, model, info["missing_keys"], info["unexpected_keys"])
    return model.eval()


def check_complete(
    source: str | os.PathLike, model: nn.Module, missing: Collection[str], unused: Collection[str]
) -> None:
    """Raise CheckpointError if a loaded model is not the stored one.

    Args:
        source: name or path of the checkpoint, for the message.
        missing: tensors of the model that the checkpoint lacks. Transformers would initialize them
            at random.
        unused: tensors of the checkpoint that the model has no place for. Only those of a linear
            are an error, such as its bias: others are often buffers of earlier versions.
    """
    lost = [name for name in unused if _linear_of(model, name)]
    if missing:
        unknown = f"; it has unknown tensors: {_listed(unused)}" if unused else ""
        raise CheckpointError(
            f"{source}: lacks tensor {_listed(missing)} of a {type(model).__name__}{unknown}"
        )
    if lost:
        raise CheckpointError(
            f"{source}: has tensors that a {type(model).__name__} with its config has no place "
            f"for: {_listed(lost)}"
        )


class StoredNames:
    """Maps names of stored tensors to names of a model's tensors, as transformers does.

    Args:
        model: a float transformers model.

    Attributes:
        converters: {pattern: a transformers WeightConverter}: how a tensor of the model is built
            from several stored ones.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.expected = model.state_dict(keep_vars=True)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.converters = {p: t for t in self._converters for p in t.source_patterns}

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The name of the model's tensor that a stored one becomes (a part of), and the pattern of
        its converter or None."""
        from transformers.core_model_loading import rename_source_key

        if key in self.expected:
            return key, None
        return rename_source_key(
            key, self._renamings, self._converters, self._prefix, self.expected
        )


def loaded_in_float32(model: Any, name: str) -> bool:
    """Whether transformers loads a tensor in float32, whatever dtype the model and its files have,
    such as DeepSeek-V3's routers.

    Args:
        model: a transformers model whose first parameter has the model's dtype.
        name: name of the tensor in the model.
    """
    plan = model._get_dtype_plan(next(model.parameters()).dtype)
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in plan)


def check_unused(
    source: str | os.PathLike, model: Any, keys: Iterable[str], named: StoredNames | None = None
) -> None:
    """Raise CheckpointError if the model has no place for a stored tensor of one of its linears.

    Args:
        keys: names of the stored tensors.
        named: `StoredNames` of the model, if the caller has it already.
    """
    named = named or StoredNames(model)
    unused = [key for key in keys if named(key)[0] not in named.expected]
    if type(model).__name__ not in (model.config.architectures or ()):  # the head is another one
        unused = [key for key in unused if key.startswith(f"{model.base_model_prefix}.")]
    check_complete(
        source, model, (), _not_ignored(unused, model._keys_to_ignore_on_load_unexpected)
    )


def randomly_initialized(model: nn.Module) -> list[str]:
    """The parameters of a model from ``from_pretrained`` that no file held.

    transformers marks the parameters that it loads. Empty for a model that was not loaded. If the
    model was trained since, these parameters are no longer random.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fresh = {
        name
        for name, parameter in parameters.items()
        if not getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta
    }
    return sorted(fresh) if len(fresh) < len(parameters) else []


def missing_weights(model: Any, missing: Iterable[str]) -> list[str]:
    """Those of a loaded model's missing tensors that its checkpoint should have.

    A checkpoint of another class may lack the head. Tied weights and tensors that transformers
    computes are never stored.
    """
    names = _not_ignored(missing, model._keys_to_ignore_on_load_missing)
    names = [name for name in names if name not in (model.all_tied_weights_keys or {})]
    own_class = type(model).__name__ in (model.config.architectures or ())
    if own_class or model.base_model is model:
        return names
    return [name for name in names if name.startswith(f"{model.base_model_prefix}.")]


def _not_ignored(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns or ())]


def _linear_of(model: nn.Module, name: str) -> bool:
    try:
        return is_linear(model.get_submodule(name.rpartition(".")[0]))
    except AttributeError:
        return False


def _listed(names: Collection[str], most: int = 5) -> str:
    shown = sorted(names)[:most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def load_tokenizer(name_or_folder: str | os.PathLike, **where: Any) -> Any:
    """Load the tokenizer that was saved with a model.

    Args:
        where: more arguments of ``from_pretrained``, such as ``revision``.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    where.setdefault("local_files_only", os.path.isdir(name_or_folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False, **where)
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
        reason = "there is none"  # transformers makes one up, with special tokens only
    except Exception as error:  # the tokenizers package raises plain Exceptions
        reason = " ".join(str(error).split())[:200]  # in one line
    raise ValueError(f"the tokenizer of {str(name_or_folder)!r} cannot be loaded: {reason}")


def tokenizer_folder(name_or_folder: str, checkpoint_files: Sequence[str] | None) -> str:
    """The folder of the tokenizer that belongs to weights which transformers loaded.

    It is beside the weights or in the root of their repository, in the same revision. Its files are
    downloaded if necessary.

    Args:
        name_or_folder: what the model was loaded by.
        checkpoint_files: the files of the weights.

    Returns:
        The folder; `name_or_folder` if there is no tokenizer.
    """
    if not checkpoint_files:
        return name_or_folder
    beside = root = Path(checkpoint_files[0]).parent
    if os.path.isdir(name_or_folder):
        root = Path(name_or_folder)
    else:
        # cache/models--owner--name/snapshots/revision/subfolder/file
        root = next((p for p in (beside, *beside.parents) if p.parent.name == "snapshots"), beside)
        if root.parent.name == "snapshots":
            below = beside.relative_to(root)
            patterns = [(p / name).as_posix() for p in (Path(), below) for name in COMPANIONS]
            with suppress(Exception):  # no network: take what there is
                _snapshot(name_or_folder, patterns, revision=root.name, cache_dir=root.parents[2])
    folders = (folder for folder in (beside, root) if Companions(folder).has_tokenizer)
    return str(next(folders, name_or_folder))


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or that of a processor.

    Raises:
        ValueError: it is None.
    """
    from transformers import ProcessorMixin

    if tokenizer is None:
        raise ValueError("tokenizer must be the model's tokenizer; got None")
    is_processor = isinstance(tokenizer, ProcessorMixin) and hasattr(tokenizer, "tokenizer")
    return tokenizer.tokenizer if is_processor else tokenizer


def load_gguf(folder: str | os.PathLike, file: str) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer from a GGUF file; the weights become float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)


def _snapshot(name: str, patterns: list[str], **where: Any) -> Path:
    """The folder of a repository's files that match the patterns, downloaded if necessary."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **where))
    except Exception as error:  # without a network, also for files that were never needed
        folder = getattr(error, "snapshot_path", None)
        if folder is None:
            raise
        return Path(folder)


def download(name: str) -> Path:
    """The folder of a Hugging Face repository's config, weights (safetensors) and companions.

    What is not in the cache is downloaded. Raises what huggingface_hub raises.
    """
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    # no other formats in subfolders, no second copy of the weights (Mistral)
    return _snapshot(name, patterns, ignore_patterns=["*/*", "consolidated*"])


def companions_of(model: Any) -> Companions | None:
    """The files beside the weights that a transformers model was loaded from.

    They are downloaded if the model came from Hugging Face and they are not in the cache; never for
    a model that came from a folder.

    Returns:
        None if no tokenizer is among them, or they are not found.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if os.path.isdir(name):
        found = Companions(name)
        return found if found.has_tokenizer else None
    # Known only for models from Hugging Face. The name alone could be that of a deleted folder.
    revision = getattr(model.config, "_commit_hash", None)
    for local in (True, False) if name and revision else ():
        with suppress(Exception):  # no network, or not in the cache
            found = Companions(name, revision=revision, local_files_only=local)
            if found.has_tokenizer:
                return found
    return None


class Companions:
    """The files beside the weights of a model: tokenizer, processor, generation config.

    An object to pass as `tokenizer` to functions that save one: `save_pretrained` copies the files
    unchanged, so no package is needed that a processor would import.

    Args:
        name_or_folder: a model folder, or a Hugging Face id, whose files are downloaded.
        where: more arguments of ``snapshot_download``, such as ``revision``.
    """

    def __init__(self, name_or_folder: str | os.PathLike, **where: Any) -> None:
        if os.path.isdir(name_or_folder):
            self.folder = Path(name_or_folder)
        else:
            self.folder = _snapshot(os.fspath(name_or_folder), list(COMPANIONS), **where)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a file of a tokenizer."""
        return any(any(self.folder.glob(pattern)) for pattern in TOKENIZER_FILES)

    def save_pretrained(self, target: str | os.PathLike) -> None:
        """Copy the files into the folder `target`, except those that it has already."""
        for path in sorted({path for name in COMPANIONS for path in self.folder.glob(name)}):
            copy = Path(target) / path.name
            if path.is_file() and not copy.exists():
                shutil.copy(path, copy)
