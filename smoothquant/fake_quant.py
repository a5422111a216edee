"""The published surface: eight quantize-dequantize functions and the model-wide entry points.

The functions keep the established definition bit for bit, in the tensor's dtype:
s = max|x| clamped to at least 1e-5, over 2^(n_bits - 1) - 1; x <- round(x / s) s.
They return a new tensor of the caller's shape; the caller's tensor is never changed. In float16
the smallest scale rounds to zero from 9 bits on, and a group below it becomes NaN, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channels.statistics import ChannelStats
from .core.config import check_integer, published_config
from .in_memory import quantize
from .layers.linear import FakeW4A4Linear, W4A4Linear

__all__ = [
    "FakeW4A4Linear",
    "W4A4Linear",
    "quantize_activation_per_group_absmax",
    "quantize_activation_per_group_absmax_sort",
    "quantize_activation_per_tensor_absmax",
    "quantize_activation_per_token_absmax",
    "quantize_falcon",
    "quantize_llama_like",
    "quantize_mixtral",
    "quantize_model",
    "quantize_opt",
    "quantize_weight_per_channel_absmax",
    "quantize_weight_per_group_absmax",
    "quantize_weight_per_group_absmax_sort",
    "quantize_weight_per_tensor_absmax",
]


def _rounded(t: Tensor, largest: Tensor, n_bits: int) -> Tensor:
    scales = largest.clamp(min=1e-5).div(2 ** (n_bits - 1) - 1)
    return t.div(scales).round_().mul_(scales)


def _check(name: str, t: Tensor, n_bits: int, group_size: int = 1) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        kind = getattr(t, "dtype", type(t).__name__)
        raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
    if t.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension; got a scalar")
    check_integer("n_bits", n_bits, 2, 16)
    check_integer("group_size", group_size, 1)


@torch.no_grad()
def _per_row(name: str, t: Tensor, n_bits: int) -> Tensor:
    _check(name, t, n_bits)
    return _rounded(t, t.abs().amax(-1, keepdim=True), n_bits) if t.numel() else t.clone()


@torch.no_grad()
def _per_tensor(name: str, t: Tensor, n_bits: int) -> Tensor:
    _check(name, t, n_bits)
    return _rounded(t, t.abs().max(), n_bits) if t.numel() else t.clone()


@torch.no_grad()
def _per_group(name: str, t: Tensor, n_bits: int, group_size: int) -> Tensor:
    _check(name, t, n_bits, group_size)
    channels = t.shape[-1]
    group_size = min(group_size, max(1, channels))
    padded = F.pad(t, (0, -channels % group_size)).unflatten(-1, (-1, group_size))
    return _per_row(name, padded, n_bits).flatten(-2)[..., :channels].contiguous()


@torch.no_grad()
def _per_group_sorted(name: str, t: Tensor, n_bits: int, group_size: int) -> Tensor:
    _check(name, t, n_bits, group_size)
    if t.numel() == 0:
        return t.clone()
    order = torch.argsort(t.reshape(-1, t.shape[-1]).abs().amax(0))
    return _per_group(name, t[..., order], n_bits, group_size)[..., torch.argsort(order)]


def quantize_weight_per_channel_absmax(w: Tensor, n_bits: int) -> Tensor:
    """One scale per output channel of w [N, K]; see the module for the definition.

    All eight functions take float32, float16 or bfloat16 and 2 to 16 bits, and raise ValueError or
    TypeError naming the argument otherwise.
    """
    return _per_row("w", w, n_bits)


def quantize_weight_per_tensor_absmax(w: Tensor, n_bits: int) -> Tensor:
    """One scale for all of w [N, K]."""
    return _per_tensor("w", w, n_bits)


def quantize_weight_per_group_absmax(w: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """One scale per `group_size` neighbouring input channels of each row of w [N, K]; the last
    group may be short."""
    return _per_group("w", w, n_bits, group_size)


def quantize_weight_per_group_absmax_sort(w: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """As `quantize_weight_per_group_absmax`, the input channels sorted for it by their largest
    magnitude, ascending; the result is in the caller's order."""
    return _per_group_sorted("w", w, n_bits, group_size)


def quantize_activation_per_token_absmax(t: Tensor, n_bits: int) -> Tensor:
    """One scale per row of t [..., K]."""
    return _per_row("t", t, n_bits)


def quantize_activation_per_tensor_absmax(t: Tensor, n_bits: int) -> Tensor:
    """One scale for all of t [..., K]."""
    return _per_tensor("t", t, n_bits)


