"""Export LLaMA-like models to GGUF, the file format of llama.cpp.

llama.cpp quantizes activations by its own rule: to 8 bits, in blocks of 32 channels. A weight is
stored in one of these ways, per matrix:

- Q4_0, exactly: codes in natural order whose groups are runs of a multiple of 32 channels, without
  salient channels or rotation;
- Q4_0 or Q8_0, rounded again: any other quantized weight;
- Q8_0: a quantized output head or embeddings, and F16 where rows are not a multiple of 32;
- F16: a float matrix. Vectors are F32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.files import atomic_file
from ..core.version import install_command
from ..layers.embedding import QuantizedEmbedding
from ..layers.linear import QuantizedLinear, W4A4Linear, kernel_choices
from .export import natural_codes, natural_scales

BLOCK = 32  # channels that share a scale in Q4_0 and Q8_0
FORMATS = ("Q8_0", "Q4_0")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names a model class, and whether it rotates channels 2 i and 2 i + 1 of a head
    together, where transformers rotates i and i + head_dim / 2."""

    name: str
    interleaves: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True),
    "MistralForCausalLM": Architecture("llama", True),
    "Qwen2ForCausalLM": Architecture("qwen2", False),
}

# llama.cpp's names for the ways to cut a text before byte-pair encoding.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[tuple[Any, ...], str] = {
    ("ByteLevel",): "gpt-2",
    (("Digits", True), "ByteLevel"): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}" + _REST),): "llama-bpe",
    (("Split", _WORDS % r"\p{N}" + _REST),): "qwen2",
}


@torch.no_grad()
def export_gguf(
    model: nn.Module,
    path: str | os.PathLike,
    tokenizer: Any = None,
    *,
    round_to: str = "Q8_0",
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a transformers model as a GGUF file, atomically.

    Args:
        model: a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM, quantized or float; it is
            not changed. Smoothing and permutations that were folded into it stay folded.
        path: the file.
        tokenizer: the model's tokenizer (byte-pair encoding); None writes a file without a
            vocabulary, which reads token ids only.
        round_to: "Q8_0" (8.5 bits per weight) or "Q4_0" (4.5), for quantized weights that Q4_0
            cannot express exactly.
        overwrite: replace a GGUF file, or an empty one.

    Returns:
        {format: number of tensors stored in it}.

    Raises:
        ValueError: the model, its position embeddings or its tokenizer cannot be expressed, or the
            file exists. Nothing is written.
        RuntimeError: the package gguf is not installed.
        OSError: writing failed. Nothing is left behind.
    """
    path = Path(path)
    if round_to not in FORMATS:
        raise ValueError(f"round_to must be one of {', '.join(FORMATS)}; got {round_to!r}")
    check_gguf_target(path, overwrite=overwrite)
    try:
        import gguf
    except ImportError as error:
        command = install_command("gguf")
        raise RuntimeError(f"writing GGUF files needs the package gguf: {command}") from error
    architecture = _architecture(model)
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.name.upper()], config.num_hidden_layers
    )
    tensors: list[_Stored] = []
    for name, source in _weights(model):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ValueError(f"GGUF has no name for {name} of {type(model).__name__}")
        reordered = architecture.interleaves and name.split(".")[-2] in ("q_proj", "k_proj")
        tensors.append(_stored(stored, source, round_to, head_dim if reordered else 0))
    factors = _frequency_factors(model, head_dim)
    if factors is not None:
        tensors.append(_stored("rope_freqs.weight", factors, round_to, 0))
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.format] = counts.get(tensor.format, 0) + 1
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, config.vocab_size)

    with atomic_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture.name)
        _add_config(writer, config, head_dim)
        widest = max(("F16", *FORMATS), key=lambda kind: counts.get(kind, 0))
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{widest}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            _add_vocabulary(writer, vocabulary, tokenizer)
        for tensor in tensors:
            kind, shape = gguf.GGMLQuantizationType[tensor.format], tensor.shape
            dtype = np.dtype({"F32": "float32", "F16": "float16"}.get(tensor.format, "uint8"))
            if dtype == np.uint8:
                shape = gguf.quant_shape_to_byte_shape(shape, kind)
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, shape, dtype, size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.data()))
        writer.close()
    return counts


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file; data() makes its bytes."""

    name: str
    shape: tuple[int, ...]
    format: str
    data: Callable[[], np.ndarray]


def _architecture(model: nn.Module) -> Architecture:
    name = type(model).__name__
    architecture, config = ARCHITECTURES.get(name), getattr(model, "config", None)
    if architecture is None or config is None:
        raise ValueError(f"model must be a {', '.join(ARCHITECTURES)} for a GGUF file; got {name}")
    if config.hidden_act != "silu":
        raise ValueError(f"GGUF has no {name} with hidden_act={config.hidden_act!r}")
    rope: Any = config.rope_parameters
    usual = ("default", "llama3") if architecture.name == "llama" else ("default",)
    if rope["rope_type"] not in usual or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"cannot write the position embeddings of {name} as GGUF: rope_parameters={dict(rope)}"
        )
    return architecture


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """The tensors of a model by their names in the float model; a tied one once, as embeddings."""
    embeddings = {
        module.packed: name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedEmbedding)
    }
    seen: set[Tensor] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{embeddings.get(module, name)}.weight", module
            if module.bias is not None:
                yield f"{name}.bias", module.bias
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{name}.{key}", parameter


