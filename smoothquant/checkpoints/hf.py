"""The transformers plug-in: quantize a model while it loads; save and load it like any other.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=MixedQuantConfig())
    model.save_pretrained(folder)                       # or model.push_to_hub(repository)
    model = AutoModelForCausalLM.from_pretrained(folder)

The float model is loaded first and then calibrated and quantized as by `smoothquant.quantize`. Peak
memory is the float model plus one decoder layer.

With ``calibration="weights"``, layers are quantized as their weights arrive from the file. Salient
channels and order come from the weights alone. Peak memory is the quantized model plus the float
weights that read one layer input (q, k and v, or all experts of a layer).

`import smoothquant` registers the method as soon as transformers is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import (
    FineGrainedFP8Config,
    Mxfp4Config,
    QuantizationConfigMixin,
)

from ..calibration.tokens import default_calibration
from ..core.config import WEIGHTS, MixedQuantConfig
from ..core.errors import CheckpointError
from ..core.tensor_files import (
    CONFIG,
    Header,
    mapped_tensors,
    read_headers,
    read_json,
    tensors_file,
)
from ..layers.decoder import place_and_fuse
from ..layers.embedding import QuantizedEmbedding
from ..layers.experts import W4A4Experts
from ..layers.linear import QuantizedLinear
from ..models.families import LayerInput
from ..models.float8 import DEQUANTIZED, dequantized, float8_block
from ..models.linears import is_linear
from ..models.loading import (
    check_complete,
    check_unused,
    missing_weights,
    randomly_initialized,
    tokenizer_folder,
)
from ..models.modules import assign, distinct_tensors, unsaved_buffers
from ..models.packed_weights import (
    DEQUANTIZED_MXFP4,
    float_headers,
    is_mxfp4,
    packed_weights,
    warn_of_packed,
)
from ..models.routing import is_fused_experts
from ..quantization.checks import check_batches, check_not_offloaded
from ..quantization.engine import Plan
from ..quantization.undo import FLOAT_TIES, dequantize
from .attachment import finish_and_attach
from .checksums import config_checksum, tensor_checksums
from .manifest import (
    FIELDS,
    Manifest,
    check_checksums,
    check_headers,
    check_kept,
    check_linear,
    insert_linears,
    tie_tables,
    tied_tables,
    try_model,
    warn_of_changes,
)

QUANTIZED_ELEMENT_BYTES = 0.65  # for device maps: 4-bit codes, scales, salient channels


@register_quantization_config(MixedQuantConfig.quant_method)
class MixedQuantManifest(Manifest, QuantizationConfigMixin):
    """The manifest as ``model.config.quantization_config``, and in config.json."""

    quant_method = MixedQuantConfig.quant_method  # type: ignore[assignment]

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As `Manifest.from_dict`, with the arguments and results that transformers expects.

        Fields of a MixedQuantConfig, as a user passes them to ``from_pretrained``, give one.
        """
        read: Any = super().from_dict
        if not config_dict.keys() & (FIELDS.keys() - {"quant_method"}):
            fields = {key: config_dict[key] for key in config_dict.keys() - {"quant_method"}}
            config_dict, read = fields, _users_config
        manifest = read(config_dict)
        return (manifest, kwargs) if return_unused_kwargs else manifest


# transformers accepts a config given again with a quantized model if the classes' names are equal.
MixedQuantManifest.__name__ = MixedQuantConfig.__name__


def _users_config(fields: dict[str, Any]) -> MixedQuantConfig:
    try:
        return MixedQuantConfig.from_fields(fields)
    except (ValueError, TypeError) as error:
        raise type(error)(f"quantization_config: {error}") from error


