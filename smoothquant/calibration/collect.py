"""Calibration: texts in, per-channel statistics of every distinct layer input out.

`token_blocks` turns what `texts.read_texts` reads into token windows, `collect_stats` runs them
through a float model once, `save_stats` and `load_stats` keep the result. `get_act_scales`
and `get_static_decoder_layer_scales` are the published functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..channels.statistics import ChannelStats
from ..core.progress import progress_bar
from ..layers.linear import refuse_quantized
from ..models.families import LayerInput, layer_inputs
from ..models.routing import expert_names
from ..models.running import evaluating, hooked, input_hooks, no_cache, without_head


@torch.no_grad()
def collect_stats(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    by_layer: bool = False,
    spill: Path | None = None,
    progress: bool = True,
) -> dict[str, ChannelStats]:
    """Run `batches` through a float model and collect the statistics of its layer inputs.

    Each distinct layer input is seen once: q, k and v (or gate and up) read the same activation,
    and the same ChannelStats object stands under each of their names. Matrices of fused experts
    stand under their own names (`LayerInput.expert_linear`) with the statistics of the tokens that
    were routed to them; the name of the experts module holds the statistics of all its tokens.

    Args:
        model: a transformers causal language model (or anything `families.layer_inputs` can walk
            that takes token ids), not quantized.
        batches: int64 [B, T] tensors of token ids, without padding.
        by_layer: run all batches through one decoder layer after the other, not through the model
            one after the other: for weights that do not stay in memory.
        spill: by layer only: a folder for files of the hidden states between two layers.
        progress: show a progress bar.

    Returns:
        name of a linear -> ChannelStats of its input, the same either way.

    Raises:
        ValueError: a quantized model, a batch of another shape, an activation that is not finite,
            no batch at all, or a layer that was never reached; the message names the layer.
    """
    refuse_quantized(model)
    inputs = layer_inputs(model)
    stats = _idle_experts(model, inputs)
    runner = without_head(model, [item.name for item in inputs])
    device = next(model.parameters()).device

    def add(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in stats:
            stats.update(dict.fromkeys(names, ChannelStats.empty(x.shape[-1])))
        stats[names[0]].update(x)
        if not stats[names[0]].is_finite():
            raise ValueError(
                f"the input of layer {names[0]} is not finite: NaN or Inf while calibrating"
            )

    def checked() -> Iterator[Tensor]:
        number = -1
        for number, batch in enumerate(batches):
            shape = tuple(getattr(batch, "shape", ()))
            if len(shape) != 2:
                raise ValueError(
                    f"batches must hold int64 [B, T] tensors; item {number} is "
                    f"{type(batch).__name__} of shape {shape}"
                )
            yield batch
        if number < 0:
            raise ValueError("batches must hold at least one batch; got none")

    hooks = input_hooks(inputs, add)
    shown = {"desc": "calibrating", "shown": progress}
    if by_layer:
        from .blocks import blocks

        found = blocks(model, list(hooks), list(checked()), spill)
        for block in progress_bar(found, unit="layer", **shown):
            block.run({name: hook for name, hook in hooks.items() if block.holds(name)})
    else:
        with evaluating(model), hooked(model, hooks):
            length = len(batches) if isinstance(batches, Sequence) else None
            for batch in progress_bar(checked(), total=length, unit="batch", **shown):
                runner(batch.to(device), **no_cache(model))
    unreached = [item.name for item in inputs if item.name not in stats]
    if unreached:
        raise ValueError(f"no token reached layer {unreached[0]} ({len(unreached)} layers in all)")
    idle = [name for name, entry in stats.items() if entry.count == 0]
    if idle:
        warnings.warn(
            f"no token was routed to {len(idle)} expert matrices, {idle[0]} the first: "
            "calibrate on more text",
            stacklevel=3,
        )
    return stats


def _idle_experts(model: nn.Module, inputs: Sequence[LayerInput]) -> dict[str, ChannelStats]:
    """Statistics of zero rows for every expert's matrix: some experts may never be reached."""
    stats = {}
    for item in inputs:
        if item.experts:
            module = model.get_submodule(item.experts)
            for name, (_, part) in expert_names(item.experts, module).items():
                stats[name] = ChannelStats.empty(getattr(module, part).shape[-1])
    return stats
