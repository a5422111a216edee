"""Other W4A4 methods, simulated in floating point, to set MixedQuant beside them in one run.

Re-implemented from their papers in this project's arithmetic, hence "-style":

- per-token-rtn: nearest rounding, a scale per output channel and per token;
- smoothquant-style: SmoothQuant with alpha 0.5 (Xiao et al., 2023), then the same;
- quarot-style: QuaRot with groups (Ashkboos et al., 2024): each input rotated over its whole
  dimension, activations clipped at 0.9, weights by GPTQ with scales of least squared error;
- atom-style: Atom (Zhao et al., 2024): channels in the order of their sums of squares, the last 128
  in INT8, the others in INT4 groups; clips 0.9 for activations and 0.85 for weights, GPTQ.

Common to all: symmetric codes in [-7, 7] (the originals use -8 too), weight scales in bfloat16,
GPTQ with scales chosen before its loop and Hessians of the inputs as the method rounds them.
Key-value caches and attention stay in 16 bits. Bits per weight count codes and scales; the order of
channels and rotations, which these methods fuse into other weights, count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

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

BITS = 4
OUTLIER_BITS = 8
ROTATION_SEED = 0


class PeerLinear(nn.Module):
    """A rounded weight times an input that is rounded on the way.

    weight: [N, K], rounded, its channels reordered or rotated as the method does.
    round_input: x [..., K] -> the same, reordered or rotated and rounded, in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, round_input: Callable) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.round_input = round_input

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return nn.functional.linear(self.round_input(x).to(x.dtype), self.weight, self.bias)


