"""SmoothQuant (Xiao et al., 2022): move activation outliers into the weights.

Each output channel of a norm is divided by s = max|x|^alpha / max|w|^(1 - alpha), and the weights
that read it are multiplied by s. The model's function does not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.stats_files import with_current_names
from ..core.config import check_real
from ..models.families import LayerInput, layer_inputs
from ..models.linears import is_linear, linear_weight
from ..models.routing import DOWN, expert_names, expert_parts, expert_weights

FLOOR = 1e-5


class Fold(NamedTuple):
    """A smoothing step that is ready to apply.

    Attributes:
        norm: the norm.
        gain, bias: its new parameters, already divided by `scales`.
        weights: the weights [..., K] to multiply.
        scales: the factors [K].
    """

    norm: Any
    gain: Tensor
    bias: Tensor | None
    weights: list[Tensor]
    scales: Tensor

    def matrices(self) -> list[Tensor]:
        """The weights as matrices [N, K]."""
        return [weight.flatten(0, -2) for weight in self.weights]


@torch.no_grad()
def smooth_lm(model: nn.Module, scales: Mapping[str, Tensor], alpha: float = 0.5) -> None:
    """Smooth every norm of the model that feeds only linears, in place.

    Args:
        model: a float model of a family in `smoothquant.models.families`.
        scales: {module name: [K]}, the largest magnitude per channel of the linears' inputs, from
            `smoothquant.calibration.get_act_scales`. Linears that share an input use the first
            entry among them. A mixture of experts uses the entry of its router, or else the maximum
            over its experts' entries. Experts may have the names of transformers 4, as in published
            scales. A weight that several layers share becomes one weight for each of them, because
            their norms have different factors.
        alpha: smoothing strength in [0, 1]: how much of the activations' range moves into the
            weights.

    Raises:
        ValueError: an entry is missing or has the wrong shape, a scale is negative or not finite,
            or the model has no norm to smooth. The model is unchanged.
        TypeError: an entry is not a tensor, or an argument has the wrong type. The model is
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales must map module names; got {type(scales).__name__}")
    modules = dict(model.named_modules())
    scales = with_current_names(scales, modules)
    folds = [
        (item, fold_of_input(modules, item, _act_scales(scales, item, modules), alpha))
        for item in layer_inputs(model)
        if item.norm is not None
    ]
    if not folds:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"model of type {kind!r} has no norm that feeds only linears")
    uses = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    shared = {use for use, count in uses.items() if count > 1}
    for item, fold in folds:
        unshare(modules, item, shared)
        apply_fold(fold._replace(weights=_weights(modules, item)))


@torch.no_grad()
def smooth_ln_fcs(
    ln: nn.Module, fcs: nn.Linear | Sequence[nn.Linear], act_scales: Tensor, alpha: float = 0.5
) -> None:
    """Smooth one LayerNorm and the linears that read it, in place.

    Args:
        ln: a module with ``weight [K]`` and optionally ``bias [K]``.
        fcs: one or more nn.Linear with K input features.
        act_scales: [K], largest magnitude of each output channel of the norm.
        alpha: smoothing strength in [0, 1].

    Raises:
        ValueError, TypeError: the arguments do not fit together. Nothing is changed.
    """
    fcs = [fcs] if isinstance(fcs, nn.Module) else list(fcs)
    for fc in fcs:
        if not is_linear(fc):
            raise TypeError(f"fcs must be nn.Linear; got {type(fc).__name__}")
    apply_fold(_fold(ln, [linear_weight(fc) for fc in fcs], act_scales, alpha))


@torch.no_grad()
def smooth_ln_fcs_llama_like(
    ln: nn.Module, fcs: nn.Linear | Sequence[nn.Linear], act_scales: Tensor, alpha: float = 0.5
) -> None:
    """`smooth_ln_fcs` for an RMSNorm, which has no bias."""
    if getattr(ln, "bias", None) is not None:
        raise ValueError(f"ln must have no bias; got {type(ln).__name__} (use smooth_ln_fcs)")
    smooth_ln_fcs(ln, fcs, act_scales, alpha)


