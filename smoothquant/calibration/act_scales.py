"""The published calibration functions: activation scales of a model."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import check_integer
from ..core.progress import progress_bar
from ..core.texts import read_texts
from ..layers.linear import refuse_quantized
from ..models.families import layer_inputs
from ..models.linears import is_linear
from ..models.running import evaluating, first_argument, hooked, run_tokens

# Every run draws the same texts. The published code uses this seed too.
SHUFFLE_SEED = 42


def get_act_scales(
    model: nn.Module,
    tokenizer: Any,
    dataset_path: str | os.PathLike | Iterable[str],
    num_samples: int = 512,
    seq_len: int = 512,
) -> dict[str, Tensor]:
    """Collect the published activation scales: max|x| per input channel of every nn.Linear.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        dataset_path: anything `read_texts` accepts: one or several local files, or an iterable of
            texts. Blank texts are skipped; `num_samples` of the rest are drawn with a fixed seed.
        num_samples: maximum number of texts.
        seq_len: maximum number of tokens per text.

    Returns:
        {module name: float32 [K] on the CPU}. Fused experts are not nn.Linear modules; the experts
        module and its router, which read the same input, each have an entry instead.

    Raises:
        ValueError: an argument is out of range, the model is quantized, there is no non-blank text,
            or an activation is not finite.
    """
    scales: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.detach().reshape(-1, x.shape[-1]).abs().amax(dim=0).float().cpu()
        if not torch.isfinite(largest).all():
            raise ValueError(f"the input of layer {name} holds NaN or Inf")
        scales[name] = torch.maximum(scales[name], largest) if name in scales else largest

    names = [name for name, m in model.named_modules() if is_linear(m)]
    for item in layer_inputs(model):
        names += filter(None, (item.experts, item.router))

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: record(name, first_argument(args, kwargs))

    with hooked(model, {name: hook_for(name) for name in names}):
        _run_samples(model, tokenizer, dataset_path, num_samples, seq_len)
    return scales


# {published name of a scale: (linear in the decoder layer, its side)}
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
    tokenizer: Any,
    dataset_path: str | os.PathLike | Iterable[str],
    num_samples: int = 512,
    seq_len: int = 512,
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Collect the published static INT8 scales of an OPT model's decoder layers.

    The arguments are those of `get_act_scales`.

    Returns:
        A pair. First, one dict of scales per decoder layer: max|x| / 127 of the inputs and outputs
        in `STATIC_SCALES`. Second, {name of an nn.Linear: {"input": max|x|, "output": max|y|}}.

    Raises:
        ValueError: the model is not an OPT; also as `get_act_scales`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type != "opt":
        raise ValueError(f"model must be an OPT (config.model_type='opt'); got {model_type!r}")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name.removesuffix(".fc1") for name in names if name.endswith(".fc1")]
    ranges: dict[str, dict[str, float]] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        entry = ranges.setdefault(name, {"input": 0.0, "output": 0.0})
        for key, tensor in (("input", x), ("output", y)):
            largest = tensor.detach().abs().max().item()
            if not largest < float("inf"):
                raise ValueError(f"the {key} of layer {name} holds NaN or Inf: {largest}")
            entry[key] = max(entry[key], largest)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, y: record(name, first_argument(args, kwargs), y)

    with hooked(model, {name: hook_for(name) for name in names}, after=True):
        _run_samples(model, tokenizer, dataset_path, num_samples, seq_len)
    scales = [
        {key: ranges[f"{layer}.{name}"][side] / 127 for key, (name, side) in STATIC_SCALES.items()}
        for layer in layers
    ]
    return scales, ranges


@torch.no_grad()
def _run_samples(
    model: nn.Module,
    tokenizer: Any,
    dataset_path: str | os.PathLike | Iterable[str],
    num_samples: int,
    seq_len: int,
) -> None:
    """Run the drawn texts through the model, one at a time."""
    refuse_quantized(model)
    check_integer("num_samples", num_samples, 1)
    check_integer("seq_len", seq_len, 1)
    texts = _draw(
        (text for text in read_texts(dataset_path) if text.strip()), num_samples, SHUFFLE_SEED
    )
    if not texts:
        raise ValueError(f"dataset_path has no non-blank text; got {dataset_path!r:.200}")
    device = next(model.parameters()).device
    with evaluating(model):
        for text in progress_bar(texts, desc="activation scales", unit="text"):
            token_ids = tokenizer(
                text, return_tensors="pt", max_length=seq_len, truncation=True
            ).input_ids
            if token_ids.numel():
                run_tokens(model, token_ids.to(device))


def _draw(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Draw `count` texts by reservoir sampling, so that only these are in memory."""
    generator = random.Random(seed)
    drawn: list[str] = []
    for index, text in enumerate(texts):
        if index < count:
            drawn.append(text)
        else:
            slot = generator.randint(0, index)
            if slot < count:
                drawn[slot] = text
    return drawn
