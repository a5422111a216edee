"""The published calibration functions: activation scales of a model, and their files."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.config import check_integer
from ..core.progress import progress_bar
from ..core.texts import read_texts
from ..layers.linear import refuse_quantized
from ..models.families import layer_inputs
from ..models.running import evaluating, first_argument, hooked, no_cache

# The draw of texts is the same in every run; the published one used this number too.
SHUFFLE_SEED = 42


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
        for text in progress_bar(texts, desc="activation scales", unit="text"):
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
