"""Other W4A4 methods, simulated in floating point, for comparison with MixedQuant in one sweep.

They are re-implemented from their papers in this project's arithmetic, hence "-style":

- per-token-rtn: round to nearest, with a scale per output channel and per token.
- smoothquant-style: SmoothQuant with alpha 0.5 (Xiao et al., 2023), then per-token-rtn.
- quarot-style: QuaRot with groups (Ashkboos et al., 2024). Each input is rotated over its whole
  dimension, activations are clipped at 0.9, and weights are rounded by GPTQ with the scales that
  minimize the squared error.
- atom-style: Atom (Zhao et al., 2024). Channels are sorted by their sums of squares: the last 128
  are INT8, the rest INT4 in groups. Activations are clipped at 0.9, weights at 0.85, with GPTQ.

All of them use symmetric codes in [-7, 7] (the originals use -8 too) and weight scales in bfloat16.
GPTQ chooses the scales before its loop and takes Hessians of the rounded inputs. Key-value caches
and attention stay in 16 bits. Bits per weight include codes and scales, but not channel orders and
rotations, because these methods fuse them into other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from smoothquant.calibration.blocks import blocks
from smoothquant.channels.statistics import ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.kernels import ops
from smoothquant.layers import gptq
from smoothquant.layers.linear import refuse_quantized
from smoothquant.layers.rounding import round_to_grid, weight_group_scales
from smoothquant.models.families import LayerInput, layer_inputs
from smoothquant.models.modules import replace_module
from smoothquant.models.running import first_argument
from smoothquant.quantization.records import LinearRecord
from smoothquant.quantization.smoothing import smooth_lm

T = TypeVar("T")

BITS = 4
OUTLIER_BITS = 8
ROTATION_SEED = 0


class PeerLinear(nn.Module):
    """A linear layer with a rounded weight, which rounds its input in every call.

    Args:
        weight: [N, K], rounded; channels reordered or rotated by the method.
        bias: [N] or None.
        round_input: x [..., K] -> x reordered or rotated, then rounded, in float32.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, round_input: Callable) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.round_input = round_input

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in x's dtype for x [..., K]."""
        return nn.functional.linear(self.round_input(x).to(x.dtype), self.weight, self.bias)


class Treatment(NamedTuple):
    """What a method does to one layer input of K channels and to the weights that read it.

    Args:
        turn: reorders or rotates x or a weight [..., K]. It does the same to both, which keeps
            their product.
        round_act: quantizes and dequantizes a turned x in float32.
        round_weight: quantizes and dequantizes a turned weight, float32 [N, K]; the second argument
            is GPTQ's factor [K, K], or None for rounding to nearest.
        bits_per_weight: codes and scales.
    """

    turn: Callable[[Tensor], Tensor]
    round_act: Callable[[Tensor], Tensor]
    round_weight: Callable[[Tensor, Tensor | None], Tensor]
    bits_per_weight: float

    def round_input(self, x: Tensor) -> Tensor:
        return self.round_act(self.turn(x.float()))


def per_token_rtn(
    model: nn.Module,
    stats: Mapping[str, ChannelStats] | None = None,
    batches: Sequence[Tensor] | None = None,
    group_size: int | None = None,
) -> list[LinearRecord]:
    """Round to nearest with a scale per output channel and per token. Uses only the model.

    All methods take these arguments and quantize the model in place.

    Args:
        model: a float model of `smoothquant.models.families`, without fused experts.
        stats: {name of a linear: statistics of its input}.
        batches: int64 [B, T] tensors of token ids, for GPTQ.
        group_size: INT4 channels per scale, for methods with groups.

    Returns:
        A record per linear, as from `smoothquant.quantize`.

    Raises:
        ValueError: the model is already quantized or has fused experts, or an argument or an entry
            of stats is missing.
    """

    def treatment(name: str, k: int) -> Treatment:
        return Treatment(
            turn=lambda x: x,
            round_act=partial(_round_act, group_size=k),
            round_weight=partial(_round_weight, group_size=k),
            bits_per_weight=_bits(k, k),
        )

    return _quantize(model, treatment)


