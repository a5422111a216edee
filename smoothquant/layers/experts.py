"""Quantized experts of a mixture of experts: two quantized linears per expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.routing import expert_activation, expert_arguments, expert_parts, without_weights


class W4A4Experts(nn.Module):
    """Replaces a fused experts module by a pair of quantized linears per expert.

    The children are named by expert index; each holds the linears of the two parts
    (`routing.expert_parts`): ``gate_up_proj`` (H -> 2I) and ``down_proj`` (I -> H), or ``up_proj``
    (H -> I) and ``down_proj``. A token's result depends on that token only.

    Attributes:
        parts: names of the linears of an expert, in forward order.
        float_experts: the float module without its weights, whose activation is computed between
            the two linears. Not a submodule.

    Args:
        linears: {(expert, part): linear} for all experts 0 ... E-1 and both parts.
        experts: the float fused experts module.
    """

    parts: tuple[str, str]
    float_experts: nn.Module

    def __init__(self, linears: Mapping[tuple[int, str], nn.Module], experts: nn.Module) -> None:
        super().__init__()
        self.parts = expert_parts(experts)
        self.num_experts = len(linears) // len(self.parts)
        vars(self)["float_experts"] = without_weights(experts)
        for expert in range(self.num_experts):
            pair = nn.ModuleDict({part: linears[expert, part] for part in self.parts})
            self.add_module(str(expert), pair)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The arguments and the result of the float module: hidden_states [T, H], indices of
        experts int64 [T, k] and their weights [T, k] -> [T, H]."""
        x, top_k_index, top_k_weights = expert_arguments(self.num_experts, args, kwargs)
        first, second = self.parts
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            pair = self.get_submodule(str(expert))
            y = pair.get_submodule(first)(x[token])
            y = pair.get_submodule(second)(expert_activation(self.float_experts, y))
            y = y * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out
