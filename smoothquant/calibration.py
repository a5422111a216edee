"""Calibration: texts in, per-channel statistics of every distinct layer input out.

`token_blocks` turns what `texts.read_texts` reads into token windows, `collect_stats` runs them
through a float model once, `save_stats` and `load_stats` keep the result. `get_act_scales`
and `get_static_decoder_layer_scales` are the published functions.
"""

from __future__ import annotations

import json
import os
import random
import struct
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import MixedQuantConfig, check_integer
from .errors import CheckpointError
from .families import LayerInput, layer_inputs
from .files import atomic_file
from .linear import refuse_quantized
from .moe import PARTS, expert_arguments, expert_names, routed_inputs
from .sorting import STAT_DTYPES, ChannelStats
from .texts import read_texts

STATS_FORMAT = "mixedquant-stats"
STATS_VERSION = 1

# What activation scales may be stored as.
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# The draw of texts is the same in every run; the published one used this number too.
SHUFFLE_SEED = 42

# Tokens of a block that a config's calibration texts are cut into.
CALIBRATION_BLOCK = 1024

# Texts are tokenized in pieces of about this many characters, so that a large corpus is read only
# as far as needed and a block does not depend on how many blocks are asked for.
TOKENIZE_CHARACTERS = 1 << 20


def token_blocks(
    texts: Iterable[str], tokenizer, num_blocks: int | None, block_size: int
) -> list[Tensor]:
    """Cut texts into full blocks of tokens, in order, without overlap.

    The texts are joined by a blank line and tokenized like a document, special tokens at the very
    beginning only. A block depends only on the texts up to it, so asking for more blocks gives the
    same ones first.

    Args:
        texts: texts; empty ones are kept, as in the evaluation protocol.
        tokenizer: a transformers tokenizer.
        num_blocks: how many blocks at most; None for all that the texts give. Fewer texts than
            needed give fewer blocks and a warning.
        block_size: tokens per block, >= 1.

    Returns:
        list of int64 [1, block_size].

    Raises:
        ValueError: a count below 1, or not even one full block. TypeError: texts is a str, whose
            characters are no texts, or a count is no integer.
    """
    if num_blocks is not None:
        check_integer("num_blocks", num_blocks, 1)
    check_integer("block_size", block_size, 1)
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(f"texts must be an iterable of texts, not one or a path; got {texts!r:.60}")
    token_ids = array("q")  # a list of Python's integers takes four times the memory
    for piece in _pieces(texts):
        special = not token_ids
        token_ids.extend(tokenizer(piece, add_special_tokens=special, verbose=False).input_ids)
        if num_blocks is not None and len(token_ids) >= num_blocks * block_size:
            break
    available = len(token_ids) // block_size
    if available == 0:
        raise ValueError(
            f"block_size: texts hold {len(token_ids)} tokens, less than one block of {block_size}"
        )
    if num_blocks is None:
        num_blocks = available
    elif available < num_blocks:
        warnings.warn(
            f"texts hold {available} blocks of {block_size} tokens; {num_blocks} were asked for",
            stacklevel=2,
        )
        num_blocks = available
    ids = torch.frombuffer(token_ids[: num_blocks * block_size], dtype=torch.int64)
    return list(ids.clone().view(num_blocks, 1, block_size))


def draw_blocks(
    texts: Iterable[str], tokenizer, num_blocks: int, block_size: int, seed: int
) -> list[Tensor]:
    """Blocks of `token_blocks`, drawn by a seed from all over the texts, in the texts' order:
    running text inside of a block, many texts across blocks.

    Raises:
        ValueError: the texts give fewer than `num_blocks`, or as `token_blocks`.
    """
    every = token_blocks(texts, tokenizer, None, block_size)
    if num_blocks > len(every):
        raise ValueError(
            f"calibration blocks must be at most the {len(every)} of {block_size} tokens in the "
            f"texts; got {num_blocks}"
        )
    chosen = random.Random(seed).sample(range(len(every)), num_blocks)
    return [every[index] for index in sorted(chosen)]