def _fold(
    norm: Any,
    weights: list[Tensor],
    act_scales: Tensor,
    alpha: float,
    offset: float = 0.0,
    name: str = "act_scales",
) -> Fold:
    check_real("alpha", alpha, 0.0, 1.0)
    if not isinstance(act_scales, Tensor):
        raise TypeError(f"scales of {name} must be a tensor; got {type(act_scales).__name__}")
    if getattr(norm, "weight", None) is None:
        raise ValueError(f"the norm of {name}, a {type(norm).__name__}, has no weight to divide")
    if not weights:
        raise ValueError("fcs must contain at least one linear; got none")
    k = norm.weight.numel()
    shapes = [tuple(act_scales.shape)] + [tuple(weight.shape[-1:]) for weight in weights]
    if any(shape != (k,) for shape in shapes):
        raise ValueError(f"{name}: the norm has {k} channels, but scales and weights have {shapes}")
    if not (torch.isfinite(act_scales).all() and (act_scales >= 0).all()):
        raise ValueError(f"scales of {name} must be finite and not negative")
    device, dtype = weights[0].device, weights[0].dtype
    act_scales = act_scales.to(device=device, dtype=dtype)
    largest = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in weights]).amax(0)
    scales = act_scales.pow(alpha) / largest.clamp(min=FLOOR).pow(1 - alpha)
    scales = scales.clamp(min=FLOOR).to(norm.weight.device)
    gain = norm.weight / scales
    if offset:
        gain = ((norm.weight.double() + offset) / scales.double() - offset).to(norm.weight.dtype)
    bias = None if getattr(norm, "bias", None) is None else norm.bias / scales
    results = (scales, gain, bias, largest * scales.to(device))
    if not all(torch.isfinite(t).all() for t in results if t is not None):
        raise ValueError(f"{name}: smoothing factors leave the range of {gain.dtype}")
    return Fold(norm, gain, bias, weights, scales)


def fold_of_input(
    modules: Mapping[str, nn.Module], item: LayerInput, act_scales: Tensor, alpha: float
) -> Fold:
    """The smoothing step for a layer input produced by a norm. Changes nothing yet.

    Args:
        modules: {full name: module} for all modules of the model.
        item: a layer input with a norm.
        act_scales: [K], largest magnitude of each channel.
        alpha: smoothing strength in [0, 1].
    """
    assert item.norm is not None
    weights = _weights(modules, item)
    return _fold(modules[item.norm], weights, act_scales, alpha, item.norm_offset, item.name)


def apply_fold(fold: Fold) -> None:
    """Divide the norm and multiply the weights, in place; a weight of two linears only once."""
    fold.norm.weight.copy_(fold.gain)
    if fold.bias is not None:
        fold.norm.bias.copy_(fold.bias)
    for weight in {weight.data_ptr(): weight for weight in fold.weights}.values():
        weight.mul_(fold.scales.to(weight.device))


def unshare(
    modules: Mapping[str, nn.Module], item: LayerInput, only: Collection[int] | None = None
) -> None:
    """Give the norm and the readers of an input fresh parameters.

    Otherwise, other modules and copies of the model that share these tensors would be smoothed too.

    Args:
        only: addresses of the parameters to replace; None replaces all.
    """
    readers = [*item.linears, item.experts, item.router]
    for module in (modules[name] for name in (item.norm, *readers) if name):
        for name, parameter in module.named_parameters(recurse=False):
            if only is None or parameter.data_ptr() in only:
                fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, fresh)


def _weights(modules: Mapping[str, nn.Module], item: LayerInput) -> list[Tensor]:
    weights: list[Tensor] = []
    for name in item.linears:
        module = modules[name]
        if not is_linear(module):
            raise TypeError(f"{name} must be an nn.Linear; got {type(module).__name__}")
        weights.append(linear_weight(module))
    if item.router:
        weights.append(modules[item.router].get_parameter("weight"))
    if item.experts:
        experts = modules[item.experts]
        weights.append(expert_weights(experts, expert_parts(experts)[0]))
    return weights


def _act_scales(
    scales: Mapping[str, Tensor], item: LayerInput, modules: Mapping[str, nn.Module]
) -> Tensor:
    names = item.linears + ((item.router,) if item.router else ())
    for name in names:
        if name in scales:
            return scales[name]
    if item.experts:
        # Every token reaches some expert, so the maximum over experts is that of the input.
        experts = expert_names(item.experts, modules[item.experts])
        names += tuple(name for name, (_, part) in experts.items() if part != DOWN)
        entries = [scales[name] for name in names if name in scales]
        if entries:
            return torch.stack(entries).amax(0)
    raise ValueError(
        f"scales has no entry for {' or '.join(names)}; first of its {len(scales)} entries: "
        f"{next(iter(scales), None)!r}"
    )