def quantize_activation_per_group_absmax(t: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """One scale per row and `group_size` neighbouring channels of t [..., K]."""
    return _per_group("t", t, n_bits, group_size)


def quantize_activation_per_group_absmax_sort(
    t: Tensor, n_bits: int, group_size: int = 128
) -> Tensor:
    """As `quantize_activation_per_group_absmax`, the channels sorted for it by their largest
    magnitude over all rows given: a token's result depends on the rest of the batch."""
    return _per_group_sorted("t", t, n_bits, group_size)


def quantize_model(
    model: nn.Module,
    weight_quant: str = "per_channel",
    act_quant: str = "per_token",
    quantize_bmm_input: bool = False,
    input_feat: Mapping[str, Tensor | Sequence[Tensor] | ChannelStats] | None = None,
    salient_prop: float | None = None,
    quant_bits: int = 4,
    group_size: int = 128,
    min_prop: float = 0,
    max_prop: float = 0,
    *,
    sort: str = "rms",
    sort_by: str = "activation",
    backend: str = "int4",
    progress: bool = True,
) -> nn.Module:
    """Quantize a model of any architecture in place and return it.

    Args:
        model: a float model; see `smoothquant.models.families`.
        weight_quant: "per_group", "per_channel" or "per_tensor".
        act_quant: "per_group", "per_token" or "per_tensor". The last depends on the live batch:
            the int4 backend quantizes per token instead and warns.
        quantize_bmm_input: also quantize the outputs of q, k and v.
        input_feat: {module name: mean magnitude per input channel [K], or a list of such tensors
            that is summed, or ChannelStats}. With means, sort keys come from the weights; without
            any, the salient channels do too, as do those of fused experts without an entry.
        salient_prop: share of input channels kept in 16 bits, in [0, 1]; None for none.
        quant_bits: bits of weights and activations, 2 to 4, or to 8 with backend "fake".
        group_size: channels to a scale where quantization is per group.
        min_prop, max_prop: without effect, as published.
        sort: "none", "max", "mean3std", "argmax" or "rms".
        sort_by: take the sort key from "activation" or "weight" statistics.
        backend: "int4" (packed weights, integer kernels) or "fake" (simulation in floats).
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: any bad argument, named; the model has not been changed then.
    """
    config = published_config(
        backend,
        act_quant,
        weight_quant=weight_quant,
        num_bits=quant_bits,
        group_size=group_size,
        salient_prop=salient_prop,
        sort=sort,
        sort_by=sort_by,
        quantize_output=quantize_bmm_input,
    )
    quantize(model, config, _stats(input_feat), progress=progress)
    return model


def _for_types(
    name: str, types: Sequence[str], weight_quant: str, act_quant: str, quantize_bmm_input: bool
):
    """`quantize_model` for some model types, with the defaults published for them."""

    def quantize_family(
        model: nn.Module,
        weight_quant: str = weight_quant,
        act_quant: str = act_quant,
        quantize_bmm_input: bool = quantize_bmm_input,
        input_feat: Mapping | None = None,
        salient_prop: float | None = 0,
        quant_bits: int = 4,
        group_size: int = 128,
        **options,
    ) -> nn.Module:
        found = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if found not in types:
            raise ValueError(f"model must be of type {' or '.join(types)}; got {found!r}")
        return quantize_model(
            model,
            weight_quant,
            act_quant,
            quantize_bmm_input,
            input_feat,
            salient_prop,
            quant_bits,
            group_size,
            **options,
        )

    quantize_family.__name__ = quantize_family.__qualname__ = name
    quantize_family.__doc__ = (
        f"`quantize_model` for model type {', '.join(types)}; options are its keyword arguments."
    )
    return quantize_family


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
quantize_opt = _for_types("quantize_opt", ["opt"], "per_tensor", "per_tensor", True)

quantize_llama_like = _for_types(
    "quantize_llama_like", LLAMA_LIKE, "per_channel", "per_token", False
)

quantize_mixtral = _for_types("quantize_mixtral", ["mixtral"], "per_channel", "per_token", False)
quantize_falcon = _for_types("quantize_falcon", ["falcon"], "per_channel", "per_token", True)


def _stats(input_feat: Mapping | None) -> dict[str, ChannelStats] | None:
    """The statistics that a published dict of means stands for; None for none."""
    if input_feat is None:
        return None
    if not isinstance(input_feat, Mapping):
        raise TypeError(f"input_feat must map module names; got {type(input_feat).__name__}")
    return {name: _channel_stats(name, entry) for name, entry in input_feat.items()} or None


def _channel_stats(name: str, entry) -> ChannelStats:
    if isinstance(entry, ChannelStats):
        return entry
    parts = list(entry) if isinstance(entry, Sequence) else [entry]
    shapes = {tuple(part.shape) if isinstance(part, Tensor) else None for part in parts}
    if len(shapes) != 1 or len(next(iter(shapes)) or ()) != 1:
        raise ValueError(f"input_feat of {name} must be vectors of one length; got {entry!r:.80}")
    try:
        return ChannelStats.from_mean(sum(part.float().cpu() for part in parts))
    except ValueError as error:
        raise ValueError(f"input_feat of {name}: {error}") from error