def calibration_batches(model: nn.Module, tokenizer, config: MixedQuantConfig) -> list[Tensor]:
    """The token blocks that ``config.calibration`` stands for: int64 [1, T] each.

    Raises:
        ValueError: there are fewer than ``config.calibration_tokens`` tokens, or no tokenizer was
            given; as `read_texts`.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be given to calibrate on config.calibration; got None")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    size = min(CALIBRATION_BLOCK, config.calibration_tokens, positions or CALIBRATION_BLOCK)
    count = config.calibration_tokens // size
    return draw_blocks(read_texts(config.calibration), tokenizer, count, size, config.seed)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    characters, separator = 0, ""
    for text in texts:
        piece.append(text)
        characters += len(text)
        if characters >= TOKENIZE_CHARACTERS:
            yield separator + "\n\n".join(piece)
            piece, characters, separator = [], 0, "\n\n"
    if piece:
        yield separator + "\n\n".join(piece)


@torch.no_grad()
def collect_stats(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    by_layer: bool = False,
    spill: Path | None = None,
    progress: bool = True,
) -> dict[str, ChannelStats]:
    """Run `batches` through a float model and collect the statistics of its layer inputs.

    Each distinct layer input is seen once: q, k and v (or gate and up) read the same activation,
    and the same ChannelStats object stands under each of their names. Matrices of fused experts
    stand under their own names (`LayerInput.expert_linear`) with the statistics of the tokens that
    were routed to them; the name of the experts module holds the statistics of all its tokens.

    Args:
        model: a transformers causal language model (or anything `families.layer_inputs` can walk
            that takes token ids), not quantized.
        batches: int64 [B, T] tensors of token ids, without padding.
        by_layer: run all batches through one decoder layer after the other, not through the model
            one after the other: for weights that do not stay in memory.
        spill: by layer only: a folder for files of the hidden states between two layers.
        progress: show a progress bar.

    Returns:
        name of a linear -> ChannelStats of its input, the same either way.

    Raises:
        ValueError: a quantized model, a batch of another shape, an activation that is not finite,
            no batch at all, or a layer that was never reached; the message names the layer.
    """
    refuse_quantized(model)
    inputs = layer_inputs(model)
    stats = _idle_experts(model, inputs)
    runner = without_head(model, [item.name for item in inputs])
    device = next(model.parameters()).device

    def add(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in stats:
            stats.update(dict.fromkeys(names, ChannelStats.empty(x.shape[-1])))
        stats[names[0]].update(x)
        if not stats[names[0]].is_finite():
            raise ValueError(
                f"the input of layer {names[0]} is not finite: NaN or Inf while calibrating"
            )

    def checked() -> Iterator[Tensor]:
        number = -1
        for number, batch in enumerate(batches):
            shape = tuple(getattr(batch, "shape", ()))
            if len(shape) != 2:
                raise ValueError(
                    f"batches must hold int64 [B, T] tensors; item {number} is "
                    f"{type(batch).__name__} of shape {shape}"
                )
            yield batch
        if number < 0:
            raise ValueError("batches must hold at least one batch; got none")

    hooks = input_hooks(inputs, add)
    shown = {"desc": "calibrating", "disable": not progress}
    if by_layer:
        from .blocks import blocks

        found = blocks(model, list(hooks), list(checked()), spill)
        for block in tqdm(found, unit="layer", **shown):
            block.run({name: hook for name, hook in hooks.items() if block.holds(name)})
    else:
        with evaluating(model), hooked(model, hooks):
            length = len(batches) if isinstance(batches, Sequence) else None
            for batch in tqdm(checked(), total=length, unit="batch", **shown):
                runner(batch.to(device), **no_cache(model))
    unreached = [item.name for item in inputs if item.name not in stats]
    if unreached:
        raise ValueError(f"no token reached layer {unreached[0]} ({len(unreached)} layers in all)")
    idle = [name for name, entry in stats.items() if entry.count == 0]
    if idle:
        warnings.warn(
            f"no token was routed to {len(idle)} expert matrices, {idle[0]} the first: "
            "calibrate on more text",
            stacklevel=3,
        )
    return stats


def _idle_experts(model: nn.Module, inputs: Sequence[LayerInput]) -> dict[str, ChannelStats]:
    """Statistics of zero rows for every expert's matrix: some experts may never be reached."""
    stats = {}
    for item in inputs:
        if item.experts:
            module = model.get_submodule(item.experts)
            for name, (_, part) in expert_names(item.experts, module).items():
                stats[name] = ChannelStats.empty(getattr(module, part).shape[-1])
    return stats


