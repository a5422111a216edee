"""Run a model over calibration tokens one decoder layer at a time.

The hidden states of all tokens are kept between layers. Each layer is therefore calibrated on the
output of the quantized layers before it, at the cost of two passes over the tokens per layer: one
to calibrate it, and one to compute its output once it is quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.spill import scratch
from ..models.families import decoder_layers
from ..models.running import HeadReached, evaluating, hooked, run_tokens, without_head

logger = logging.getLogger("smoothquant")


class _Call(NamedTuple):
    """The arguments of a call of a decoder layer, without the hidden states, which come first."""

    args: tuple
    kwargs: dict[str, Any]


class _FirstLayerReached(Exception):
    """Stops a forward pass at the first decoder layer."""


class Block:
    """One decoder layer, the output head or the whole model, together with its inputs for all
    tokens.

    Attributes:
        name: full name of the decoder layer or head; "" for the whole model.
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
        """Whether the module of this full name is part of the block."""
        return f"{name}.".startswith(f"{self.name}." if self.name else "")

    def batches_of(self, num_tokens: int, least: int) -> int:
        """How many batches have about `num_tokens` tokens: at least `least`, at most all."""
        tokens = sum(batch.numel() for batch in self._batches)
        needed = -(-num_tokens * len(self._batches) // tokens)
        return min(len(self._batches), max(least, needed))

    @torch.no_grad()
    def run(self, hooks: Mapping[str, Callable], at_most: int | None = None) -> None:
        """Run the block in its current state, with hooks.

        Args:
            hooks: {module name: hook(module, args, kwargs)}, called before the module runs.
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
    head: str | None = None,
) -> Iterator[Block]:
    """Yield the decoder layers that hold the modules `names`, in forward order; then `head`.

    Changes that the caller makes to a block take effect in the inputs of the next one.

    The whole model is a single block if its decoder layers are unknown, do not hold all of the
    modules, or pass each other more than hidden states.

    Args:
        batches: int64 [B, T] tensors of token ids, without padding.
        spill: keep the hidden states between layers in files in this folder (model on the CPU
            only); None keeps them in memory.
        head: the output head, if its input is needed too. Its block may end by `HeadReached`.
    """
    layers = decoder_layers(model)
    inside = all(any(name.startswith(layer + ".") for layer in layers) for name in names)
    runner = without_head(model, names)
    device = next(model.parameters()).device

    def run_model(batch: Tensor) -> Any:
        return run_tokens(runner, batch.to(device))

    def run_with_head(batch: Tensor) -> None:
        with suppress(HeadReached):
            run_tokens(model, batch.to(device))

    calls = _layer_calls(model, layers, batches, run_model) if layers and inside else None
    if calls is None:
        if layers:
            logger.warning(
                "the decoder layers of %s cannot be run one by one: calibrating it as a whole",
                type(model).__name__,
            )
        run = run_with_head if head else run_model
        yield Block(model, "", [partial(run, batch) for batch in batches], batches)
        return
    hidden = [
        _stored(_first_hidden(model, layers[0], batch, run_model), spill) for batch in batches
    ]
    shapes = [batch.shape for batch in batches]
    others: dict[str, tuple | None] = {}  # what a layer returns beside the hidden states

    def pass_through(at: int) -> None:
        """Run the model with layers that compute nothing, up to the last, which gets its input."""

        def passing(layer: str) -> Callable[..., Any]:
            rest = others[layer]
            output = hidden[at] if rest is None else (hidden[at], *rest)
            return lambda *args, **kwargs: output

        with _replaced_forwards(model, {layer: passing(layer) for layer in layers[:-1]}):
            run_with_head(batches[at])

    for index, layer in enumerate(layers):

        def forward(at: int, index: int = index, layer: str = layer) -> Tensor:
            call = calls[shapes[at]][index]
            output = model.get_submodule(layer)(hidden[at], *call.args, **call.kwargs)
            others[layer] = output[1:] if isinstance(output, tuple) else None
            return _hidden_states(output)

        forwards = [partial(forward, at) for at in range(len(batches))]
        yield Block(model, layer, forwards, batches)
        if layer == layers[-1]:
            break
        with torch.no_grad(), evaluating(model):
            for at in range(len(batches)):
                hidden[at] = _stored(forward(at), spill)
    if head:
        yield Block(model, head, [partial(pass_through, at) for at in range(len(batches))], batches)


@contextmanager
def _replaced_forwards(
    model: nn.Module, forwards: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Let the modules of these names compute something else; restore them on exit."""
    before = {}
    for name, forward in forwards.items():
        module = model.get_submodule(name)
        before[name] = vars(module).get("forward")
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for name, own in before.items():
            module = model.get_submodule(name)
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def _stored(hidden: Tensor, spill: Path | None) -> Tensor:
    """The hidden states of a batch, moved to a file if `spill` is given."""
    return hidden if spill is None else scratch(hidden.shape, hidden.dtype, spill).copy_(hidden)


def _hidden_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first_hidden(
    model: nn.Module, layer: str, batch: Tensor, run_model: Callable[[Tensor], Any]
) -> Tensor:
    """The input of the first decoder layer."""
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstLayerReached

    with (
        torch.no_grad(),
        evaluating(model),
        hooked(model, {layer: stop}),
        suppress(_FirstLayerReached),
    ):
        run_model(batch)
    return inputs[0]


@torch.no_grad()
def _layer_calls(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Tensor],
    run_model: Callable[[Tensor], Any],
) -> dict[torch.Size, list[_Call]] | None:
    """Record how the model calls each of its layers, for every batch shape.

    Without padding, masks and positions depend on the shape alone.

    Returns:
        {batch shape: one call per layer}, or None if calling the layers one after the other this
        way does not reproduce the hidden states inside the model.
    """
    calls: dict[torch.Size, list[_Call]] = {}
    for batch in batches:
        if batch.shape in calls:
            continue
        recorded: list[_Call] = []
        follows: list[bool] = []  # whether a layer's input is exactly the previous layer's output
        previous: list[Tensor] = []  # the output of the previous layer, called by itself

        def record(
            module: nn.Module,
            args: tuple,
            kwargs: dict[str, Any],
            recorded: list[_Call] = recorded,
            follows: list[bool] = follows,
            previous: list[Tensor] = previous,
        ) -> None:
            kwargs = dict(kwargs)
            x = args[0] if args else kwargs.pop("hidden_states", None)
            follows.append(
                isinstance(x, Tensor) and (not previous or torch.equal(x, previous.pop()))
            )
            recorded.append(_Call(args[1:], kwargs))
            if follows[-1]:
                previous.append(_hidden_states(module.forward(x, *args[1:], **kwargs)))

        with evaluating(model), hooked(model, dict.fromkeys(layers, record)):
            run_model(batch)
        if len(recorded) != len(layers) or not all(follows):
            return None
        calls[batch.shape] = recorded
    return calls