class QuantizeLoadedWeights(ConversionOps):
    """Receives float weights as they are loaded, and packs each group once it is complete."""

    def __init__(self, model: nn.Module, config: MixedQuantConfig, tokenizer: str) -> None:
        """model: a float model with its parameters on meta; tokenizer: where its tokenizer is."""
        tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
        for name, owner in tied.items():  # or linears tied to embeddings would be quantized
            assign(model, name, _tensor(model, owner))
        self.plan = Plan(model, config, tokenizer=tokenizer, weights_to_come=True)
        self.error: Exception | None = None
        self.item_of: dict[str, LayerInput] = {}
        for item in self.plan.items:
            for name in (*item.linears, *([item.experts] if item.experts else [])):
                for leaf, _ in model.get_submodule(name).named_parameters():
                    self.item_of[f"{name}.{leaf}"] = item
        self.awaited = dict.fromkeys(self.item_of)  # in forward order
        self.tied = {n: owner for n, owner in tied.items() if self.item_of.keys() & {n, owner}}

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Any]:
        """Take the weights to quantize; return the others."""
        others = {}
        for name, value in input_dict.items():
            if name not in self.item_of:
                others[name] = value
                continue
            tensor = value[0] if isinstance(value, list) else value
            try:
                for taken in (name, *(n for n, owner in self.tied.items() if owner == name)):
                    missing_keys.discard(taken)
                    if taken in self.awaited:
                        self._take(model, taken, tensor)
            except (ValueError, TypeError) as error:  # transformers would only log it
                self.error = self.error or error
        return others

    def _take(self, model: nn.Module, name: str, tensor: Tensor) -> None:
        expected = model.get_parameter(name).shape
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}; got {tuple(tensor.shape)}")
        parameter: Any = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # as transformers marks what it loads
        assign(model, name, parameter)
        self.awaited.pop(name)
        item = self.item_of[name]
        if any(self.item_of[other] is item for other in self.awaited):
            return
        groups = [group for group in self.plan.groups if group.item is item]
        for _ in self.plan.pack(groups):
            pass
        for layer in (model.get_submodule(name) for group in groups for name in group.names):
            # or transformers would initialize its tensors as if no file held them
            initialized: Any
            for initialized in (layer, *layer.buffers()):
                initialized._is_hf_initialized = True
        if item.experts:
            _skip_initialization(model)
        if self.tied:
            _untie_quantized(model)

    def finish(self, model: Any) -> None:
        """Finish the model; raise the first error, or CheckpointError if weights are missing."""
        check_not_offloaded(model)
        if self.error is not None:
            raise self.error
        _check_complete(model, self.awaited)
        finish_and_attach(self.plan)