def without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The part of the model that holds all named layers; its language head is not needed."""
    base = getattr(model, "base_model", model)
    prefix = next((name + "." for name, m in model.named_modules() if m is base and name), "")
    return base if all(name.startswith(prefix) for name in names) else model


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The keyword that keeps a transformers model from filling a cache, where it has one."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable], after: bool = False) -> Iterator[None]:
    """Calls {name of a submodule: hook(module, args, kwargs, output if after)} while inside."""
    register = "register_forward_hook" if after else "register_forward_pre_hook"
    handles = [
        getattr(model.get_submodule(name), register)(hook, with_kwargs=True)
        for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple, kwargs: dict) -> Tensor:
    """What a hooked linear is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def input_hooks(
    inputs: Sequence[LayerInput], visit: Callable[[tuple[str, ...], Tensor], None]
) -> dict[str, Callable]:
    """Hooks for `hooked` that call visit(names, x) for every distinct input of a matrix.

    names: what stands for the input: the linears that read x, one expert's matrix, or an experts
        module as a whole. x: [..., K]; expert matrices get the tokens routed to them, and only
        those experts that get any are visited.
    """

    def linear_hook(item: LayerInput) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            visit(item.linears, first_argument(args, kwargs))

        return hook

    def experts_hook(item: LayerInput) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, top_k_index = expert_arguments(module, args, kwargs)
            visit((item.experts,), x)
            for expert, *part_inputs in routed_inputs(module, x, top_k_index):
                for part, part_input in zip(PARTS, part_inputs, strict=True):
                    visit((item.expert_linear(expert, part),), part_input)

        return hook

    hooks = {item.linears[0]: linear_hook(item) for item in inputs if item.linears}
    return hooks | {item.experts: experts_hook(item) for item in inputs if item.experts}