def _stored(name: str, source: Tensor | QuantizedLinear, round_to: str, head_dim: int) -> _Stored:
    """head_dim: of a q or k projection whose rows are reordered; otherwise 0."""
    if isinstance(source, QuantizedLinear):
        shape: tuple[int, ...] = (source.out_features, source.in_features)
        exact = _q4_blocks(source)
        kind = "Q4_0" if exact is not None else "Q8_0" if source.table else round_to
        if shape[1] % BLOCK:
            kind = "F16"
    else:
        shape, exact = tuple(source.shape), None
        kind = "F16" if source.dim() == 2 else "F32"

    def data() -> np.ndarray:
        if exact is not None:
            values = exact()
        else:
            weight = source.dequantize() if isinstance(source, QuantizedLinear) else source
            values = _encoded(name, weight.detach().float().cpu(), kind)
        return interleaved(torch.from_numpy(values), head_dim).numpy() if head_dim else values

    return _Stored(name, shape, kind, data)


def _encoded(name: str, weight: Tensor, kind: str) -> np.ndarray:
    import gguf

    if not weight.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf")
    if kind == "F32":
        return weight.numpy()
    half = weight.half()
    if not half.isfinite().all():
        raise ValueError(f"{name} is beyond the range of float16, which GGUF files use")
    if kind == "F16":
        return half.numpy()
    return gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])


