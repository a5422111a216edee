"""Calibration: texts in, per-channel statistics of every distinct layer input out.

`read_texts` and `token_blocks` turn a file or an iterable into token windows, `collect_stats` runs
them through a float model once, `save_stats` and `load_stats` keep the result. `get_act_scales`
and `get_static_decoder_layer_scales` are the published functions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .bundled import line_rows
from .errors import CheckpointError
from .families import LayerInput, layer_inputs
from .moe import PARTS, routed_inputs
from .sorting import STAT_DTYPES, ChannelStats

STATS_FORMAT = "mixedquant-stats"
STATS_VERSION = 1
SHUFFLE_SEED = 42  # as published

# Texts are tokenized in pieces of about this many characters, so that a large corpus is read only
# as far as needed and a block does not depend on how many blocks are asked for.
TOKENIZE_CHARACTERS = 1 << 20


def read_texts(source: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    """Yield the texts of a local file or an iterable, one by one.

    Args:
        source: a path, told by its suffix: .txt and .raw hold a text per line (with its newline;
            a blank line is an empty text, as in the WikiText datasets), .jsonl and .json an object
            with a string "text" per line, .jsonl.zst the same compressed (needs the package
            zstandard), .parquet a string column "text" (needs pyarrow). Or any iterable of str.

    Raises:
        ValueError: source does not exist, has another suffix or holds something else; the message
            names the file and the line.
        TypeError: an iterable yields something that is not a str.
        RuntimeError: the package that reads this kind of file is not installed.

    A path is checked when this function is called, its content while it is read.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise TypeError(f"source must be a path or an iterable of str; got {source!r}")
        return _checked_texts(source)
    path = Path(source)
    suffix = next((suffix for suffix in _READERS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"source must end in one of {', '.join(_READERS)}; got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"source: no such file: {str(path)!r}")
    reader, package = _READERS[suffix]
    if package and importlib.util.find_spec(package) is None:
        raise RuntimeError(
            f"reading {str(path)!r} needs the Python package {package}; "
            f"install it with: pip install {package}"
        )
    return reader(path)


def _checked_texts(source: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(source):
        if not isinstance(text, str):
            raise TypeError(f"source must yield str; item {index} is {type(text).__name__}")
        yield text


def _read_lines(path: Path) -> Iterator[str]:
    try:
        yield from line_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"source: {str(path)!r} is not UTF-8 text: {error}") from error


def _texts_of_json_lines(path: Path, lines: Iterable[str]) -> Iterator[str]:
    number = 0
    try:
        for line in lines:
            number += 1
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError('no object with a string "text"')
            yield row["text"]
    except ValueError as error:  # includes broken JSON and broken UTF-8
        raise ValueError(f"source: {str(path)!r}, line {number}: {error}") from error


def _read_json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as lines:
        yield from _texts_of_json_lines(path, lines)


def _read_compressed_json_lines(path: Path) -> Iterator[str]:
    import zstandard

    try:
        with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            yield from _texts_of_json_lines(path, lines)
    except zstandard.ZstdError as error:
        raise ValueError(f"source: {str(path)!r} is not zstandard data: {error}") from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["text"]):
                if "text" not in batch.schema.names:
                    raise ValueError('no column "text"')
                for row, text in enumerate(batch.column("text").to_pylist()):
                    if not isinstance(text, str):
                        raise ValueError(f'column "text" holds {text!r}, not a string (row {row})')
                    yield text
    except (ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"source: {str(path)!r}: {error}") from error


# Suffix -> (reader, package that it needs).
_READERS = {
    ".txt": (_read_lines, None),
    ".raw": (_read_lines, None),
    ".jsonl": (_read_json_lines, None),
    ".json": (_read_json_lines, None),
    ".jsonl.zst": (_read_compressed_json_lines, "zstandard"),
    ".parquet": (_read_parquet, "pyarrow"),
}


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
        ValueError: a count below 1, or not even one full block.
    """
    if num_blocks is not None:
        _check_count("num_blocks", num_blocks)
    _check_count("block_size", block_size)
    token_ids: list[int] = []
    for piece in _pieces(texts):
        token_ids += tokenizer(piece, add_special_tokens=not token_ids, verbose=False).input_ids
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
    ids = torch.tensor(token_ids[: num_blocks * block_size], dtype=torch.int64)
    return list(ids.view(num_blocks, 1, block_size))


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


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


@torch.no_grad()
def collect_stats(
    model: nn.Module, batches: Iterable[Tensor], *, progress: bool = True
) -> dict[str, ChannelStats]:
    """Run `batches` through a float model and collect the statistics of its layer inputs.

    Each distinct layer input is seen once: q, k and v (or gate and up) read the same activation,
    and the same ChannelStats object stands under each of their names. Matrices of fused experts
    stand under their own names (`LayerInput.expert_linear`) with the statistics of the tokens that
    were routed to them; the name of the experts module holds the statistics of all its tokens.

    Args:
        model: a transformers causal language model (or anything `families.layer_inputs` can walk
            that takes token ids), not quantized; left in evaluation mode.
        batches: int64 [B, T] tensors of token ids, without padding.
        progress: show a progress bar.

    Returns:
        name of a linear -> ChannelStats of its input.

    Raises:
        ValueError: an activation is not finite, no batch came, or a layer was never reached; the
            message names the layer.
    """
    inputs = layer_inputs(model)
    stats: dict[str, ChannelStats] = {}
    runner = _without_head(model, [item.name for item in inputs])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    num_batches = 0
    try:
        with _hooked(_stat_hooks(model, inputs, stats)):
            for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
                runner(batch.to(device), **_no_cache(model))
                num_batches += 1
    finally:
        model.train(was_training)
    if num_batches == 0:
        raise ValueError("batches must hold at least one batch; got none")
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


def _without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The part of the model that holds all named layers; its language head is not needed."""
    base = getattr(model, "base_model", model)
    prefix = next((name + "." for name, m in model.named_modules() if m is base and name), "")
    return base if all(name.startswith(prefix) for name in names) else model


def _no_cache(model: nn.Module) -> dict:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextmanager
def _hooked(handles: Iterable) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stat_hooks(model: nn.Module, inputs: Sequence[LayerInput], stats: dict[str, ChannelStats]):
    for item in inputs:
        if item.linears:
            hook = _linear_hook(item, stats)
            yield model.get_submodule(item.linears[0]).register_forward_pre_hook(hook)
        if item.experts:
            hook = _experts_hook(item, stats)
            yield model.get_submodule(item.experts).register_forward_pre_hook(
                hook, with_kwargs=True
            )


def _update(stats: dict[str, ChannelStats], names: Sequence[str], x: Tensor) -> None:
    """Add the rows of x to the one entry that all of `names` share."""
    if names[0] not in stats:
        entry = ChannelStats.empty(x.shape[-1])
        stats.update((name, entry) for name in names)
    entry = stats[names[0]]
    entry.update(x)
    if not entry.is_finite():
        raise ValueError(
            f"the input of layer {names[0]} is not finite: NaN or Inf while calibrating"
        )


def _linear_hook(item: LayerInput, stats: dict[str, ChannelStats]):
    def hook(module: nn.Module, args: tuple) -> None:
        _update(stats, item.linears, args[0])

    return hook


def _experts_hook(item: LayerInput, stats: dict[str, ChannelStats]):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        x = named["hidden_states"].reshape(-1, module.gate_up_proj.shape[-1])
        top_k_index = named["top_k_index"].reshape(x.shape[0], -1)
        _update(stats, (item.experts,), x)
        for expert in range(module.gate_up_proj.shape[0]):
            for part in PARTS:
                width = getattr(module, part).shape[-1]
                name = item.expert_linear(expert, part)
                stats.setdefault(name, ChannelStats.empty(width))
        for expert, *part_inputs in routed_inputs(module, x, top_k_index):
            for part, part_input in zip(PARTS, part_inputs, strict=True):
                _update(stats, (item.expert_linear(expert, part),), part_input)

    return hook


def save_stats(stats: Mapping[str, ChannelStats], path: str | os.PathLike) -> None:
    """Write statistics to one safetensors file, whole or not at all.

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
    with _atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)


def load_stats(path: str | os.PathLike) -> dict[str, ChannelStats]:
    """Read statistics that `save_stats` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or something else; the message names the file
            and what is wrong in it.
    """
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
            index: _checked_stats(
                {field: tensors[f"{index}.{field}"] for field in STAT_DTYPES}, index in mean_only
            )
            for index in set(names.values())
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged statistics: {error!r}") from error
    return {name: entries[index] for name, index in names.items()}


def _checked_stats(fields: dict[str, Tensor], mean_only: bool) -> ChannelStats:
    for field in ("count", "abs_max", "abs_sum", "sq_sum"):
        if not torch.isfinite(fields[field]).all() or (fields[field] < 0).any():
            raise ValueError(f"{field} holds a negative or non-finite value")
    return ChannelStats(fields, mean_only)


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


@contextmanager
def _atomic_path(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary sibling that becomes `path` when the block ends without an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(descriptor)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
        dataset_path: what `read_texts` takes: a local file or an iterable of texts. Blank texts are
            passed over; `num_samples` of the others are drawn by a fixed seed.
        num_samples: texts at most.
        seq_len: tokens of each text at most.

    Returns:
        name -> float32 [K], CPU. For fused experts, whose matrices are no nn.Linear, the experts
        module and its router have an entry: they read one and the same input.

    Raises:
        ValueError: an argument is wrong, no text is left, or an activation is not finite.
    """
    scales: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.detach().reshape(-1, x.shape[-1]).abs().amax(dim=0).float().cpu()
        if not torch.isfinite(largest).all():
            raise ValueError(f"the input of layer {name} is not finite: NaN or Inf")
        scales[name] = torch.maximum(scales[name], largest) if name in scales else largest

    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for item in layer_inputs(model):
        for name in filter(None, (item.experts, item.router)):
            modules[name] = model.get_submodule(name)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: record(name, _first(args, kwargs)),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    _run_samples(model, tokenizer, dataset_path, num_samples, seq_len, handles)
    return scales


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
    ranges: dict[str, dict[str, float]] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        entry = ranges.setdefault(name, {"input": 0.0, "output": 0.0})
        for key, tensor in (("input", x), ("output", y)):
            largest = tensor.detach().abs().max().item()
            if not largest < float("inf"):
                raise ValueError(f"the {key} of layer {name} is not finite: {largest}")
            entry[key] = max(entry[key], largest)

    handles = [
        module.register_forward_hook(
            lambda module, args, y, name=name: record(name, args[0], y),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    _run_samples(model, tokenizer, dataset_path, num_samples, seq_len, handles)

    prefix = "model.decoder.layers"
    layers = []
    for index in range(model.config.num_hidden_layers):
        attention = f"{prefix}.{index}.self_attn"
        layers.append(
            {
                "attn_input_scale": ranges[f"{attention}.q_proj"]["input"] / 127,
                "q_output_scale": ranges[f"{attention}.q_proj"]["output"] / 127,
                "k_output_scale": ranges[f"{attention}.k_proj"]["output"] / 127,
                "v_output_scale": ranges[f"{attention}.v_proj"]["output"] / 127,
                "out_input_scale": ranges[f"{attention}.out_proj"]["input"] / 127,
                "fc1_input_scale": ranges[f"{prefix}.{index}.fc1"]["input"] / 127,
                "fc2_input_scale": ranges[f"{prefix}.{index}.fc2"]["input"] / 127,
            }
        )
    return layers, ranges


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def _run_samples(model, tokenizer, dataset_path, num_samples, seq_len, handles) -> None:
    """Run the drawn texts through the model, one by one, under the given hooks."""
    with _hooked(handles):
        _check_count("num_samples", num_samples)
        _check_count("seq_len", seq_len)
        texts = _draw(
            (text for text in read_texts(dataset_path) if text.strip()), num_samples, SHUFFLE_SEED
        )
        if not texts:
            raise ValueError(f"dataset_path: no text in {dataset_path!r}")
        device = next(model.parameters()).device
        model.eval()
        for text in tqdm(texts, desc="activation scales", unit="text"):
            token_ids = tokenizer(
                text, return_tensors="pt", max_length=seq_len, truncation=True
            ).input_ids
            if token_ids.numel():
                model(token_ids.to(device), **_no_cache(model))


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
    scales = {name: scale.detach().cpu().contiguous() for name, scale in scales.items()}
    with _atomic_path(path) as temporary:
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
            raise CheckpointError(f"{path}: not a readable file of tensors: {error}") from error
    if not isinstance(scales, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(scales).__name__}")
    for name, scale in scales.items():
        if not isinstance(scale, Tensor) or scale.ndim != 1:
            raise CheckpointError(f"{path}: {name} is no vector of one scale per channel")
        if not torch.isfinite(scale).all() or (scale < 0).any():
            raise CheckpointError(f"{path}: {name} holds a negative or non-finite scale")
    return {name: scale.float() for name, scale in scales.items()}