def save_stats(stats: Mapping[str, ChannelStats], path: str | os.PathLike) -> None:
    """Write statistics to one safetensors file, whole or not at all: equal ones are equal bytes.

    An object that stands under several names is stored once and is one object again when loaded.
    """
    index_of: dict[int, int] = {}
    names: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    mean_only: list[int] = []
    for name, entry in stats.items():
        if not isinstance(entry, ChannelStats):
            raise TypeError(f"stats[{name!r}] must be ChannelStats; got {type(entry).__name__}")
        if id(entry) not in index_of:
            index = index_of[id(entry)] = len(index_of)
            tensors.update((f"{index}.{field}", t) for field, t in entry.to_dict().items())
            if entry.mean_only:
                mean_only.append(index)
        names[name] = index_of[id(entry)]
    metadata = {
        "format": STATS_FORMAT,
        "version": str(STATS_VERSION),
        "names": json.dumps(names),
        "mean_only": json.dumps(mean_only),
    }
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata, which safetensors writes in random order, in one."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def load_stats(path: str | os.PathLike) -> dict[str, ChannelStats]:
    """Read statistics that `save_stats` wrote, or published activation scales.

    Args:
        path: a file of `save_stats`, or what `load_act_scales` takes: a published
            ``act_scales/*.pt`` of max|x| per channel. Of these, mean, rms and max name the same
            channels (`ChannelStats.from_max`), and no code in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged or something else; the message names the file
            and what is wrong in it.
    """
    if Path(path).suffix in (".pt", ".pth"):
        return {name: ChannelStats.from_max(s) for name, s in load_act_scales(path).items()}
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != STATS_FORMAT:
        raise CheckpointError(f"{path}: not a file of calibration statistics")
    if metadata.get("version") != str(STATS_VERSION):
        raise CheckpointError(
            f"{path}: format version {metadata.get('version')!r}, this package reads "
            f"{STATS_VERSION}"
        )
    try:
        names, mean_only = json.loads(metadata["names"]), set(json.loads(metadata["mean_only"]))
        entries = {
            index: ChannelStats(
                {field: tensors[f"{index}.{field}"] for field in STAT_DTYPES}, index in mean_only
            )
            for index in set(names.values())
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged statistics: {error!r}") from error
    return {name: entries[index] for name, index in names.items()}


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def get_act_scales(
    model: nn.Module,
    tokenizer,
    dataset_path: str | os.PathLike | Iterable[str],
    num_samples: int = 512,
    seq_len: int = 512,
) -> dict[str, Tensor]:
    """Return max|x| per channel of the input of every nn.Linear, the published activation scales.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        dataset_path: what `read_texts` takes: a local file, several, or an iterable of texts. Blank
            texts are passed over; `num_samples` of the others are drawn by a fixed seed.
        num_samples: texts at most.
        seq_len: tokens of each text at most.

    Returns:
        name -> float32 [K], CPU. For fused experts, whose matrices are no nn.Linear, the experts
        module and its router have an entry: they read one and the same input.

    Raises:
        ValueError: an argument is wrong, the model is quantized, no text is left, or an activation
            is not finite.
    """
    scales: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.detach().reshape(-1, x.shape[-1]).abs().amax(dim=0).float().cpu()
        if not torch.isfinite(largest).all():
            raise ValueError(f"the input of layer {name} is not finite: NaN or Inf")
        scales[name] = torch.maximum(scales[name], largest) if name in scales else largest

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for item in layer_inputs(model):
        names += filter(None, (item.experts, item.router))
    hooks = {
        name: lambda module, args, kwargs, name=name: record(name, first_argument(args, kwargs))
        for name in names
    }
    with hooked(model, hooks):
        _run_samples(model, tokenizer, dataset_path, num_samples, seq_len)
    return scales


# Published name of a decoder layer's scale -> (linear, which side of it).
STATIC_SCALES = {
    "attn_input_scale": ("self_attn.q_proj", "input"),
    "q_output_scale": ("self_attn.q_proj", "output"),
    "k_output_scale": ("self_attn.k_proj", "output"),
    "v_output_scale": ("self_attn.v_proj", "output"),
    "out_input_scale": ("self_attn.out_proj", "input"),
    "fc1_input_scale": ("fc1", "input"),
    "fc2_input_scale": ("fc2", "input"),
}


def get_static_decoder_layer_scales(
    model: nn.Module,
    tokenizer,
    dataset_path: str | os.PathLike | Iterable[str],
    num_samples: int = 512,
    seq_len: int = 512,
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Return the static INT8 scales of an OPT's decoder layers, as published.

    Arguments as in `get_act_scales`.

    Returns:
        (per decoder layer a dict of scales, max|x| / 127 of the inputs and outputs concerned;
        name of every nn.Linear -> {"input": max|x|, "output": max|y|}).

    Raises:
        ValueError: the model is no OPT, or as in `get_act_scales`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type != "opt":
        raise ValueError(f"model must be an OPT (config.model_type 'opt'); got {model_type!r}")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name.removesuffix(".fc1") for name in names if name.endswith(".fc1")]
    ranges: dict[str, dict[str, float]] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        entry = ranges.setdefault(name, {"input": 0.0, "output": 0.0})
        for key, tensor in (("input", x), ("output", y)):
            largest = tensor.detach().abs().max().item()
            if not largest < float("inf"):
                raise ValueError(f"the {key} of layer {name} is not finite: {largest}")
            entry[key] = max(entry[key], largest)

    hooks = {
        name: lambda module, args, kwargs, y, name=name: record(
            name, first_argument(args, kwargs), y
        )
        for name in names
    }
    with hooked(model, hooks, after=True):
        _run_samples(model, tokenizer, dataset_path, num_samples, seq_len)
    scales = [
        {key: ranges[f"{layer}.{name}"][side] / 127 for key, (name, side) in STATIC_SCALES.items()}
        for layer in layers
    ]
    return scales, ranges


@torch.no_grad()
def _run_samples(model, tokenizer, dataset_path, num_samples, seq_len) -> None:
    """Run the drawn texts through the model, one by one."""
    refuse_quantized(model)
    check_integer("num_samples", num_samples, 1)
    check_integer("seq_len", seq_len, 1)
    texts = _draw(
        (text for text in read_texts(dataset_path) if text.strip()), num_samples, SHUFFLE_SEED
    )
    if not texts:
        raise ValueError(f"dataset_path: no text in {dataset_path!r:.200}")
    device = next(model.parameters()).device
    with evaluating(model):
        for text in tqdm(texts, desc="activation scales", unit="text"):
            token_ids = tokenizer(
                text, return_tensors="pt", max_length=seq_len, truncation=True
            ).input_ids
            if token_ids.numel():
                model(token_ids.to(device), **no_cache(model))


def _draw(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Draw `count` texts without keeping all of them in memory (reservoir sampling)."""
    generator = random.Random(seed)
    drawn: list[str] = []
    for index, text in enumerate(texts):
        if index < count:
            drawn.append(text)
        else:
            place = generator.randint(0, index)
            if place < count:
                drawn[place] = text
    return drawn


def save_act_scales(scales: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write activation scales, whole or not at all: safetensors, or for .pt as published.

    A .pt file is read by code written for the published repositories.
    """
    # clones: safetensors refuses tensors that share memory
    scales = {name: scale.detach().cpu().clone().contiguous() for name, scale in scales.items()}
    with atomic_file(path) as temporary:
        if Path(path).suffix in (".pt", ".pth"):
            torch.save(scales, temporary)
        else:
            safetensors.torch.save_file(scales, temporary)


def load_act_scales(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read activation scales: name -> max|x| per channel, float32 [K], CPU.

    Args:
        path: a published .pt file (read with ``weights_only=True``: no code in it is run), a file
            of `save_act_scales`, or one of `save_stats`, whose abs_max is taken.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == STATS_FORMAT:
            return {name: entry.abs_max for name, entry in load_stats(path).items()}
        scales = tensors
    else:
        try:
            scales = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and the unpickler each raise their own
            # torch's words may advise to run the code in it
            said = "" if "weights_only" in str(error) else f": {error}"
            raise CheckpointError(
                f"{path}: not a readable file of tensors and nothing else{said}"
            ) from error
    if not isinstance(scales, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(scales).__name__}")
    for name, scale in scales.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: expected names of layers, found {name!r:.80}")
        # a view of few values may claim to be a vector of more than memory holds
        plain = isinstance(scale, Tensor) and scale.layout == torch.strided
        if not plain or scale.ndim != 1 or not scale.is_contiguous():
            raise CheckpointError(f"{path}: {name} is no vector of one scale per channel")
        if scale.dtype not in SCALE_DTYPES or scale.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is {scale.dtype} on {scale.device}, no floats")
        scales[name] = scale = scale.detach().float()
        if not torch.isfinite(scale).all() or (scale < 0).any():
            raise CheckpointError(f"{path}: {name} holds a negative or non-finite scale")
    return scales
