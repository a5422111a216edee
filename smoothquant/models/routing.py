"""Access to the single matrices of a mixture of experts with fused experts.

transformers 5 keeps all experts of a layer in two 3-D parameters, so a walk over nn.Linear never
sees them. Its decorator `use_experts_implementation` marks how a class stores and combines them:

has_gate       the first parameter is ``gate_up_proj``, whose 2I outputs ``_apply_gate`` combines to
               I channels; else it is ``up_proj``, with the activation ``act_fn``. The second one is
               ``down_proj``
is_transposed  an expert's matrix is stored as [K, N], else as [N, K]
has_bias       there are ``<parameter>_bias [E, N]`` too

Attributes that a class lacks are those of Mixtral: a gate, not transposed, no biases.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED = ("gate_up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")
DOWN = "down_proj"  # reads what the other one's outputs become

# Experts without transformers' decorator that are called with hidden states only, [E * T, H]: a
# copy of all tokens for each expert, with zeros for the tokens that are not routed to it. Their
# matrices are transposed.
BATCHED = frozenset({"Llama4TextExperts"})


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module has the two 3-D parameters of fused experts."""

    def has(part: str) -> bool:
        tensor = getattr(module, part, None)
        return isinstance(tensor, Tensor) and tensor.dim() == 3

    return any(all(map(has, parts)) for parts in (GATED, UNGATED))


def expert_parts(experts: nn.Module) -> tuple[str, str]:
    """The names of a fused experts module's two parameters, in forward order."""
    return GATED if getattr(experts, "has_gate", True) else UNGATED


def is_transposed(experts: nn.Module) -> bool:
    """Whether the matrices of a fused experts module are stored as [K, N]."""
    return bool(getattr(experts, "is_transposed", type(experts).__name__ in BATCHED))


def num_experts(experts: nn.Module) -> int:
    """The number of experts of a float fused experts module."""
    return len(experts.get_parameter(DOWN))


def expert_parameters(experts: nn.Module) -> list[str]:
    """The names of all parameters that a fused experts module should have."""
    biases = ("", "_bias") if getattr(experts, "has_bias", False) else ("",)
    return [part + bias for part in expert_parts(experts) for bias in biases]


def expert_weights(experts: nn.Module, part: str) -> Tensor:
    """The matrices of all experts as a view [E, N, K]."""
    weights = experts.get_parameter(part)
    return weights.transpose(1, 2) if is_transposed(experts) else weights


def expert_matrix(experts: nn.Module, expert: int, part: str) -> tuple[Tensor, Tensor | None]:
    """One expert's matrix as a view [N, K], and its bias [N] or None."""
    biases: Tensor | None = getattr(experts, f"{part}_bias", None)
    return expert_weights(experts, part)[expert], None if biases is None else biases[expert]


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
        for expert in range(num_experts(experts))
        for part in expert_parts(experts)
    }


def without_weights(experts: nn.Module) -> nn.Module:
    """A copy of a fused experts module that has no parameters, for `expert_activation` and
    `set_expert_matrices`."""
    bare = copy.copy(experts)
    fields: dict[str, Any] = vars(bare)
    fields["_parameters"] = {}
    for key in ("forward", "_old_forward", "_hf_hook"):  # they refer to the original
        fields.pop(key, None)
    return bare


def set_expert_matrices(
    experts: nn.Module, part: str, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    """Set one parameter of a fused experts module, and its biases.

    Args:
        weights: the matrices [N, K] of all experts.
        biases: [N] of all experts; empty if there are none.
    """
    weights = [weight.T for weight in weights] if is_transposed(experts) else weights
    experts.register_parameter(part, nn.Parameter(torch.stack(list(weights))))
    if biases:
        experts.register_parameter(f"{part}_bias", nn.Parameter(torch.stack(list(biases))))


def expert_activation(experts: nn.Module, x: Tensor) -> Tensor:
    """The inputs [t, I] of an expert's down_proj, from the outputs [t, 2I] of its gate_up_proj or
    [t, I] of its up_proj.

    Args:
        experts: a fused experts module, perhaps `without_weights`.
    """
    kind: Any = experts
    if not getattr(experts, "has_gate", True):
        return kind.act_fn(x)
    if hasattr(experts, "_apply_gate"):
        return kind._apply_gate(x)
    gate, up = x.chunk(2, dim=-1)
    return kind.act_fn(gate) * up


def expert_arguments(
    count: int, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens and their experts in a call to a fused experts module.

    The arguments' names differ between classes; all begin with ``hidden_states``, and tell the
    experts' indices by their dtype. An index beyond the experts, as of tokens whose expert is on
    another device, means none.

    Args:
        count: the number of experts.

    Returns:
        hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k]. T counts a token once
        for each expert if the experts are `BATCHED`.
    """
    kwargs = dict(kwargs)
    x = args[0] if args else kwargs.pop("hidden_states")
    x = x.reshape(-1, x.shape[-1])
    routing = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor)]
    if not routing:
        expert = torch.arange(count, device=x.device).repeat_interleave(len(x) // count)
        expert = torch.where((x != 0).any(-1), expert, count)
        return x, expert[:, None], x.new_ones(len(x), 1)
    index = next(t for t in routing if not t.is_floating_point())
    weights = next(t for t in routing if t.is_floating_point())
    return x, index.flatten(0, -2), weights.flatten(0, -2)


@torch.no_grad()
def routed_inputs(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The inputs of the expert matrices in one call to a float fused experts module.

    Args:
        experts: the module.
        hidden_states, top_k_index: [T, H] and int64 [T, k], as from `expert_arguments`.

    Yields:
        (expert, input [t, H] of its first matrix, input [t, I] of its second one), for every expert
        that receives t >= 1 tokens.
    """
    first, _ = expert_parts(experts)
    for expert in range(num_experts(experts)):
        token = torch.where(top_k_index == expert)[0]
        if token.numel():
            x = hidden_states[token]
            y = F.linear(x, *expert_matrix(experts, expert, first))
            yield expert, x, expert_activation(experts, y)
