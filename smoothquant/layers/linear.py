"""The two quantized linear layers: packed integers, and a simulation in floating point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..channels.sorting import ChannelPlan, choose_channels, num_salient_channels
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig, check_integer, layer_group_size, published_config
from ..core.tensors import is_finite, is_permutation
from ..kernels import ops
from ..models.linears import is_linear, linear_weight
from .gptq import Curvature, descend, gptq
from .rounding import round_to_grid, stored_scale, weight_group_scales

CHUNK_VALUES = 1 << 18  # weights that are brought into packed order at a time
SALIENT_Q_MAX = 127  # largest code of an int8 salient weight


class KernelChoices(NamedTuple):
    """The fields of a config that the activation kernels take, in the order of their arguments."""

    rotation: int
    act_bits: int
    act_format: str
    per_token: bool
    clip: float


def kernel_choices(config: MixedQuantConfig) -> KernelChoices:
    """The activation kernels' options in a config without searched fields."""
    rotation, clip, act_format = config.rotation, config.act_clip, config.act_format
    assert isinstance(rotation, int) and isinstance(clip, float) and act_format is not None
    per_token = config.act_quant == "per_token"
    return KernelChoices(rotation, config.activation_bits, act_format, per_token, clip)


def weight_in_packed_order(
    weight: Tensor,
    config: MixedQuantConfig,
    plan: ChannelPlan,
    group_size: int,
    curvature: Curvature | None,
) -> tuple[Tensor, Tensor]:
    """Reorder and rotate a weight and choose its scales; with curvature, also round it by GPTQ.

    Args:
        weight: [N, K], any float dtype.
        curvature: of the layer's inputs, or None.

    Returns:
        The weight, fp32 [N, K] in perm's order with the INT4 part rotated, and on its grid after
        GPTQ; the stored scales, fp32 [N, G].
    """
    n, k = weight.shape
    k4 = k - plan.num_salient
    permuted = torch.empty(n, k)
    perm = plan.perm.to(permuted.device)
    rotation = kernel_choices(config).rotation
    # A few rows at a time, so that temporaries stay small.
    step = max(1, n) if config.weight_quant == "per_tensor" else _rows_per_chunk(k)
    scale_chunks = []
    for rows, source in zip(permuted.split(step), weight.detach().split(step), strict=True):
        torch.index_select(source.to(rows.device).float(), 1, perm, out=rows)
        if rotation:
            rows[:, :k4] = ops.group_hadamard(rows[:, :k4], group_size, rotation)
        scale_chunks.append(weight_group_scales(rows[:, :k4], config, group_size))
    scales = torch.cat(scale_chunks)
    if curvature is not None:
        grid = (group_size, config.num_bits)
        rounded = gptq(permuted, curvature.factor, scales, k4, *grid)
        move_scales = config.weight_quant == "per_group"
        descend(permuted, rounded, curvature, scales, *grid, move_scales=move_scales)
        return rounded, scales
    return permuted, scales


