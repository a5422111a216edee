"""Quantized experts of a mixture of experts: two quantized linears per expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.routing import PARTS


class W4A4Experts(nn.Module):
    """Replaces a fused experts module by a pair of quantized linears per expert.

    The children are named by expert index; each holds ``gate_up_proj`` (H -> 2I) and ``down_proj``
    (I -> H). A token's result depends on that token only.

    Args:
        linears: {(expert, part): linear} for all experts 0 ... E-1 and all PARTS.
        act_fn: the activation between the two linears, applied to the first half of gate_up_proj's
            output.
    """

    def __init__(self, linears: Mapping[tuple[int, str], nn.Module], act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(linears) // len(PARTS)
        self.act_fn = act_fn
        for expert in range(self.num_experts):
            pair = nn.ModuleDict({part: linears[expert, part] for part in PARTS})
            self.add_module(str(expert), pair)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            pair = self.get_submodule(str(expert))
            gate_up = pair.get_submodule("gate_up_proj")(hidden_states[token])
            gate, up = gate_up.chunk(2, dim=-1)
            y = pair.get_submodule("down_proj")(self.act_fn(gate) * up)
            y = y * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out
