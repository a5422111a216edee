"""Hessians of layer inputs for GPTQ: sums of x x^T over the calibration tokens, x as the quantized
layer sees it: rotated, and rounded to INT4 and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops
from .calibration import evaluating, hooked, no_cache, without_head
from .config import MixedQuantConfig
from .linear import fake_quantize_activation, layer_group_size
from .sorting import ChannelPlan


@torch.no_grad()
def collect_hessians(
    model: nn.Module,
    plans: Mapping[str, ChannelPlan],
    config: MixedQuantConfig,
    batches: Sequence[Tensor],
    *,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Run batches through a model and sum x x^T of some of its layer inputs.

    x is the input as a quantized layer computes with it: in perm's order, the INT4 part rotated,
    quantized and dequantized.

    Args:
        plans: {name of a linear: plan of its input}.
        batches: int64 [B, T] tensors of token ids, without padding.

    Returns:
        {name: float32 [K, K]}.
    """
    hessians: dict[str, Tensor] = {}

    def hook_for(name: str, plan: ChannelPlan):
        k = len(plan.perm)
        k4 = k - plan.num_salient
        group_size = layer_group_size(config, k4)

        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.detach().reshape(-1, k)[:, plan.perm.long()].float()
            rotated = ops.group_hadamard(x[:, :k4], group_size, config.rotation)
            x[:, :k4] = fake_quantize_activation(
                rotated, config, config.act_format, config.act_clip
            )
            if name in hessians:
                hessians[name].addmm_(x.T, x)
            else:
                hessians[name] = x.T @ x

        return hook

    hooks = {name: hook_for(name, plan) for name, plan in plans.items()}
    runner = without_head(model, list(plans))
    device = next(model.parameters()).device
    with evaluating(model), hooked(model, hooks):
        for batch in tqdm(batches, desc="Hessians", unit="batch", disable=not progress):
            runner(batch.to(device), **no_cache(model))
    return hessians