@register_quantizer(MixedQuantConfig.quant_method)
class MixedQuantQuantizer(HfQuantizer):
    """What transformers calls before, while and after it loads weights."""

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: MixedQuantConfig | Manifest, **kwargs: Any) -> None:
        manifest: Any = quantization_config
        if isinstance(quantization_config, MixedQuantConfig):
            if kwargs.get("pre_quantized"):  # config.json has the fields of a user's dict only
                raise CheckpointError(f"{CONFIG}: quantization_config is incomplete")
            manifest = MixedQuantManifest(quantization_config)
        super().__init__(manifest, **kwargs)
        self.on_load: QuantizeLoadedWeights | None = None
        self.files: Sequence[str] = ()
        self.headers: dict[str, Header] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.packed: set[str] = set()
        self.shared: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.may_be_missing: Any = None
        self.dtype: torch.dtype | None = None
        self.as_stored = False
        self.tokenizer = ""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            _check_loading(self.quantization_config.config, device_map)

    @property
    def quantized_element_size(self) -> float:
        return QUANTIZED_ELEMENT_BYTES

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.on_load is not None and param_name in self.on_load.item_of

    def get_quantize_ops(self) -> ConversionOps:
        assert self.on_load is not None
        return self.on_load

    def update_weight_conversions(
        self, weight_conversions: list, *args: Any, **kwargs: Any
    ) -> list:
        # Some versions of transformers also pass the model.
        if self.pre_quantized:  # tensors are stored under the model's own names
            return []
        return super().update_weight_conversions(weight_conversions, *args, **kwargs)

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """The dtype to convert a tensor to; None keeps the stored one.

        Packed tensors are never converted. Others are, if the requested dtype differs from that of
        the saved model.
        """
        name = converter.target_patterns[0]
        packed = name in self.packed and not name.endswith(".bias")
        return None if self.as_stored or packed else super().get_new_dtype(converter, param, dtype)

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype  # some versions of transformers do not pass it on
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        manifest = self.quantization_config
        if not self.pre_quantized:
            if all(path.endswith(".safetensors") for path in checkpoint_files or ()):
                check_unused(model.name_or_path, model, read_headers(checkpoint_files or ()))
            choice = manifest.config.calibration
            if choice != WEIGHTS:
                self.tokenizer = tokenizer_folder(model.name_or_path, checkpoint_files)
            # Calibration needs the whole float model first.
            if choice is None and not manifest.config.needs_tokens:
                choice, _ = default_calibration(model, self.tokenizer)
            if choice == WEIGHTS:
                self.on_load = QuantizeLoadedWeights(model, manifest.config, self.tokenizer)
            return
        whole = type(model).__name__ in (model.config.architectures or [])
        rename = (lambda name: name) if whole else _renaming(model)
        if not whole:
            stored = {rename(name) for name in read_headers(checkpoint_files or ())}
            manifest = _with_tied_heads(model, manifest.renamed(rename), stored)
        if not manifest.linears:
            raise CheckpointError(
                f"{model.name_or_path}: no quantized layer is part of a {type(model).__name__}"
            )
        model.mixedquant_unreached = manifest.kept
        insert_linears(model, manifest)
        _skip_initialization(model)
        _untie_quantized(model)
        self.packed = {
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
            for key in module.state_dict()
        }
        self.as_stored = self.dtype == manifest.dtype
        if checkpoint_files:
            folders = {os.path.dirname(path) for path in checkpoint_files}
            if len(folders) > 1:
                raise CheckpointError(
                    f"{max(folders)}: tensors of the model are also in {min(folders)}"
                )
            headers = read_headers(checkpoint_files)
            named = ((rename(name), header) for name, header in headers.items())
            headers = {name: header for name, header in named if name is not None}
            path = tensors_file(checkpoint_files)
            dtypes = check_headers(model, manifest, headers, path, only_linears=not whole)
            self.files, self.headers, self.dtypes = checkpoint_files, headers, dtypes
        self.shared, self.tied = manifest.shared, tied_tables(manifest)
        self.may_be_missing = model._keys_to_ignore_on_load_missing
        not_missing = [*(self.may_be_missing or ()), *map(re.escape, self.shared)]
        model._keys_to_ignore_on_load_missing = not_missing

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.on_load is not None:
            self.on_load.finish(model)
            self.on_load = None
        elif not self.pre_quantized:
            _quantize_loaded(model, self.quantization_config.config, self.tokenizer)
        else:
            self._finish_stored(model)
        place_and_fuse(model)

    def _finish_stored(self, model: Any) -> None:
        """Restore shared tensors, and reject values that would be unsafe for the kernels."""
        model._keys_to_ignore_on_load_missing = self.may_be_missing
        for name, owner in self.shared.items():
            assign(model, name, _tensor(model, owner))
        tie_tables(model, self.tied)
        if self.as_stored:
            for name, buffer in unsaved_buffers(model).items():
                assign(model, name, buffer.to(self.dtypes.get(name, buffer.dtype)))
        else:
            for module in model.modules():
                if isinstance(module, QuantizedEmbedding):
                    module.like = module.like.to(self.dtype)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                perm = f"{name}.perm"
                header = self.headers.get(self.shared.get(perm, perm))
                path = header.path if header else model.name_or_path
                check_linear(path, name, module, module.state_dict())
        check_kept(model, self.headers, cast=not self.as_stored)
        if self.files:
            self._check_files(model)
        model.mixedquant_config = self.quantization_config.config
        set_quantizer(model)

    def _check_files(self, model: Any) -> None:
        """Compare the files with their checksums, and run the model if it is as stored."""
        manifest, headers = self.quantization_config, read_headers(self.files)
        check_checksums(manifest, headers, mapped_tensors(headers))
        path = Path(self.files[0]).with_name(CONFIG)
        if path.is_file():
            warn_of_changes(manifest, path, read_json(path))
        if self.as_stored and not any(tensor.is_meta for tensor in model.parameters()):
            try_model(model, path, must_run=False)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict | None, dict]:
        """Update the model's manifest, checksums included; return each distinct tensor once."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return None, {}
        set_quantizer(model)
        tensors, manifest = distinct_tensors(model)[0], model.config.quantization_config
        manifest.checksums = tensor_checksums(tensors, manifest.linears) | config_checksum(
            json.loads(model.config.to_json_string())
        )
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained; see `smoothquant.lora`."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _PackedFiles:
    """Packed weights in a model's files (`models.packed_weights`), which become a float model, or
    are quantized on loading.

    Args:
        config: how to quantize the float model; None keeps it as it is.
        fields: ``quantization_config`` in the model's config.json.
    """

    method: str

    def __init__(self, config: MixedQuantConfig | None = None, **fields: Any) -> None:
        packed_weights("the model", fields, {})  # checks the fields
        self.config = config
        self.stored = {**fields, "quant_method": self.method}
        super().__init__(**{**self.stored, "dequantize": True})
        vars(self)["quant_method"] = self.method


@register_quantization_config(DEQUANTIZED)
class Float8Files(_PackedFiles, FineGrainedFP8Config):
    """Files with FP8 weights."""

    method = DEQUANTIZED

    @property
    def block(self) -> tuple[int, int] | None:
        """The block size, or None for one scale per tensor."""
        return float8_block("the model", self.stored)


@register_quantization_config(DEQUANTIZED_MXFP4)
class Mxfp4Files(_PackedFiles, Mxfp4Config):
    """Files with MXFP4 weights."""

    method = DEQUANTIZED_MXFP4


class _PackedReader:
    """Lets transformers dequantize packed weights as it loads them; then quantizes the model."""

    quantization_config: Any
    tokenizer = ""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.quantization_config.config is not None:
            _check_loading(self.quantization_config.config, device_map)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        stored, config = self.quantization_config.stored, self.quantization_config.config
        headers = read_headers(checkpoint_files or ())
        packed = packed_weights(model.name_or_path, stored, headers)
        if config is not None:
            check_unused(model.name_or_path, model, float_headers(headers, packed))
        warn_of_packed(model.name_or_path, stored, next(model.parameters()).dtype)
        if config is not None and config.calibration != WEIGHTS:
            self.tokenizer = tokenizer_folder(model.name_or_path, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model._weight_conversions = None  # of packed files
        config = self.quantization_config.config
        if config is not None:
            _quantize_loaded(model, config, self.tokenizer)
            place_and_fuse(model)


@register_quantizer(DEQUANTIZED)
class Float8Reader(_PackedReader, FineGrainedFP8HfQuantizer):
    """Reads files with FP8 weights."""

    def get_load_operations(self) -> dict[str, Callable[[Any], ConversionOps]]:
        return {"dequantize": _dequantize_operation}


@register_quantizer(DEQUANTIZED_MXFP4)
class Mxfp4Reader(_PackedReader, Mxfp4HfQuantizer):  # type: ignore[misc]
    """Reads files with MXFP4 weights."""


def _check_loading(config: MixedQuantConfig, device_map: Any) -> None:
    """Raise ValueError for what cannot work while weights are quantized on loading."""
    if config.calibration == WEIGHTS:
        check_batches(config, None)
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(
            "device_map must not use the disk while weights are quantized; save the quantized "
            "model first and load that"
        )


def _dequantize_operation(quantizer: Any) -> ConversionOps:
    """transformers' own operation, with blocks of any size at the edges."""
    # It imports the module that registers this one.
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    operation: Any = Fp8Dequantize(quantizer)
    operation._dequantize_one = functools.partial(
        _float8_values, block=quantizer.quantization_config.block
    )
    return operation