def _rows_per_chunk(k: int) -> int:
    return max(1, CHUNK_VALUES // max(1, k))


def check_weight(weight: Tensor, bias: Tensor | None, plan: ChannelPlan) -> None:
    """Raise TypeError or ValueError unless weight, bias and plan are valid and fit together."""
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            "weight must be a float32, float16 or bfloat16 matrix; "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    n, k = weight.shape
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must have shape ({n},); got {tuple(bias.shape)}")
    if plan.perm.dtype != torch.int32 or not is_permutation(plan.perm, k):
        raise ValueError(f"plan.perm must be an int32 permutation of {k} channels")
    check_integer("plan.num_salient", plan.num_salient, 0, k)
    if not is_finite(weight):
        raise ValueError(f"weight of shape ({n}, {k}) holds NaN or Inf")


def _identity(k: int, device: torch.device | str | None) -> Tensor:
    """The identity permutation of k channels, int32 [K]."""
    perm = torch.empty(k, dtype=torch.int32, device=device)
    # torch runs arange on the meta device in Python, which is slow.
    return perm if perm.is_meta else torch.arange(k, dtype=torch.int32, device=perm.device)


def reorder_panels(packed: Tensor, order: Tensor) -> Tensor:
    """Reorder the N output channels of a packed tensor [P, ..., 16 c]; order: int64 [N]."""
    panels, last = packed.shape[0], packed.shape[-1]
    rows = packed.unflatten(-1, (ops.PANEL, last // ops.PANEL)).movedim(-2, 1).flatten(0, 1)
    padded_order = torch.arange(len(rows), device=order.device)  # padding rows stay in place
    padded_order[: len(order)] = order
    rows = rows[padded_order].unflatten(0, (panels, ops.PANEL))
    return rows.movedim(1, -2).flatten(-2).contiguous()


def salient_dtype_for(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit storage dtype for salient columns of a weight of this dtype."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def stored_salient(w: Tensor, config: MixedQuantConfig, dtype: torch.dtype) -> Tensor:
    """Salient columns, rounded to the precision in which they are stored.

    Args:
        w: fp32 [N, K_s].
        dtype: of the layer's weight.

    Returns:
        fp32 [N, K_s].
    """
    if config.salient_format == "16bit" or w.numel() == 0:
        return w.to(salient_dtype_for(dtype)).float()
    scale = stored_scale(w.abs().amax(1, keepdim=True) / SALIENT_Q_MAX)
    return round_to_grid(w, scale, SALIENT_Q_MAX)


def in_panels(rows: Tensor) -> Tensor:
    """[N, C] -> [P, C, 16], with rows of zeros at the end."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % ops.PANEL))
    return padded.unflatten(0, (-1, ops.PANEL)).transpose(1, 2).contiguous()


def grouped(values: Tensor, size: int) -> Tensor:
    """[N, K] -> [N, G, size], with zeros at the end."""
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size))


class _StraightThrough(torch.autograd.Function):
    """Computes function(x), but with the gradient of x @ weight^T."""

    @staticmethod
    def forward(
        x: Tensor, function: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
    ) -> Tensor:
        return function(x).clone()  # F.linear may return a view, which autograd rejects here

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight().to(grad.dtype), None, None


RETURN_INPUT = object()  # for `precomputed`: the layer returns its input
_precomputed: dict[tuple[int, nn.Module], Any] = {}


@contextmanager
def precomputed(values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the context, in this thread, each layer returns its value at its next call, or its
    input for RETURN_INPUT, instead of computing.

    Raises:
        RuntimeError: a layer was not called.
    """
    thread = get_ident()
    keys = [(thread, layer) for layer in values]
    _precomputed.update(zip(keys, values.values(), strict=True))
    try:
        yield
        if any(key in _precomputed for key in keys):
            raise RuntimeError("a layer was not called, so its result would have been lost")
    finally:
        for key in keys:
            _precomputed.pop(key, None)


class QuantizedLinear(nn.Module):
    """Abstract base of the packed and the simulated layer.

    Attributes:
        in_features, out_features: K and N.
        config: the :class:`MixedQuantConfig` of the layer.
        num_salient: K_s, the number of salient input channels.
        group_size: channels that share a scale; K - K_s if nothing is quantized per group.
        table: "int8" or "int4" if this is an output head or the weight of embeddings; otherwise "".
    """

    perm: Tensor
    bias: Tensor | None
    table: str = ""
    planes = 1  # packed channels per input channel

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: MixedQuantConfig,
        num_salient: int = 0,
        quantize_output: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """A layer of zeros, to load a state_dict into."""
        super().__init__()
        check_integer("in_features", in_features, 0)
        check_integer("out_features", out_features, 0)
        check_integer("num_salient", num_salient, 0, in_features)
        if config.searches:
            raise ValueError(
                f"{config.searches} is searched per layer by smoothquant.quantize; a layer needs "
                "a fixed value"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.num_salient = num_salient
        self.quantize_output = quantize_output
        self.group_size = layer_group_size(config, in_features - num_salient)
        self._register_weight(dtype, device)
        self.register_buffer("perm", _identity(self.planes * in_features, device))
        zero_bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", zero_bias)

    def _register_weight(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Register the buffers of the weight, filled with zeros."""
        raise NotImplementedError

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        config: MixedQuantConfig,
        plan: ChannelPlan,
        *,
        quantize_output: bool = False,
        curvature: Curvature | None = None,
    ) -> QuantizedLinear:
        """Quantize a weight on the CPU and put the layer on the weight's device.

        Args:
            weight: [N, K], float32, float16 or bfloat16.
            bias: [N], or None.
            plan: salient channels and order of the input channels.
            quantize_output: also quantize the outputs.
            curvature: round by GPTQ with this result of `smoothquant.layers.gptq.curvature`.

        Raises:
            TypeError: weight is not a matrix of a supported dtype.
            ValueError: bias or plan does not fit the weight, or weight holds NaN or Inf.
        """
        check_weight(weight, bias, plan)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            config=config,
            num_salient=plan.num_salient,
            quantize_output=quantize_output,
            dtype=weight.dtype,
            device="meta",
        )
        layer._store(*weight_in_packed_order(weight, config, plan, layer.group_size, curvature))
        layer.perm = plan.perm.clone()
        layer.bias = None if bias is None else bias.detach().clone()
        return layer.to(weight.device)

    def _store(self, permuted: Tensor, scales: Tensor) -> None:
        """Store a weight in packed order, fp32 [N, K], with its scales, fp32 [N, G]."""
        raise NotImplementedError

    def reorder_outputs(self, order: Tensor) -> None:
        """Reorder the output channels: the new channel i is the old channel order[i].

        Moves data without rounding.

        Args:
            order: int64 [N], a permutation.

        Raises:
            ValueError: the layer quantizes its outputs, whose groups depend on the order.
        """
        if self.quantize_output:
            raise ValueError("cannot reorder outputs that are quantized in groups of neighbours")
        order = order.to(self.perm.device)
        for name, tensor in list(self.named_buffers(recurse=False)):
            if name in ("bias", "simulated_weight"):
                setattr(self, name, tensor[order])
            elif name != "perm":
                setattr(self, name, reorder_panels(tensor, order))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, [N, K] in natural channel order.

        Dequantized on every access.
        """
        return self.dequantize()

    def dequantize(self) -> Tensor:
        """The weight that the layer computes with, [N, K] in natural channel order."""
        raise NotImplementedError

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight in packed order, taken apart.

        Returns:
            The codes [N, G, g], int8 (fp32 in a simulation, which has no integers); the scales,
            fp32 [N, G]; and the salient weights, fp32 [N, K_s].
        """
        raise NotImplementedError

    def set_grid(self, codes: Tensor, scales: Tensor, salient: Tensor, clip: float) -> None:
        """Replace scales, salient weights and activation clip, rounded as they are stored.

        Args:
            codes, scales, salient: as from `grid`; the codes are those of the layer.
            clip: in [2^-10, 1].
        """
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of that weight: int64 [...] in [0, N) -> [..., K].

        Raises:
            ValueError, IndexError: an id is out of range; on CUDA, its row is NaN.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype.

        Gradients use the straight-through estimator: the gradient with respect to x is the gradient
        of y times `weight`. Weight and bias get no gradient.
        """
        if _precomputed:
            value = _precomputed.pop((get_ident(), self), None)
            if value is not None:
                return x if value is RETURN_INPUT else value
        self._check_input(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self._forward, self.dequantize)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_input(self, x: Tensor) -> None:
        if self.config.non_finite == "raise" and not torch.isfinite(x).all():
            raise ValueError(f"x holds NaN or Inf (shape {tuple(x.shape)}, non_finite='raise')")

    def _quantize_output(self, y: Tensor) -> Tensor:
        return fake_quantize_activation(y, self.config) if self.quantize_output else y

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"num_bits={self.config.num_bits}, act_bits={self.config.activation_bits}, "
            f"group_size={self.group_size}, "
            f"num_salient={self.num_salient}, salient_format={self.config.salient_format}, "
            f"weight_quant={self.config.weight_quant}, "
            f"act_quant={self.config.act_quant}, act_format={self.config.act_format}, "
            f"act_clip={self.config.act_clip:g}, rotation={self.config.rotation}, "
            f"quantize_output={self.quantize_output}"
        )


def fake_quantize_activation(
    x: Tensor, config: MixedQuantConfig, act_format: str = "symmetric", clip: float = 1.0
) -> Tensor:
    """Quantize and dequantize x [..., K] with the config's bits and granularity.

    Uses the kernels' fp32 arithmetic and rounds once to x's dtype.
    """
    if x.numel() == 0:
        return x
    rows = x.reshape(1, -1) if config.act_quant == "per_tensor" else x.reshape(-1, x.shape[-1])
    k = rows.shape[-1]
    group_size = min(config.group_size, k) if config.act_quant == "per_group" else k
    y = ops.group_fake_quantize(rows, group_size, config.activation_bits, act_format, clip)
    return y.reshape(x.shape)


def quantized_input(
    x: Tensor, perm: Tensor, num_salient: int, group_size: int, config: MixedQuantConfig
) -> Tensor:
    """The input that a quantized layer computes with, for x [..., K], in x's dtype: in perm's order
    and with the INT4 part rotated, quantized and dequantized."""
    k4 = x.shape[-1] - num_salient
    choices = kernel_choices(config)
    permuted = x.index_select(-1, perm)
    # In fp32, as in the kernel: rotated values may exceed fp16, and bf16 would round twice.
    int4 = permuted[..., :k4].float()
    if choices.rotation:
        int4 = ops.group_hadamard(int4, group_size, choices.rotation)
    int4 = fake_quantize_activation(int4, config, choices.act_format, choices.clip)
    permuted[..., :k4] = int4
    return permuted


class W4A4Linear(QuantizedLinear):
    """A linear layer with packed INT4 weights and INT4 activations.

    The kernel quantizes activations per token. Salient channels stay in 16 bits; their weights may
    be INT8. The weights cannot be trained, but adapters on top can (`smoothquant.lora`).

    Buffers, with P = ceil(N / 16), B blocks, G groups and K_s salient channels (docs/format.md):
        qweight uint8 [P, B, 64], scales bfloat16 [P, G, 16],
        salient_weight bfloat16 (float16 for float16 weights) or int8 [P, K_s, 16],
        salient_scales bfloat16 [P, 16], or None where salient_weight is not int8,
        perm int32 [K] (INT4 channels first), bias [N] or None.
    ``.to(dtype)`` casts only the bias; the other buffers keep their dtypes.
    """

    qweight: Tensor
    scales: Tensor
    salient_weight: Tensor
    salient_scales: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        act_quant: str = "per_token",
        quantize_output: bool = False,
        importance: Tensor | None = None,
        salient_prop: float = 0,
        quant_bits: int = 4,
        group_size: int = 128,
        *,
        weight_quant: str = "per_channel",
        num_salient: int | None = None,
        config: MixedQuantConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """A layer of zeros, to load a state_dict into.

        Args:
            importance, salient_prop: if importance is given, max(1, floor(salient_prop K)) channels
                are salient; none otherwise.
            num_salient: number of salient channels; overrides importance and salient_prop.
            config: replaces act_quant, quant_bits, group_size and weight_quant.
            dtype: of the bias. With float16, 16-bit salient weights are float16, otherwise
                bfloat16.
        """
        config = config or published_config(
            "int4",
            act_quant,
            weight_quant=weight_quant,
            num_bits=quant_bits,
            group_size=group_size,
            salient_prop=salient_prop,
        )
        if num_salient is None:
            num_salient = 0
            if importance is not None:
                num_salient = num_salient_channels(in_features, salient_prop)
        super().__init__(
            in_features,
            out_features,
            bias,
            config=config,
            num_salient=num_salient,
            quantize_output=quantize_output,
            dtype=dtype,
            device=device,
        )

    def _register_weight(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        is_int8 = self.config.salient_format == "int8"
        dtypes = ops.packed_dtypes(torch.int8 if is_int8 else salient_dtype_for(dtype))
        shapes = ops.packed_shapes(
            self.out_features,
            self.planes * self.in_features,
            self.num_salient,
            self.group_size,
        )
        for name, shape, kind in zip(ops.PACKED, shapes, dtypes, strict=True):
            zeros = None if kind is None else torch.zeros(shape, dtype=kind, device=device)
            self.register_buffer(name, zeros)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The buffers that `ops.PACKED` names."""
        return self.qweight, self.scales, self.salient_weight, self.salient_scales

    def _store(self, permuted: Tensor, scales: Tensor) -> None:
        packed = ops.pack_weight(
            permuted,
            torch.arange(self.in_features, dtype=torch.int32),
            self.num_salient,
            self.group_size,
            0,  # already rotated
            self.config.num_bits,
            scales,
            self.salient_weight.dtype,
        )
        for name, tensor in zip(ops.PACKED, packed, strict=True):
            setattr(self, name, tensor)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight_quant: str = "per_channel",
        act_quant: str = "per_token",
        quantize_output: bool = False,
        importance: Tensor | None = None,
        salient_prop: float = 0,
        quant_bits: int = 4,
        group_size: int = 128,
        *,
        sort: str = "rms",
        backend: str = "int4",
        plan: ChannelPlan | None = None,
    ) -> QuantizedLinear:
        """A quantized copy of an nn.Linear or a transformers Conv1D.

        Args:
            importance: [K], mean magnitude of each input channel, which ranks channels for
                salience; None ranks them by the weight's columns.
            sort: sort key of the channels, computed from the weight.
            backend: "int4" returns a W4A4Linear, "fake" a FakeW4A4Linear.
            plan: salient channels and order; overrides importance, salient_prop and sort.

        Raises:
            TypeError: module is not an nn.Linear.
            ValueError: another argument is invalid.
        """
        if not is_linear(module):
            raise TypeError(f"module must be an nn.Linear; got {type(module).__name__}")
        weight, bias = linear_weight(module), getattr(module, "bias", None)
        config = published_config(
            backend,
            act_quant,
            weight_quant=weight_quant,
            num_bits=quant_bits,
            group_size=group_size,
            salient_prop=salient_prop,
            sort=sort,
            sort_by="weight",
        )
        if plan is None:
            weight_stats = ChannelStats.empty(weight.shape[1])
            weight_stats.update(weight)
            stats = weight_stats
            if importance is not None:
                stats = ChannelStats.from_mean(importance)
                if stats.num_channels != weight.shape[1]:
                    raise ValueError(
                        f"importance must have {weight.shape[1]} entries; got {stats.num_channels}"
                    )
            assert config.salient_prop is not None
            plan = choose_channels(
                stats, salient_prop=config.salient_prop, sort=sort, sort_stats=weight_stats
            )
        return linear_class(config).from_weight(
            weight, bias, config, plan, quantize_output=quantize_output
        )

    def _forward(self, x: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers  # faster than attributes of a module
        perm = buffers["perm"]
        choices = (self.group_size, *kernel_choices(self.config))
        y = ops.w4a4_linear(
            x,
            buffers["qweight"],
            buffers["scales"],
            buffers["salient_weight"],
            buffers["salient_scales"],
            perm,
            buffers["bias"],
            self.out_features,
            *choices,
        )
        return self._quantize_output(y)

    def dequantize(self) -> Tensor:
        """The dequantized weight: float32 [N, K], channels in natural order."""
        rotation = kernel_choices(self.config).rotation
        return ops.unpack_weight(
            *self._packed(), self.perm, self.out_features, self.group_size, rotation
        )

    def group_scales(self) -> Tensor:
        """The scales in the packed order of the groups, fp32 [N, G]."""
        return self.scales.float().transpose(1, 2).flatten(0, 1)[: self.out_features]

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `QuantizedLinear.grid`."""
        k4 = self.in_features - self.num_salient
        weight = self.simulated().simulated_weight
        scales = self.group_scales()
        groups = grouped(weight[:, :k4], self.group_size)
        codes = (groups / scales.unsqueeze(-1)).nan_to_num_(0.0).round_().to(torch.int8)
        return codes, scales, weight[:, k4:].clone()

    def set_grid(self, codes: Tensor, scales: Tensor, salient: Tensor, clip: float) -> None:
        """As `QuantizedLinear.set_grid`."""
        self.config = dataclasses.replace(self.config, act_clip=clip)
        self.scales = in_panels(stored_scale(scales)).bfloat16()
        _, _, weights, salient_scales = ops.pack_weight(
            salient.cpu().contiguous(),
            torch.arange(self.num_salient, dtype=torch.int32),
            self.num_salient,
            self.group_size,
            salient_dtype=self.salient_weight.dtype,
        )
        self.salient_weight = weights.to(self.scales.device)
        if salient_scales is not None:
            self.salient_scales = salient_scales.to(self.scales.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the dequantized weight: int64 [...] in [0, N) -> float32 [..., K]."""
        rotation = kernel_choices(self.config).rotation
        rows = ops.unpack_rows(
            *self._packed(), self.perm, ids.flatten(), self.out_features, self.group_size, rotation
        )
        return rows.unflatten(0, ids.shape) if ids.dim() else rows[0]

    def simulated(self, dtype: torch.dtype = torch.float32) -> FakeW4A4Linear:
        """A FakeW4A4Linear that simulates this layer with the same codes, in `dtype`."""
        layer = FakeW4A4Linear(
            self.in_features,
            self.out_features,
            config=dataclasses.replace(self.config, backend="fake"),
            num_salient=self.num_salient,
            quantize_output=self.quantize_output,
            device="meta",
        )
        order = torch.arange(self.in_features, dtype=torch.int32, device=self.perm.device)
        # Not rotated back: the simulation also rotates its input.
        weight = ops.unpack_weight(*self._packed(), order, self.out_features, self.group_size, 0)
        layer.table = self.table
        layer.simulated_weight = weight.to(dtype)
        layer.perm = self.perm.clone()
        layer.bias = None if self.bias is None else self.bias.clone()
        return layer

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        salient = state_dict.get(prefix + "salient_weight")
        if salient is not None and salient.dtype != self.salient_weight.dtype:
            if torch.int8 in (salient.dtype, self.salient_weight.dtype):
                raise ValueError(
                    f"{prefix}salient_weight is {salient.dtype}, but the layer has salient_format="
                    f"{self.config.salient_format!r}"
                )
            # Adopt the dtype: copying between float16 and bfloat16 would round.
            self.salient_weight = self.salient_weight.to(salient.dtype)
        perm = state_dict.get(prefix + "perm")
        if (
            perm is not None
            and perm.device.type != "meta"
            and not is_permutation(perm, len(self.perm))
        ):
            raise ValueError(f"{prefix}perm is not a permutation of {len(self.perm)} channels")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W4A4Linear:
        # Casting the module would round scales and salient weights; these only change device.
        packed = dict(zip(ops.PACKED, self._packed(), strict=True))
        super()._apply(fn, recurse)
        for name, before in packed.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class FakeW4A4Linear(QuantizedLinear):
    """A simulation of W4A4Linear in the tensor's dtype.

    Weights and activations are quantized and dequantized, then multiplied in floating point. Takes
    as much memory as a float layer.

    Buffers: simulated_weight [N, K] in perm's order, perm int32 [K], bias [N] or None.
    """

    simulated_weight: Tensor

    def _register_weight(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        weight = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device)
        self.register_buffer("simulated_weight", weight)

    def _store(self, permuted: Tensor, scales: Tensor) -> None:
        dtype = self.simulated_weight.dtype
        k4 = self.in_features - self.num_salient
        q_max = 2 ** (self.config.num_bits - 1) - 1
        step = _rows_per_chunk(self.in_features)
        for rows, group_scales in zip(permuted.split(step), scales.split(step), strict=True):
            column_scales = group_scales.repeat_interleave(self.group_size, dim=1)[:, :k4]
            rows[:, :k4] = round_to_grid(rows[:, :k4], column_scales, q_max)
            rows[:, k4:] = stored_salient(rows[:, k4:], self.config, dtype)
        self.simulated_weight = permuted.to(dtype)
        if not is_finite(self.simulated_weight):
            raise ValueError(f"a rotated weight exceeds the range of {dtype}")

    def _forward(self, x: Tensor) -> Tensor:
        quantized = quantized_input(x, self.perm, self.num_salient, self.group_size, self.config)
        return self._quantize_output(F.linear(quantized, self.simulated_weight, self.bias))

    def dequantize(self) -> Tensor:
        """The simulated weight, [N, K], channels in natural order."""
        return self._in_natural_order(self.simulated_weight.clone())

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `QuantizedLinear.grid`. Scales that cover the largest weight stand for the lost ones:
        the codes are no integers where the largest code is not in use."""
        k4 = self.in_features - self.num_salient
        weight = self.simulated_weight.float()
        covering = dataclasses.replace(self.config, weight_scale="max")
        scales = weight_group_scales(weight[:, :k4], covering, self.group_size)
        groups = grouped(weight[:, :k4], self.group_size)
        codes = (groups / scales.to(weight.device).unsqueeze(-1)).nan_to_num_(0.0)
        return codes, scales.to(weight.device), weight[:, k4:].clone()

    def set_grid(self, codes: Tensor, scales: Tensor, salient: Tensor, clip: float) -> None:
        """As `QuantizedLinear.set_grid`."""
        self.config = dataclasses.replace(self.config, act_clip=clip)
        k4, dtype = self.in_features - self.num_salient, self.simulated_weight.dtype
        int4 = (codes * stored_scale(scales).unsqueeze(-1)).flatten(1)[:, :k4]
        kept = stored_salient(salient, self.config, dtype)
        self.simulated_weight = torch.cat((int4, kept), dim=1).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the simulated weight: int64 [...] in [0, N) -> [..., K]."""
        return self._in_natural_order(F.embedding(ids, self.simulated_weight))

    def _in_natural_order(self, permuted: Tensor) -> Tensor:
        """[..., K] in perm's order, which is overwritten, rotated back and in natural order."""
        k4 = self.in_features - self.num_salient
        rotation = kernel_choices(self.config).rotation
        permuted[..., :k4] = ops.group_hadamard(permuted[..., :k4], self.group_size, rotation)
        weight = torch.empty_like(permuted)
        weight[..., self.perm.long()] = permuted
        return weight


def linear_class(config: MixedQuantConfig) -> type[W4A4Linear] | type[FakeW4A4Linear]:
    """The layer class for the config's backend."""
    return W4A4Linear if config.backend == "int4" else FakeW4A4Linear


def is_quantized(model: nn.Module) -> bool:
    """Whether any module of the model is a quantized linear."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def refuse_quantized(model: nn.Module) -> None:
    """Raise ValueError if any module of the model is a quantized linear."""
    if is_quantized(model):
        raise ValueError(f"model is quantized already: {type(model).__name__}")
