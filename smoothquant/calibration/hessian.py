"""Layer inputs collected during calibration: sample rows, and the Hessians for GPTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig, layer_group_size
from ..core.spill import scratch
from ..layers.linear import quantized_input
from ..models.families import LayerInput
from ..models.running import input_hooks
from .blocks import Block

SAMPLE_ROWS = 1024  # rows of a layer input to try choices on
SAMPLE_BATCHES = 4  # take them from this many batches; from more if these have too few rows


@torch.no_grad()
def sample_rows(
    block: Block, inputs: Sequence[LayerInput], names: Sequence[str]
) -> dict[str, Tensor]:
    """Sample about SAMPLE_ROWS evenly spread rows of each layer input in `names`.

    Returns:
        {name: float32 [t, K]}, without the expert matrices that no token reaches.
    """
    rows: dict[str, list[Tensor]] = {}
    count = block.batches_of(SAMPLE_ROWS, SAMPLE_BATCHES)

    def add(readers: tuple[str, ...], x: Tensor) -> None:
        if readers[0] in names:
            x = x.detach().reshape(-1, x.shape[-1])
            step = max(1, len(x) * count // SAMPLE_ROWS)
            rows.setdefault(readers[0], []).append(x[::step].float())

    block.run(input_hooks(inputs, add), at_most=count)
    return {name: torch.cat(parts) for name, parts in rows.items()}


@torch.no_grad()
def collect_hessians(
    block: Block,
    inputs: Sequence[LayerInput],
    choices: Mapping[str, tuple[ChannelPlan, MixedQuantConfig]],
    spill: Path | None = None,
) -> dict[str, Tensor]:
    """Sum x x^T over all tokens, with x as the quantized layer will compute with it.

    That is: in the order of the plan's permutation, with the INT4 part rotated, quantized and
    dequantized.

    Args:
        choices: {name of a layer input: (channel plan, config of the layer)}.
        spill: keep the Hessians in files in this folder (model on the CPU only); None keeps them in
            memory.

    Returns:
        {name: float32 [K, K]}, without the expert matrices that no token reaches.
    """
    hessians: dict[str, Tensor] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in choices:
            return
        plan, config = choices[names[0]]
        k = x.shape[-1]
        group_size = layer_group_size(config, k - plan.num_salient)
        x = x.detach().reshape(-1, k).float()
        x = quantized_input(x, plan.perm, plan.num_salient, group_size, config)
        if names[0] not in hessians:
            if spill is None:
                hessians[names[0]] = torch.zeros(k, k, device=x.device)
            else:
                hessians[names[0]] = scratch((k, k), x.dtype, spill).zero_()
        hessians[names[0]].addmm_(x.T, x)

    block.run(input_hooks(inputs, add))
    return hessians
