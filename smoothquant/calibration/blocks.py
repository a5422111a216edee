"""A model run one decoder layer at a time over calibration tokens.

The hidden states of all tokens wait between two layers, so a layer is calibrated on what the layers
before it, already quantized, really give it: one pass over the tokens to calibrate it and one to
go on, however many layers there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.spill import scratch
from ..models.families import decoder_layers
from ..models.running import evaluating, hooked, no_cache, without_head

logger = logging.getLogger("smoothquant")


class _Call(NamedTuple):
    """How the model calls one of its decoder layers; hidden states stand in front of args."""

    args: tuple
    kwargs: dict


class _Reached(Exception):
    """Thrown to leave a forward pass at its first decoder layer."""


class Block:
    """A part of the model, a decoder layer or all of it, with its inputs for all tokens.

    name: full name of the decoder layer, "" for the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        forwards: Sequence[Callable[[], object]],
        batches: Sequence[Tensor],
    ) -> None:
        self.name = name
        self._model, self._forwards, self._batches = model, forwards, batches

    def holds(self, name: str) -> bool:
        """Whether a module of this full name is part of the block."""
        return not self.name or name.startswith(self.name + ".")

    def batches_of(self, num_tokens: int, least: int) -> int:
        """How many batches hold about num_tokens, at least `least`, at most all."""
        tokens = sum(batch.numel() for batch in self._batches)
        needed = -(-num_tokens * len(self._batches) // tokens)
        return min(len(self._batches), max(least, needed))

    @torch.no_grad()
    def run(self, hooks: Mapping[str, Callable], at_most: int | None = None) -> None:
        """Run the block as it is now, hook(module, args, kwargs) called before each module named.

        at_most: how many batches to run, evenly spread; None for all.
        """
        count = min(at_most or len(self._forwards), len(self._forwards))
        with evaluating(self._model), hooked(self._model, hooks):
            for index in range(count):
                self._forwards[index * len(self._forwards) // count]()


def blocks(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    spill: Path | None = None,
) -> Iterator[Block]:
    """The decoder layers that hold the modules `names`, in forward order.

    What the caller does to a block before it asks for the next one shows in the next one's inputs.
    A model whose decoder layers are unknown, hold not all of the modules, or do more than hand
    hidden states from one to the next is one block.

    Args:
        batches: int64 [B, T] tensors of token ids, without padding.
        spill: a folder for files of the hidden states between layers, of a model on the CPU; None:
            memory holds them.
    """
    layers = decoder_layers(model)
    inside = all(any(name.startswith(layer + ".") for layer in layers) for name in names)
    runner = without_head(model, names)
    device = next(model.parameters()).device

    def whole(batch: Tensor) -> Tensor:
        return runner(batch.to(device), **no_cache(model))

    calls = _layer_calls(model, layers, batches, whole) if layers and inside else None
    if calls is None:
        if layers:
            logger.warning(
                "the decoder layers of %s cannot be run one by one: calibrating it as a whole",
                type(model).__name__,
            )
        yield Block(model, "", [lambda batch=batch: whole(batch) for batch in batches], batches)
        return
    hidden = [_kept(_first_hidden(model, layers[0], batch, whole), spill) for batch in batches]
    shapes = [batch.shape for batch in batches]
    for index, layer in enumerate(layers):

        def forward(at: int, index: int = index, layer: str = layer) -> Tensor:
            call = calls[shapes[at]][index]
            return _only_hidden(model.get_submodule(layer)(hidden[at], *call.args, **call.kwargs))

        forwards = [lambda at=at: forward(at) for at in range(len(batches))]
        yield Block(model, layer, forwards, batches)
        if layer == layers[-1]:
            return
        with torch.no_grad(), evaluating(model):
            for at in range(len(batches)):
                hidden[at] = _kept(forward(at), spill)


def _kept(hidden: Tensor, spill: Path | None) -> Tensor:
    """The hidden states of a batch where they wait."""
    return hidden if spill is None else scratch(hidden.shape, hidden.dtype, spill).copy_(hidden)


def _only_hidden(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first_hidden(model: nn.Module, layer: str, batch: Tensor, whole: Callable) -> Tensor:
    """What the first decoder layer is given."""
    found: list[Tensor] = []

    def stop(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    with torch.no_grad(), evaluating(model), hooked(model, {layer: stop}), suppress(_Reached):
        whole(batch)
    return found[0]


@torch.no_grad()
def _layer_calls(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], whole: Callable
) -> dict[torch.Size, list[_Call]] | None:
    """How the model calls each layer, for every shape of a batch: masks and positions depend on
    nothing else, as nothing is padded. None unless the layers, called so one after the other, give
    each other what they give each other inside the model."""
    calls: dict[torch.Size, list[_Call]] = {}
    for batch in batches:
        if batch.shape in calls:
            continue
        found: list[_Call] = []
        follows: list[bool] = []  # whether a layer's input is what the one before it gives alone
        given: list[Tensor] = []

        def record(module, args, kwargs, found=found, follows=follows, given=given):
            kwargs = dict(kwargs)
            x = args[0] if args else kwargs.pop("hidden_states", None)
            follows.append(isinstance(x, Tensor) and (not given or torch.equal(x, given.pop())))
            found.append(_Call(args[1:], kwargs))
            if follows[-1]:
                given.append(_only_hidden(module.forward(x, *args[1:], **kwargs)))

        with evaluating(model), hooked(model, dict.fromkeys(layers, record)):
            whole(batch)
        if len(found) != len(layers) or not all(follows):
            return None
        calls[batch.shape] = found
    return calls