def _q4_blocks(layer: QuantizedLinear) -> Callable[[], np.ndarray] | None:
    """Makes the blocks of Q4_0 with the layer's codes and scales, uint8 [N, K / 32 * 18]; None if
    Q4_0 cannot express them."""
    if not isinstance(layer, W4A4Linear) or layer.table or layer.num_salient:
        return None
    if kernel_choices(layer.config).rotation not in (0, 1) or layer.in_features % BLOCK:
        return None
    try:
        scales = natural_scales("the layer", layer, torch.float16)
    except ValueError:
        return None
    size = layer.in_features // scales.shape[1]
    if size % BLOCK:
        return None

    def blocks() -> np.ndarray:
        nibbles = (natural_codes(layer) + 8).view(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2))
        packed = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
        each = scales.repeat_interleave(size // BLOCK, dim=1)[:, :, None].view(torch.uint8)
        return torch.cat((each, packed), dim=2).flatten(1).numpy()

    return blocks


def check_gguf_target(
    path: Path, *, overwrite: bool, name: str = "path", option: str = "overwrite=True"
) -> None:
    """Raise ValueError unless a GGUF file can be written to a path, or may replace what is there.

    Args:
        name, option: what the caller's users call `path`, and what replaces a file.
    """
    if path.is_dir():
        raise ValueError(f"{name} must be a file; {path} is a folder")
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{name} already exists: {path} ({option} replaces a GGUF file)")
    with path.open("rb") as file:
        if file.read(4) not in (b"", b"GGUF"):
            raise ValueError(f"{name} holds something other than a GGUF file and stays: {path}")


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The rows of a q or k projection, [N, ...], in llama.cpp's order.

    transformers rotates channels i and i + head_dim / 2 of a head together, llama.cpp channels 2 i
    and 2 i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _frequency_factors(model: Any, head_dim: int) -> Tensor | None:
    """What llama.cpp divides the frequencies of default position embeddings by: float32
    [head_dim / 2]; None for default ones."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    frequencies = model.get_decoder().rotary_emb.inv_freq.detach().float().cpu()
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return rope["rope_theta"] ** -steps / frequencies


def _add_config(writer: Any, config: Any, head_dim: int) -> None:
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


@dataclass(frozen=True)
class _Vocabulary:
    """model: "gpt2" (bytes) or "llama" (SentencePiece); tokens, types: by id; cut: a value of CUTS;
    merges: of "gpt2"; scores, adds_space: of "llama"."""

    model: str
    tokens: list[str]
    types: list[int]
    cut: str = ""
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    adds_space: bool = False


def _vocabulary(tokenizer: Any, size: int) -> _Vocabulary:
    """The vocabulary of a tokenizer, filled up to `size` tokens.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    if data.get("model", {}).get("type") != "BPE":
        raise ValueError(
            "tokenizer must use byte-pair encoding (tokenizer.json) for a GGUF file; got "
            f"{type(tokenizer).__name__}"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(f"tokenizer has ids up to {largest}; the model has {size} tokens")
    kinds = gguf.TokenType
    bytes_fall_back = bool(data["model"].get("byte_fallback"))
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(kinds.UNUSED)] * size
    for text, index in data["model"]["vocab"].items():
        tokens[index] = text
        is_byte = bytes_fall_back and len(text) == 6 and text.startswith("<0x")
        types[index] = int(kinds.BYTE if is_byte else kinds.NORMAL)
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
    if not bytes_fall_back:
        return _Vocabulary("gpt2", tokens, types, cut=_cut(data), merges=tuple(merges))
    unknown = data["model"].get("unk_token")
    if unknown in data["model"]["vocab"]:
        types[data["model"]["vocab"][unknown]] = int(kinds.UNKNOWN)
    # SentencePiece merges the pair with the best score first: the order of the merges.
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    scores = tuple(-float(ranks.get(token, len(merges))) for token in tokens)
    return _Vocabulary("llama", tokens, types, scores=scores, adds_space=_adds_space(data))


def _cut(data: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    _check_normalizers(data, ["NFC"])
    first = data["pre_tokenizer"] or {"type": "None"}
    parts = first.get("pretokenizers", [first])
    steps: list[Any] = []
    if not any(part["type"] == "ByteLevel" for part in parts):
        steps.append("no ByteLevel")
    for step in parts:
        if step["type"] == "Digits":
            steps.append(("Digits", step["individual_digits"]))
        elif step["type"] == "Split":
            steps.append(("Split", step["pattern"].get("Regex")))
            if step["behavior"] != "Isolated" or step["invert"]:
                steps.append(f"{step['behavior']}{', inverted' * step['invert']}")
        elif step["type"] != "ByteLevel" or step["use_regex"] or step["add_prefix_space"]:
            steps.append(step["type"] + (" with a space" * bool(step.get("add_prefix_space"))))
    name = CUTS.get(tuple(steps))
    if name is None:
        raise ValueError(f"tokenizer cuts texts in a way that has no name in GGUF: {steps}")
    return name


def _check_normalizers(data: dict[str, Any], known: Sequence[str]) -> list[str]:
    """The types of a tokenizer's normalizers; ValueError if llama.cpp does not know one of them."""
    normalizer = data["normalizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in steps:
        is_space = (step.get("pattern"), step.get("content")) == ({"String": " "}, "\u2581")
        if step["type"] not in known or (step["type"] == "Replace" and not is_space):
            raise ValueError(
                f"tokenizer normalizes texts ({step['type']}) in a way that llama.cpp does not"
            )
    return [step["type"] for step in steps]


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether a tokenizer with byte fallback puts a space before a text."""
    before = data["pre_tokenizer"] or {}
    if "Prepend" in _check_normalizers(data, ["Prepend", "Replace"]):
        return True
    return before.get("type") == "Metaspace" and before["prepend_scheme"] != "never"


def _add_vocabulary(writer: Any, vocabulary: _Vocabulary, tokenizer: Any) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre(vocabulary.cut)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
