"""INT8 weights for output heads and embeddings, from the kernels for INT4."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig, table_config
from ..kernels import ops
from .gptq import Curvature
from .linear import (
    FakeW4A4Linear,
    W4A4Linear,
    check_weight,
    in_panels,
    kernel_choices,
    linear_class,
)
from .rounding import SMALLEST_NORMAL, stored_scale

TABLE_KINDS = ("int8", "int4")
LARGEST_CODE = 119  # 16 * 7 + 7
ROWS_AT_ONCE = 1024  # a multiple of ops.PANEL


class Int8Linear(W4A4Linear):
    """A linear layer with INT8 weights and activations, for output heads and embeddings.

    A weight is ``code * scale``, code in [-119, 119], and a code is ``16 high + low`` with high
    and low in [-8, 7]. So the layer is a W4A4Linear of 2 K channels that reads its input twice: the
    first K channels hold high with the scale ``16 scale``, which is exact in bfloat16, and the
    others low with ``scale``. It needs no kernel of its own. No channel is salient, rotated or
    moved.

    Buffers: those of a W4A4Linear with 2 K input channels.
    """

    planes = 2

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        config: MixedQuantConfig,
        plan: ChannelPlan | None = None,
        *,
        quantize_output: bool = False,
        curvature: Curvature | None = None,
    ) -> Int8Linear:
        """Quantize a weight on the CPU, to nearest, and put the layer on the weight's device.

        Args:
            weight: [N, K], float32, float16 or bfloat16.
            bias: [N], or None.
            config: from `core.config.table_config`.
            plan, quantize_output, curvature: have no meaning here.

        Raises:
            TypeError, ValueError: as `QuantizedLinear.from_weight`.
        """
        n, k = weight.shape
        check_weight(weight, bias, ChannelPlan(torch.arange(k, dtype=torch.int32), 0))
        layer = cls(k, n, bias is not None, config=config, dtype=weight.dtype, device="meta")
        packed = [_packed(rows.cpu().float(), layer.group_size)
                  for rows in weight.detach().split(ROWS_AT_ONCE)]  # fmt: skip
        layer.qweight, layer.scales = (torch.cat(parts) for parts in zip(*packed, strict=True))
        layer.salient_weight = torch.empty(
            layer.salient_weight.shape, dtype=layer.salient_weight.dtype
        )
        layer.perm = torch.arange(2 * k, dtype=torch.int32)
        layer.bias = None if bias is None else bias.detach().clone()
        return layer.to(weight.device)

    def _forward(self, x: Tensor) -> Tensor:
        return super()._forward(torch.cat((x, x), dim=-1))

    def dequantize(self) -> Tensor:
        """The dequantized weight: float32 [N, K]."""
        return sum_of_planes(super().dequantize())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the dequantized weight: int64 [...] in [0, N) -> float32 [..., K]."""
        return sum_of_planes(super().rows(ids))

    def simulated(self, dtype: torch.dtype = torch.float32) -> FakeW4A4Linear:
        """A FakeW4A4Linear that simulates this layer with the same codes, in `dtype`."""
        config = dataclasses.replace(self.config, backend="fake", num_bits=8)
        layer = FakeW4A4Linear(self.in_features, self.out_features, config=config, device="meta")
        layer.table = self.table
        layer.simulated_weight = self.dequantize().to(dtype)
        layer.perm = self.perm[: self.in_features].clone()
        layer.bias = None if self.bias is None else self.bias.clone()
        return layer

    def extra_repr(self) -> str:
        choices = kernel_choices(self.config)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, per_token={choices.per_token}"
        )


def table_class(config: MixedQuantConfig, kind: str) -> type[W4A4Linear] | type[FakeW4A4Linear]:
    """The layer class of an output head or embeddings, for the config's backend."""
    return Int8Linear if (kind, config.backend) == ("int8", "int4") else linear_class(config)


def blank_table(
    kind: str, k: int, n: int, config: MixedQuantConfig, **fields: Any
) -> W4A4Linear | FakeW4A4Linear:
    """A layer of zeros for an output head or embeddings with k channels and n tokens.

    Args:
        kind: "int8" or "int4".
        config: the model's.
        fields: other arguments of `QuantizedLinear`.

    Raises:
        ValueError: `kind` is neither.
    """
    if kind not in TABLE_KINDS:
        raise ValueError(f"table must be one of {', '.join(TABLE_KINDS)}; got {kind!r}")
    layer = table_class(config, kind)(k, n, config=table_config(config, kind, k), **fields)
    layer.table = kind
    return layer


def sum_of_planes(weight: Tensor) -> Tensor:
    high, low = weight.chunk(2, dim=-1)
    return high + low  # exact in fp32: a code times a scale of 8 significant bits


def _packed(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """qweight and scales of both planes of w, fp32 [N, K]; group_size divides K."""
    n, k = w.shape
    groups = w.unflatten(1, (k // group_size, group_size)) if k else w.reshape(n, 0, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    scales = stored_scale(largest / LARGEST_CODE)
    inverse = torch.where(scales >= SMALLEST_NORMAL, 1 / scales, 0)
    codes = (groups * inverse).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    high = ((codes + 8) / 16).floor_()
    planes = torch.cat((high, codes - 16 * high), dim=1)  # [N, 2 G, group_size]
    plane_scales = torch.cat((16 * scales, scales), dim=1).squeeze(-1)
    return pack_groups(planes.to(torch.int8)), in_panels(plane_scales).bfloat16()


def pack_groups(codes: Tensor) -> Tensor:
    """Pack given codes as `ops.pack_weight` would (docs/format.md), without rounding.

    Args:
        codes: int8 [N, G, g] in [-8, 7]; every group is full.

    Returns:
        uint8 [P, B, 64].
    """
    quads = F.pad(codes, (0, -codes.shape[2] % ops.QUAD)).flatten(1).unflatten(1, (-1, ops.QUAD))
    quads = F.pad(quads, (0, 0, 0, quads.shape[1] % 2, 0, -len(quads) % ops.PANEL))
    nibbles = (quads + 8).to(torch.uint8).unflatten(0, (-1, ops.PANEL)).transpose(1, 2)
    even, odd = nibbles[:, ::2], nibbles[:, 1::2]  # [P, B, 16, 4]
    return (even | odd << 4).flatten(2).contiguous()