def _float8_values(
    weight: Tensor,
    scales: Tensor,
    output_dtype: torch.dtype | None = None,
    *,
    block: tuple[int, int] | None,
) -> Tensor:
    return dequantized(weight, scales, block, output_dtype or torch.bfloat16)


def _quantize_loaded(model: Any, config: MixedQuantConfig, tokenizer: str) -> None:
    """Calibrate and quantize a float model that transformers has loaded."""
    _check_complete(model)
    plan = Plan(model, config, tokenizer=tokenizer, progress=True)
    plan.pack_all()
    finish_and_attach(plan)


_merge_configs = AutoHfQuantizer.merge_quantization_configs


def _merge_with_files(stored: Any, given: Any) -> Any:
    """Let `from_pretrained` quantize files with packed weights; refuse other methods by name.

    Args:
        stored: ``quantization_config`` of the model's files, a dict or a config of transformers.
        given: the argument of `from_pretrained`, or None.
    """
    ours = MixedQuantConfig.quant_method
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("quant_method") != ours:
        if isinstance(given, dict) and given.get("quant_method") == ours:
            given = MixedQuantManifest.from_dict(given)
        if isinstance(given, MixedQuantConfig):
            return (Mxfp4Files if is_mxfp4(fields) else Float8Files)(given, **fields)
    return _merge_configs(stored, given)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_with_files)  # type: ignore[assignment]


