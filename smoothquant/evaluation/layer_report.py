"""Where the error of a quantized model comes from: each layer against the float model's.

Every linear of every model is given the float model's own inputs, so that its error is its own and
nothing that earlier layers did. The hidden states after each decoder layer, of models that run on
their own, tell what those errors add up to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from ..core.progress import progress_bar
from ..layers.linear import refuse_quantized
from ..models.families import layer_inputs
from ..models.routing import PARTS, expert_arguments, expert_names, routed_inputs
from ..models.running import evaluating, first_argument, hooked, no_cache, without_head

HIDDEN = "hidden"
_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.")  # the decoder layer that a module is in, by its name


@dataclass
class LayerError:
    """The error of one output of the float model in each of some quantized models.

    name: full name of a linear, of one expert's matrix, or of a decoder layer.
    layer: number of the decoder layer; None outside of any.
    kind: last part of the name ("q_proj"), or "hidden" for the output of a decoder layer.
    signal: sum of y^2 over all tokens and channels, y the float model's output.
    noise: {model: sum of (y - its output)^2}, and {"a - b": sum of (a's - b's output)^2} for every
        pair of models.
    """

    name: str
    layer: int | None
    kind: str
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, y: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add tokens: y, the float model's output, and that of each model; of one shape."""
        self.signal += _energy(y)
        for model, output in outputs.items():
            self._add_noise(model, y, output)
        for one, other in combinations(outputs, 2):
            self._add_noise(f"{one} - {other}", outputs[one], outputs[other])

    def _add_noise(self, name: str, y: Tensor, other: Tensor) -> None:
        self.noise[name] = self.noise.get(name, 0.0) + _energy(y.float() - other.float())

    @property
    def decibels(self) -> dict[str, float]:
        """10 log10(signal / noise): the more, the better; Inf for equal outputs, NaN where all
        of them are 0 or one holds NaN."""
        return {name: _decibels(self.signal, noise) for name, noise in self.noise.items()}


def _energy(x: Tensor) -> float:
    return x.float().square().sum(dtype=torch.float64).item()


def _decibels(signal: float, noise: float) -> float:
    ratio = torch.tensor(signal, dtype=torch.float64) / noise
    return 10 * ratio.log10().item()


@torch.no_grad()
def layer_report(
    float_model: nn.Module,
    models: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    *,
    progress: bool = True,
) -> list[LayerError]:
    """Measure every layer of quantized models against the float model that they were made from.

    Sums are streamed over the batches; of activations, only the outputs of the decoder layers are
    kept, of one batch at a time.

    Args:
        float_model: a float model that `families.layer_inputs` can walk.
        models: {name of your choice: model with a module in the place of each linear}, for example
            {"int4": ..., "fake": ...}.
        batches: int64 [B, T] tensors of token ids, without padding.
        progress: show a progress bar.

    Returns:
        errors of every matrix with an input (an expert that no token was routed to has none),
        decoder layer by decoder layer, each followed by that of its hidden states.

    Raises:
        ValueError: no model, a model that is the float one, a quantized float_model, a model
            without a layer of the float one, or no batch.
    """
    refuse_quantized(float_model)
    inputs = layer_inputs(float_model)
    linears = [name for item in inputs for name in item.linears]
    experts = [item.experts for item in inputs if item.experts]
    _check(float_model, models, batches, linears, experts)
    errors: dict[str, LayerError] = {}
    hooks = {name: _linear_hook(name, models, errors) for name in linears}
    hooks |= {name: _experts_hook(name, models, errors) for name in experts}
    layers = dict.fromkeys(layer for name in hooks if (layer := _layer(name)[0]))
    everything = [*hooks, *layers]
    with ExitStack() as modes:
        for model in (float_model, *models.values()):
            modes.enter_context(evaluating(model))
        for batch in progress_bar(batches, desc="layers", unit="batch", shown=progress):
            with hooked(float_model, hooks, after=True):
                wanted = _hidden_states(float_model, layers, batch, everything)
            found = {k: _hidden_states(m, layers, batch, everything) for k, m in models.items()}
            for name in layers:
                outputs = {key: states[name] for key, states in found.items()}
                error = LayerError(name, _layer(f"{name}.")[1], HIDDEN)
                errors.setdefault(name, error).add(wanted[name], outputs)
    return sorted(
        errors.values(), key=lambda e: (-1 if e.layer is None else e.layer, e.kind == HIDDEN)
    )


def _linear_hook(name: str, models: Mapping[str, nn.Module], errors: dict) -> Callable:
    def hook(module, args, kwargs, y):
        _measure(name, first_argument(args, kwargs), y, models, errors)

    return hook


def _experts_hook(name: str, models: Mapping[str, nn.Module], errors: dict) -> Callable:
    def hook(module, args, kwargs, _):
        for expert, *xs in routed_inputs(module, *expert_arguments(module, args, kwargs)):
            for part, x in zip(PARTS, xs, strict=True):
                y = nn.functional.linear(x, getattr(module, part)[expert])
                _measure(f"{name}.{expert}.{part}", x, y, models, errors)

    return hook


def _measure(name: str, x: Tensor, y: Tensor, models: Mapping[str, nn.Module], errors) -> None:
    """Add the errors of one matrix for some of its inputs."""
    error = LayerError(name, _layer(name)[1], name.rpartition(".")[2])
    outputs = {key: model.get_submodule(name)(x) for key, model in models.items()}
    errors.setdefault(name, error).add(y, outputs)


def by_kind(errors: Sequence[LayerError]) -> list[LayerError]:
    """The same with the experts of a decoder layer taken together, under the name "...*..."."""
    merged: dict[str, LayerError] = {}
    for error in errors:
        # of what comes after the decoder layer's number
        layer, _ = _layer(error.name)
        name = layer + re.sub(r"\.\d+\.", ".*.", error.name[len(layer) :])
        into = merged.setdefault(name, LayerError(name, error.layer, error.kind))
        into.signal += error.signal
        for model, noise in error.noise.items():
            into.noise[model] = into.noise.get(model, 0.0) + noise
    return list(merged.values())


def _layer(name: str) -> tuple[str, int | None]:
    """The name and the number of the decoder layer that something is in: ("", None) for none."""
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else ("", None)


def _hidden_states(
    model: nn.Module, layers: Iterable[str], batch: Tensor, needed: Sequence[str]
) -> dict[str, Tensor]:
    """Run a batch through what holds all modules `needed`; outputs of layers, {name: [B, T, H]}."""
    states: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable:
        def hook(module, args, kwargs, output):
            # cloned: the next layer may add to it in place
            states[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    runner = without_head(model, needed)
    with hooked(model, {name: hook_for(name) for name in layers}, after=True):
        runner(batch.to(next(model.parameters()).device), **no_cache(model))
    return states


def _check(float_model, models, batches, linears, experts) -> None:
    if not models:
        raise ValueError("models must hold at least one model; got none")
    if not batches:
        raise ValueError("batches must hold at least one batch; got none")
    for key, model in models.items():
        if model is float_model:
            raise ValueError(f"models[{key!r}] is the float model itself")
        modules = dict(model.named_modules())
        names = [*linears]
        for name in experts:
            names += expert_names(name, float_model.get_submodule(name))
        missing = [name for name in names if name not in modules]
        if missing:
            raise ValueError(
                f"models[{key!r}] has no module {missing[0]} ({len(missing)} are missing)"
            )