class Treatment(NamedTuple):
    """What a method does with one layer input of K channels and the weights that read it.

    turn: x or a weight [..., K] -> the same, reordered or rotated: both alike, so products stay.
    round_act: turned x in float32 -> quantized and dequantized.
    round_weight: (turned weight, float32 [N, K]; factor [K, K] for GPTQ or None) -> the same.
    bits_per_weight: of codes and scales.
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
    """Nearest rounding with a scale per output channel and per token; needs the model alone.

    Every method takes these arguments and quantizes the model in place.

    Args:
        model: a float model of `smoothquant.models.families`, without fused experts.
        stats: {name of a linear: statistics of its input}.
        batches: int64 [B, T] tensors of token ids, for GPTQ.
        group_size: INT4 channels to a scale, where the method has groups.

    Returns:
        a record per linear, as `smoothquant.quantize` gives it.

    Raises:
        ValueError: a model that is quantized already or has fused experts, a missing argument or
            entry of stats.
    """

    def treatment(name: str, k: int) -> Treatment:
        return Treatment(
            turn=lambda x: x,
            round_act=partial(_round_act, group_size=k),
            round_weight=partial(_round_weight, group_size=k),
            bits_per_weight=_bits(k, k),
        )

    return _quantize(model, treatment)


def smoothquant_style(model, stats, batches=None, group_size=None) -> list[LinearRecord]:
    """SmoothQuant with alpha 0.5, then `per_token_rtn`; arguments as there."""
    check_model(model)
    smooth_lm(model, {name: entry.abs_max for name, entry in _needed("stats", stats).items()}, 0.5)
    return per_token_rtn(model)


def quarot_style(model, stats, batches, group_size) -> list[LinearRecord]:
    """QuaRot with groups; arguments as in `per_token_rtn`."""
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


def atom_style(model, stats, batches, group_size, *, num_outliers: int = 128) -> list[LinearRecord]:
    """Atom; arguments as in `per_token_rtn`. Inputs of num_outliers channels or fewer are INT8."""
    stats = _needed("stats", stats)

    def treatment(name: str, k: int) -> Treatment:
        order = ops.argsort(_entry(stats, name).sq_sum)
        k4 = max(0, k - num_outliers)

        def by_part(x: Tensor, normal: Callable, outlier: Callable) -> Tensor:
            return torch.cat([normal(x[..., :k4]), outlier(x[..., k4:])], dim=-1)

        def round_weight(w: Tensor, factor: Tensor | None) -> Tensor:
            scales = _scales(w[:, :k4], group_size, clip=0.85)
            if factor is not None:
                w = gptq.gptq(w, factor, scales, k4, min(group_size, max(1, k4)), BITS)
            # GPTQ leaves what it could not round well to the outliers, whose grid is 16 times finer
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


METHODS = {
    "per-token-rtn": per_token_rtn,
    "smoothquant-style": smoothquant_style,
    "quarot-style": quarot_style,
    "atom-style": atom_style,
}  # as `grid.OTHER_METHODS`


def random_rotation(k: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 [k, k]: the Kronecker product of a random orthogonal
    matrix of k's odd part and a Hadamard matrix of its power of two, rows with random signs."""
    generator = torch.Generator().manual_seed(seed)
    power = k & -k
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    odd = torch.randn(k // power, k // power, dtype=torch.float64, generator=generator)
    signs = torch.randint(0, 2, (k, 1), generator=generator) * 2 - 1
    orthogonal = torch.linalg.qr(odd).Q.contiguous()  # torch.kron wants it so
    return signs * torch.kron(orthogonal, hadamard / math.sqrt(power))


def check_model(model: nn.Module) -> None:
    """Raise ValueError if the methods cannot quantize this model."""
    refuse_quantized(model)
    fused = [item.experts for item in layer_inputs(model) if item.experts]
    if fused:
        raise ValueError(f"methods other than mixedquant quantize no fused experts: {fused[0]}")


def _needed(name: str, value):
    if not value:
        raise ValueError(f"{name} must be given to this method; got {value!r}")
    return value


def _entry(stats: Mapping[str, ChannelStats], name: str) -> ChannelStats:
    if name not in stats:
        raise ValueError(f"stats has no entry for {name}; it has {len(stats)} entries")
    return stats[name]


def _round_act(x: Tensor, *, group_size: int, num_bits: int = BITS, clip: float = 1.0) -> Tensor:
    return ops.group_fake_quantize(x, max(1, group_size), num_bits, "symmetric", clip)


def _scales(w: Tensor, group_size: int, *, clip: float = 1.0, **config) -> Tensor:
    """Weight scales, float32 [N, G], as stored in bfloat16. config: fields of MixedQuantConfig."""
    scales = weight_group_scales(w, MixedQuantConfig(backend="fake", **config), group_size)
    return scales if clip == 1 else (scales * clip).bfloat16().float()


def _to_grid(w: Tensor, *, scales: Tensor, group_size: int, num_bits: int = BITS) -> Tensor:
    by_column = scales.repeat_interleave(group_size, dim=1)[:, : w.shape[1]]
    return round_to_grid(w, by_column, 2 ** (num_bits - 1) - 1)


def _round_weight(
    w: Tensor, factor: Tensor | None, *, group_size: int, num_bits: int = BITS, **config
) -> Tensor:
    """Round all columns of w [N, K]: by GPTQ with a factor, else to nearest."""
    scales = _scales(w, group_size, num_bits=num_bits, **config)
    if factor is not None:
        w = gptq.gptq(w, factor, scales, w.shape[1], group_size, num_bits)
    return _to_grid(w, scales=scales, group_size=group_size, num_bits=num_bits)


def _bits(k: int, group_size: int, num_bits: int = BITS) -> float:
    """Bits per weight of k channels with a 16-bit scale per group; 0 for none."""
    return num_bits + 16 * math.ceil(k / group_size) / k if k else 0.0


@torch.no_grad()
def _quantize(
    model: nn.Module,
    treatment: Callable[[str, int], Treatment],
    batches: Sequence[Tensor] | None = None,
) -> list[LinearRecord]:
    """Swap every linear of a model by `treatment(name of the input, K)`; GPTQ with batches."""
    check_model(model)
    records = []
    for items, run in _parts(model, layer_inputs(model), batches):
        treatments = {
            item.name: treatment(item.name, model.get_submodule(item.name).in_features)
            for item in items
        }
        factors = _factors(run, treatments) if run else {}
        for item in items:
            treated, factor = treatments[item.name], factors.get(item.name)
            how = "nearest" if factor is None else "GPTQ"
            for name in item.linears:
                linear = model.get_submodule(name)
                weight = treated.round_weight(treated.turn(linear.weight.float()), factor)
                bias = None if linear.bias is None else linear.bias.detach()
                layer = PeerLinear(weight.to(linear.weight.dtype), bias, treated.round_input)
                replace_module(model, name, layer)
                shape = tuple(weight.shape)
                bits = treated.bits_per_weight
                records.append(LinearRecord(name, shape, 0, bits, "quantized", how))
    return records


def _parts(
    model: nn.Module, items: Sequence[LayerInput], batches: Sequence[Tensor] | None
) -> Iterator[tuple[list[LayerInput], Callable | None]]:
    """Layer inputs that are quantized together, and what runs the tokens through their part of the
    model with hooks: decoder layer by decoder layer, or all at once without tokens."""
    if not batches:
        yield list(items), None
        return
    for block in blocks(model, [item.name for item in items], batches):
        yield [item for item in items if block.holds(item.name)], block.run


def _factors(run: Callable, treatments: Mapping[str, Treatment]) -> dict[str, Tensor | None]:
    """GPTQ's factors of some layer inputs, as the method turns and rounds them."""
    hessians: dict[str, Tensor] = {}

    def hook_for(name: str, treated: Treatment) -> Callable:
        def hook(module, args, kwargs):
            x = first_argument(args, kwargs)
            x = treated.round_input(x.reshape(-1, x.shape[-1]))
            hessians.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        return hook

    run({name: hook_for(name, treated) for name, treated in treatments.items()})
    return {name: gptq.inverse_factor(h, gptq.DAMPING) for name, h in hessians.items()}