def smoothquant_style(
    model: nn.Module,
    stats: Mapping[str, ChannelStats] | None,
    batches: Sequence[Tensor] | None = None,
    group_size: int | None = None,
) -> list[LinearRecord]:
    """SmoothQuant with alpha 0.5, then `per_token_rtn`. Arguments as in `per_token_rtn`."""
    check_model(model)
    smooth_lm(model, {name: entry.abs_max for name, entry in _needed("stats", stats).items()}, 0.5)
    return per_token_rtn(model)


def quarot_style(
    model: nn.Module,
    stats: Mapping[str, ChannelStats] | None,
    batches: Sequence[Tensor] | None,
    group_size: int,
) -> list[LinearRecord]:
    """QuaRot with groups. Arguments as in `per_token_rtn`."""
    rotations: dict[int, Tensor] = {}

    def treatment(name: str, k: int) -> Treatment:
        if k not in rotations:
            rotations[k] = random_rotation(k, ROTATION_SEED).float()
        return Treatment(
            turn=lambda x: x @ rotations[k],
            round_act=partial(_round_act, group_size=group_size, clip=0.9),
            round_weight=partial(_round_weight, group_size=group_size, weight_scale="mse"),
            bits_per_weight=_bits(k, group_size),
        )

    return _quantize(model, treatment, _needed("batches", batches))


def atom_style(
    model: nn.Module,
    stats: Mapping[str, ChannelStats] | None,
    batches: Sequence[Tensor] | None,
    group_size: int,
    *,
    num_outliers: int = 128,
) -> list[LinearRecord]:
    """Atom. Arguments as in `per_token_rtn`. Inputs of num_outliers channels or fewer are INT8."""
    entries = _needed("stats", stats)

    def treatment(name: str, k: int) -> Treatment:
        order = ops.argsort(_entry(entries, name).sq_sum)
        k4 = max(0, k - num_outliers)

        def by_part(x: Tensor, normal: Callable, outlier: Callable) -> Tensor:
            return torch.cat([normal(x[..., :k4]), outlier(x[..., k4:])], dim=-1)

        def round_weight(w: Tensor, factor: Tensor | None) -> Tensor:
            scales = _scales(w[:, :k4], group_size, clip=0.85)
            if factor is not None:
                w = gptq.gptq(w, factor, scales, k4, min(group_size, max(1, k4)), BITS)
            # GPTQ moves the remaining error to the outliers, whose grid is 16 times finer
            return by_part(
                w,
                partial(_to_grid, scales=scales, group_size=group_size),
                partial(_round_weight, factor=None, group_size=k, num_bits=OUTLIER_BITS),
            )

        return Treatment(
            turn=lambda x: x[..., order],
            round_act=partial(
                by_part,
                normal=partial(_round_act, group_size=group_size, clip=0.9),
                outlier=partial(_round_act, group_size=k, num_bits=OUTLIER_BITS),
            ),
            round_weight=round_weight,
            bits_per_weight=(k4 * _bits(k4, group_size) + (k - k4) * _bits(k - k4, k, OUTLIER_BITS))
            / k,
        )

    return _quantize(model, treatment, _needed("batches", batches))


METHODS: dict[str, Callable[..., list[LinearRecord]]] = {
    "per-token-rtn": per_token_rtn,
    "smoothquant-style": smoothquant_style,
    "quarot-style": quarot_style,
    "atom-style": atom_style,
}  # the names in `grid.OTHER_METHODS`