def _untie_quantized(model: Any) -> None:
    """Make transformers forget about tied weights that are quantized by now."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {
        name: owner for name, owner in tied.items() if {name, owner} <= names
    }
    # `tie_weights` reads the class attribute, so shadow it where it names quantized embeddings.
    for module in model.modules():
        keys: Any = getattr(module, "_tied_weights_keys", None)
        if isinstance(keys, dict):  # a model of transformers, perhaps an inner one
            kept = {n: o for n, o in keys.items() if not _is_table(module, n, o)}
            if kept != keys:
                vars(module).setdefault(FLOAT_TIES, keys)
                vars(module)["_tied_weights_keys"] = kept


def _is_table(model: nn.Module, *names: str) -> bool:
    """Whether one of these tensors is of a quantized head or of quantized embeddings."""
    owners = {name.rpartition(".")[0] for name in names}
    return any(
        name in owners and isinstance(module, (QuantizedLinear, QuantizedEmbedding))
        for name, module in model.named_modules(remove_duplicate=False)
    )


def _refuse_resizing(name: str, *args: Any, **kwargs: Any) -> None:
    """What takes the place of `resize_token_embeddings`."""
    raise ValueError(
        f"resize_token_embeddings: the {name} has a quantized head or embeddings; resize the float "
        "model, then quantize it"
    )


def _check_complete(model: Any, awaited: Iterable[str] = ()) -> None:
    """Raise CheckpointError if transformers initialized weights at random, or if weights that were
    to be quantized never arrived."""
    missing = dict.fromkeys([*awaited, *missing_weights(model, randomly_initialized(model))])
    check_complete(model.name_or_path, model, missing, ())


def set_quantizer(model: Any) -> None:
    """Tell transformers how a model is quantized, so that `save_pretrained` saves it as such."""
    manifest = MixedQuantManifest.of_model(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MixedQuantQuantizer):
        quantizer = model.hf_quantizer = MixedQuantQuantizer(manifest)
    quantizer.quantization_config = model.config.quantization_config = manifest
    model.is_quantized, model.quantization_method = True, MixedQuantConfig.quant_method
    _untie_quantized(model)
    if any(isinstance(m, QuantizedLinear) and m.table for m in model.modules()):
        refusal = functools.partial(_refuse_resizing, type(model).__name__)
        vars(model)["resize_token_embeddings"] = refusal
    model._weight_conversions = []  # save the tensors under the model's own names
    model._keys_to_ignore_on_save = None  # and all of them


def _with_tied_heads(model: Any, manifest: Manifest, stored: Collection[str | None]) -> Manifest:
    """The manifest with the heads that the model ties to quantized embeddings, if it has none, as
    in the folder of a base model.

    Args:
        stored: names of the stored tensors. A head among them was not tied when it was saved.
    """
    shared = dict(manifest.shared)
    for name, owner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        head, packed = name.removesuffix(".weight"), owner.removesuffix(".weight") + ".packed"
        module: Any = model.get_submodule(head) if head != name else None
        if name in stored or head in manifest.linears:
            continue
        if packed in manifest.linears and isinstance(module, nn.Linear) and module.bias is None:
            n, k = module.weight.shape
            for key in manifest.blank(packed, k, n).state_dict():
                shared.setdefault(f"{head}.{key}", f"{packed}.{key}")
    return dataclasses.replace(manifest, shared=shared)


def _renaming(model: nn.Module) -> Callable[[str], str | None]:
    """Map names of a saved model to names of another class with the same base model.

    As when transformers loads a float model, the prefix of the base model is added or removed. None
    for what the model does not have, such as the saved model's head.
    """
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> str | None:
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((name for name in names if _has_place(model, name)), None)

    return rename


def _has_place(model: nn.Module, name: str) -> bool:
    """Whether a model has a module or tensor of this name, or an experts module for it."""
    module: Any = model
    path = name.split(".")
    for depth, part in enumerate(path):
        if is_fused_experts(module):
            return True
        child = module._modules.get(part)
        if child is None:
            if isinstance(module, nn.Embedding) and part == "packed":
                return True
            is_place = is_linear(module) or hasattr(module, part)
            return depth == len(path) - 1 and is_place
        module = child
    return True


def _skip_initialization(model: nn.Module) -> None:
    """Mark quantized experts, output heads and embeddings as loaded, and the modules above them:
    some of transformers' `_init_weights` would look for float weights in them."""

    def is_packed(module: nn.Module) -> bool:
        return isinstance(module, (W4A4Experts, QuantizedEmbedding)) or (
            isinstance(module, QuantizedLinear) and bool(module.table)
        )

    for module in model.modules():
        above = any(map(is_packed, module.children()))
        # buffers are computed by the initialization
        if is_packed(module) or (above and not module._buffers):
            marked: Any = module
            marked._is_hf_initialized = True


def _tensor(model: nn.Module, name: str) -> Tensor:
    block, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(block), leaf)
