"""Access to the single matrices of a mixture of experts with fused experts.

transformers 5 keeps all experts of a layer in two 3-D parameters, ``gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]``, so a walk over nn.Linear never sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

PARTS = ("gate_up_proj", "down_proj")


def expert_names(name: str, experts: nn.Module) -> dict[str, tuple[int, str]]:
    """The matrices of a fused experts module, expert by expert.

    Args:
        name: full name of the module.

    Returns:
        {name of the matrix: (expert, part)}, for example
        {``model.layers.0.mlp.experts.3.gate_up_proj``: (3, "gate_up_proj")}.
    """
    return {
        f"{name}.{expert}.{part}": (expert, part)
        for expert in range(len(experts.get_parameter("gate_up_proj")))
        for part in PARTS
    }


def expert_arguments(experts: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """hidden_states [T, H] and top_k_index [T, k] from the arguments of a call to a float fused
    experts module, whether positional or by keyword."""
    named = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
    x = named["hidden_states"].reshape(-1, experts.get_parameter("gate_up_proj").shape[-1])
    return x, named["top_k_index"].reshape(x.shape[0], -1)


@torch.no_grad()
def routed_inputs(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The inputs of the expert matrices in one call to a float fused experts module.

    Args:
        experts: the module, with ``gate_up_proj``, ``down_proj`` and ``act_fn``.
        hidden_states: [T, H], the module's first argument.
        top_k_index: int64 [T, k], its second argument.

    Yields:
        (expert, input of its gate_up_proj [t, H], input of its down_proj [t, I]), for every expert
        that receives t >= 1 tokens.
    """
    gate_up_proj = experts.get_parameter("gate_up_proj")
    act_fn = cast("Callable[[Tensor], Tensor]", experts.act_fn)
    for expert in range(len(gate_up_proj)):
        token = torch.where(top_k_index == expert)[0]
        if token.numel():
            x = hidden_states[token]
            gate, up = nn.functional.linear(x, gate_up_proj[expert]).chunk(2, dim=-1)
            yield expert, x, act_fn(gate) * up
