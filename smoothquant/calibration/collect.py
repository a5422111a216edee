"""Collect per-channel statistics of every distinct layer input."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..channels.statistics import ChannelStats
from ..core.progress import progress_bar
from ..layers.linear import refuse_quantized
from ..models.families import LayerInput, decoder_layers, has_more, layer_inputs
from ..models.linears import is_linear, linear_weight
from ..models.routing import expert_names, expert_parts, expert_weights
from ..models.running import (
    HeadReached,
    evaluating,
    first_argument,
    hooked,
    input_hooks,
    run_tokens,
    without_head,
)
from .blocks import blocks


@torch.no_grad()
def collect_stats(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    by_layer: bool = False,
    spill: Path | None = None,
    progress: bool = True,
    ignore: Sequence[str] = (),
    head: str | None = None,
) -> dict[str, ChannelStats]:
    """Run `batches` through a float model and collect the statistics of its layer inputs.

    Linears that read the same activation (q, k and v, or gate and up) share one ChannelStats
    object, stored under each of their names. Each matrix of fused experts has its own name
    (`LayerInput.expert_linear`) and the statistics of the tokens routed to it; the name of the
    experts module has the statistics of all tokens.

    Args:
        model: a float transformers causal language model, or any module that takes token ids and
            that `families.layer_inputs` supports.
        batches: int64 [B, T] tensors of token ids, without padding.
        by_layer: run all batches through one decoder layer before the next, for models whose
            weights do not fit in memory. The statistics are the same.
        spill: with `by_layer` only, a folder for the hidden states between layers.
        progress: show a progress bar.
        ignore: patterns of modules to leave out, as in `MixedQuantConfig`.
        head: full name of the output head, to collect the statistics of its input too, which
            ``MixedQuantConfig(head="int4")`` uses.

    Returns:
        {name of a linear: ChannelStats of its input}. Those of a layer that no token reached, for
        example in the vision tower of a model that is calibrated on texts, cover no row; `quantize`
        then keeps the layer as it is.

    Raises:
        ValueError: the model is quantized, there is no batch or one of the wrong shape, an
            activation is not finite, or no token reached any layer.
    """
    refuse_quantized(model)
    inputs = layer_inputs(model, ignore)
    stats = _idle_experts(model, inputs)
    runner = model if head else without_head(model, [item.name for item in inputs])
    device = next(model.parameters()).device

    def add(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in stats:
            stats.update(dict.fromkeys(names, ChannelStats.empty(x.shape[-1])))
        stats[names[0]].update(x)
        if not stats[names[0]].is_finite():
            raise ValueError(f"the input of layer {names[0]} holds NaN or Inf during calibration")

    def checked_batches() -> Iterator[Tensor]:
        number = -1
        for number, batch in enumerate(batches):
            shape = tuple(getattr(batch, "shape", ()))
            if len(shape) != 2:
                raise ValueError(
                    f"batches must contain int64 [B, T] tensors; item {number} is "
                    f"{type(batch).__name__} of shape {shape}"
                )
            yield batch
        if number < 0:
            raise ValueError("batches must contain at least one batch; got none")

    def at_head(module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert head is not None
        add((head,), first_argument(args, kwargs))
        raise HeadReached

    hooks = input_hooks(inputs, add)
    hooked_inputs = list(hooks)
    if head:
        hooks[head] = at_head
    if by_layer:
        if has_more(model):  # no token reaches what is outside the decoder layers
            inside = tuple(f"{layer}." for layer in decoder_layers(model))
            hooked_inputs = [name for name in hooked_inputs if name.startswith(inside)]
        layers = blocks(model, hooked_inputs, list(checked_batches()), spill, head)
        for block in progress_bar(layers, desc="calibrating", unit="layer", shown=progress):
            block.run({name: hook for name, hook in hooks.items() if block.holds(name)})
    else:
        with evaluating(model), hooked(model, hooks):
            length = len(batches) if isinstance(batches, Sequence) else None
            for batch in progress_bar(
                checked_batches(), total=length, desc="calibrating", unit="batch", shown=progress
            ):
                with suppress(HeadReached):
                    run_tokens(runner, batch.to(device))
    idle = [name for name, entry in stats.items() if entry.count == 0]
    unreached = [
        names
        for item in inputs
        for names in (item.linears, (item.experts,) if item.experts else ())
        if names and names[0] not in stats
    ]
    if all(entry.count == 0 for entry in stats.values()):
        raise ValueError(f"no token reached layer {unreached[0][0]}, nor any other")
    for names in unreached:
        stats.update(dict.fromkeys(names, ChannelStats.empty(_channels(model, names[0]))))
    if idle:
        warnings.warn(
            f"no token was routed to {len(idle)} expert matrices (first: {idle[0]}); "
            "calibrate on more text",
            stacklevel=3,
        )
    return stats


def _channels(model: nn.Module, name: str) -> int:
    """The input channels of a linear or experts module."""
    module = model.get_submodule(name)
    if is_linear(module):
        return linear_weight(module).shape[1]
    return expert_weights(module, expert_parts(module)[0]).shape[-1]


def _idle_experts(model: nn.Module, inputs: Sequence[LayerInput]) -> dict[str, ChannelStats]:
    """Empty statistics for every expert matrix, as no token may ever reach some experts."""
    stats = {}
    for item in inputs:
        if item.experts:
            module = model.get_submodule(item.experts)
            for name, (_, part) in expert_names(item.experts, module).items():
                stats[name] = ChannelStats.empty(expert_weights(module, part).shape[-1])
    return stats