def random_rotation(k: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix, float64 [k, k].

    It is the Kronecker product of a random orthogonal matrix for the odd part of k and a Hadamard
    matrix for the power of two in k, with random signs on the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    power = k & -k
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    odd = torch.randn(k // power, k // power, dtype=torch.float64, generator=generator)
    signs = torch.randint(0, 2, (k, 1), generator=generator) * 2 - 1
    orthogonal = torch.linalg.qr(odd).Q.contiguous()  # required by torch.kron
    return signs * torch.kron(orthogonal, hadamard / math.sqrt(power))


def check_model(model: nn.Module) -> None:
    """Raise ValueError if the methods cannot quantize this model."""
    refuse_quantized(model)
    fused = [item.experts for item in layer_inputs(model) if item.experts]
    if fused:
        raise ValueError(f"only mixedquant can quantize fused experts: {fused[0]}")


def _needed(name: str, value: T | None) -> T:
    if not value:
        raise ValueError(f"this method needs {name}; got {value!r}")
    return value


def _entry(stats: Mapping[str, ChannelStats], name: str) -> ChannelStats:
    if name not in stats:
        raise ValueError(f"stats has no entry for {name}; it has {len(stats)} entries")
    return stats[name]


def _round_act(x: Tensor, *, group_size: int, num_bits: int = BITS, clip: float = 1.0) -> Tensor:
    return ops.group_fake_quantize(x, max(1, group_size), num_bits, "symmetric", clip)


def _scales(w: Tensor, group_size: int, *, clip: float = 1.0, **config: Any) -> Tensor:
    """Weight scales, float32 [N, G], rounded to bfloat16. config: fields of MixedQuantConfig."""
    scales = weight_group_scales(w, MixedQuantConfig("rtn", backend="fake", **config), group_size)
    return scales if clip == 1 else (scales * clip).bfloat16().float()


def _to_grid(w: Tensor, *, scales: Tensor, group_size: int, num_bits: int = BITS) -> Tensor:
    by_column = scales.repeat_interleave(group_size, dim=1)[:, : w.shape[1]]
    return round_to_grid(w, by_column, 2 ** (num_bits - 1) - 1)


def _round_weight(
    w: Tensor, factor: Tensor | None, *, group_size: int, num_bits: int = BITS, **config: Any
) -> Tensor:
    """Round all columns of w [N, K]: with GPTQ if there is a factor, else to nearest."""
    scales = _scales(w, group_size, num_bits=num_bits, **config)
    if factor is not None:
        w = gptq.gptq(w, factor, scales, w.shape[1], group_size, num_bits)
    return _to_grid(w, scales=scales, group_size=group_size, num_bits=num_bits)


def _bits(k: int, group_size: int, num_bits: int = BITS) -> float:
    """Bits per weight of k channels with a 16-bit scale per group; 0 if k is 0."""
    return num_bits + 16 * math.ceil(k / group_size) / k if k else 0.0


@torch.no_grad()
def _quantize(
    model: nn.Module,
    treatment: Callable[[str, int], Treatment],
    batches: Sequence[Tensor] | None = None,
) -> list[LinearRecord]:
    """Replace every linear by `treatment(name of its input, K)`; with batches, use GPTQ."""
    check_model(model)
    records = []
    for items, run in _parts(model, layer_inputs(model), batches):
        treatments = {
            item.name: treatment(item.name, _linear(model, item.name).in_features) for item in items
        }
        factors = _factors(run, treatments) if run else {}
        for item in items:
            treated, factor = treatments[item.name], factors.get(item.name)
            rounding = "nearest" if factor is None else "GPTQ"
            for name in item.linears:
                linear = _linear(model, name)
                weight = treated.round_weight(treated.turn(linear.weight.float()), factor)
                bias = None if linear.bias is None else linear.bias.detach()
                layer = PeerLinear(weight.to(linear.weight.dtype), bias, treated.round_input)
                replace_module(model, name, layer)
                shape = tuple(weight.shape)
                bits = treated.bits_per_weight
                records.append(LinearRecord(name, shape, 0, bits, "quantized", rounding))
    return records


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _parts(
    model: nn.Module, items: Sequence[LayerInput], batches: Sequence[Tensor] | None
) -> Iterator[tuple[list[LayerInput], Callable | None]]:
    """Yield the layer inputs to quantize together, one decoder layer at a time.

    With them comes a function that runs the tokens through that decoder layer with hooks. Without
    tokens, yields all layer inputs at once and None.
    """
    if not batches:
        yield list(items), None
        return
    for block in blocks(model, [item.name for item in items], batches):
        yield [item for item in items if block.holds(item.name)], block.run


def _factors(run: Callable, treatments: Mapping[str, Treatment]) -> dict[str, Tensor | None]:
    """GPTQ's factor for each layer input, after the method has turned and rounded the input."""
    hessians: dict[str, Tensor] = {}

    def hook_for(name: str, treated: Treatment) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            x = treated.round_input(x.reshape(-1, x.shape[-1]))
            hessians.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        return hook

    run({name: hook_for(name, treated) for name, treated in treatments.items()})
    return {name: gptq.inverse_factor(h, gptq.DAMPING) for name, h in hessians.items()}
