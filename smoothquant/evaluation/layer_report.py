"""Per-layer errors: where the error of a quantized model comes from.

Every linear of a quantized model is run on the float model's inputs, so that its error does not
include errors of earlier layers. The hidden states after each decoder layer, for which each model
runs on its own, show how the errors add up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..core.progress import progress_bar
from ..layers.linear import refuse_quantized
from ..models.families import layer_inputs
from ..models.routing import (
    expert_arguments,
    expert_matrix,
    expert_names,
    expert_parts,
    num_experts,
    routed_inputs,
)
from ..models.running import evaluating, first_argument, hooked, run_tokens, without_head

HIDDEN = "hidden"
_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.")  # name and number of a module's decoder layer


@dataclass
class LayerError:
    """The error of one layer output in each of several quantized models.

    Attributes:
        name: full name of a linear, an expert matrix or a decoder layer.
        layer: number of the decoder layer; None if it is outside all of them.
        kind: last part of the name ("q_proj"), or "hidden" for the output of a decoder layer.
        signal: sum of y^2 over all tokens and channels, where y is the float model's output.
        noise: {model: sum of (y - output of the model)^2}, and for every pair of models
            {"a - b": sum of (output of a - output of b)^2}.
    """

    name: str
    layer: int | None
    kind: str
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, y: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add tokens: the float model's output y and each model's output, all of one shape."""
        self.signal += _energy(y)
        for model, output in outputs.items():
            self._add_noise(model, y, output)
        for one, other in combinations(outputs, 2):
            self._add_noise(f"{one} - {other}", outputs[one], outputs[other])

    def _add_noise(self, name: str, y: Tensor, other: Tensor) -> None:
        self.noise[name] = self.noise.get(name, 0.0) + _energy(y.float() - other.float())

    @property
    def decibels(self) -> dict[str, float]:
        """Signal-to-noise ratios, 10 log10(signal / noise); higher is better.

        Inf for equal outputs; NaN if all outputs are 0 or one contains NaN.
        """
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
    """Measure every layer of quantized models against the float model they were made from.

    Sums are accumulated batch by batch. The only activations kept are the outputs of the decoder
    layers for the current batch.

    Args:
        float_model: a float model that `families.layer_inputs` supports.
        models: {any name: a model with a module for each linear of the float model}, for example
            {"int4": ..., "fake": ...}.
        batches: int64 [B, T] tensors of token ids, without padding.
        progress: show a progress bar.

    Returns:
        The errors by decoder layer: those of its matrices, then that of its hidden states. An
        expert that no token was routed to has no entry.

    Raises:
        ValueError: there is no model or no batch, `float_model` is quantized or among `models`, or
            a model lacks a layer of the float model.
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
                expected = _hidden_states(float_model, layers, batch, everything)
            hidden = {k: _hidden_states(m, layers, batch, everything) for k, m in models.items()}
            for name in layers:
                outputs = {key: states[name] for key, states in hidden.items()}
                error = LayerError(name, _layer(f"{name}.")[1], HIDDEN)
                errors.setdefault(name, error).add(expected[name], outputs)
    return sorted(
        errors.values(), key=lambda e: (-1 if e.layer is None else e.layer, e.kind == HIDDEN)
    )


def _linear_hook(
    name: str, models: Mapping[str, nn.Module], errors: dict[str, LayerError]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        _measure(name, first_argument(args, kwargs), y, models, errors)

    return hook


def _experts_hook(
    name: str, models: Mapping[str, nn.Module], errors: dict[str, LayerError]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], _: Tensor) -> None:
        x, top_k_index, _ = expert_arguments(num_experts(module), args, kwargs)
        for expert, *xs in routed_inputs(module, x, top_k_index):
            for part, x in zip(expert_parts(module), xs, strict=True):
                y = nn.functional.linear(x, *expert_matrix(module, expert, part))
                _measure(f"{name}.{expert}.{part}", x, y, models, errors)

    return hook


def _measure(
    name: str,
    x: Tensor,
    y: Tensor,
    models: Mapping[str, nn.Module],
    errors: dict[str, LayerError],
) -> None:
    """Add the errors of one matrix on inputs x, where y is the float output."""
    error = LayerError(name, _layer(name)[1], name.rpartition(".")[2])
    outputs = {key: model.get_submodule(name)(x) for key, model in models.items()}
    errors.setdefault(name, error).add(y, outputs)


def by_kind(errors: Sequence[LayerError]) -> list[LayerError]:
    """Merge the errors of all experts of a decoder layer, under a name with "*" for the expert."""
    merged: dict[str, LayerError] = {}
    for error in errors:
        # Replace numbers only after the decoder layer's own number.
        layer, _ = _layer(error.name)
        name = layer + re.sub(r"\.\d+\.", ".*.", error.name[len(layer) :])
        total = merged.setdefault(name, LayerError(name, error.layer, error.kind))
        total.signal += error.signal
        for model, noise in error.noise.items():
            total.noise[model] = total.noise.get(model, 0.0) + noise
    return list(merged.values())


def _layer(name: str) -> tuple[str, int | None]:
    """Name and number of the decoder layer that a module is in; ("", None) outside of all."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else ("", None)


def _hidden_states(
    model: nn.Module, layers: Iterable[str], batch: Tensor, needed: Sequence[str]
) -> dict[str, Tensor]:
    """Run a batch through the model, as far as `needed`, and record the outputs of `layers`.

    Returns:
        {name of a decoder layer: [B, T, H]}.
    """
    states: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            # Cloned because the next layer may add to it in place.
            states[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    runner = without_head(model, needed)
    with hooked(model, {name: hook_for(name) for name in layers}, after=True):
        run_tokens(runner, batch.to(next(model.parameters()).device))
    return states


def _check(
    float_model: nn.Module,
    models: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    linears: Sequence[str],
    experts: Sequence[str],
) -> None:
    if not models:
        raise ValueError("models must contain at least one model; got none")
    if not batches:
        raise ValueError("batches must contain at least one batch; got none")
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
