"""From a float model to matrices that are ready to be packed, one after the other in forward order.

calibrate -> smooth -> choose the channels -> settle what is left to trial -> Hessian for GPTQ.
`smoothquant.quantize` packs what comes out and puts it into the model, so that later layers are
calibrated on what the quantized layers before them give.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.blocks import Block, blocks
from ..calibration.hessian import collect_hessians, sample_rows
from ..channels.budget import Demand, share_out
from ..channels.sorting import ChannelPlan, choose_channels, choose_within_heads
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..layers import gptq
from ..models.families import LayerInput, value_rows
from ..models.routing import PARTS, expert_names
from .search import ALPHAS, Trial, resolve
from .smoothing import apply_fold, fold_of_input

logger = logging.getLogger("smoothquant")


class Group(NamedTuple):
    """Matrices that read the same rows and so share a plan: linears, or one matrix of an expert.

    item: the layer input they belong to. expert: (experts module, index, part). heads: (heads,
    heads of v) of an output of attention, where they are known. num_salient: K_s of each.
    """

    item: LayerInput
    names: tuple[str, ...]
    stats: ChannelStats | None
    expert: tuple[str, int, str] | None = None
    heads: tuple[int, int] | None = None
    num_salient: int = 0

    @property
    def name(self) -> str:
        """What the group's input is called by."""
        return self.names[0]

    @property
    def reads_norm(self) -> bool:
        """Whether it reads what item.norm makes: of an expert's matrices only the first does."""
        return self.item.norm is not None and (not self.expert or self.expert[2] == PARTS[0])

    def matrices(self, model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [N, K], bias [N] or None) of each."""
        return [self.matrix(model, name) for name in self.names]

    def matrix(self, model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        """That of one name alone: a quantized sibling would be unpacked for its weight."""
        if self.expert:
            experts, index, part = self.expert
            return getattr(model.get_submodule(experts), part)[index], None
        module = model.get_submodule(name)
        return module.weight, module.bias

    def weight(self, model: nn.Module) -> Tensor:
        """All weights below each other, [N of all, K]."""
        return torch.cat([weight for weight, _ in self.matrices(model)])


class Ready(NamedTuple):
    """A group with all that is needed to pack it.

    config: the layer's own, with numbers in all fields. reason: what its channels were chosen by.
    curvature: for GPTQ, or None.
    """

    group: Group
    plan: ChannelPlan
    config: MixedQuantConfig
    reason: str
    curvature: gptq.Curvature | None = None


def model_groups(
    model: nn.Module,
    items: Sequence[LayerInput],
    stats: Mapping[str, ChannelStats] | None,
) -> list[Group]:
    """All groups of a model in forward order, without salient channels yet.

    Raises ValueError for a missing entry of stats.
    """
    return [group for item in items for group in _groups(model, item, stats)]


def with_shares(model: nn.Module, groups: list[Group], config: MixedQuantConfig) -> list[Group]:
    """The groups with the salient channels shared out among them."""
    shares = share_out([_demand(model, group, config) for group in groups], config)
    return [group._replace(num_salient=n) for group, n in zip(groups, shares, strict=True)]


def _demand(model: nn.Module, group: Group, config: MixedQuantConfig) -> Demand:
    matrices = [weight for weight, _ in group.matrices(model)]
    score, blocks = None, config.tp_blocks
    # what is only planned, without values or statistics, takes the average share
    known = group.stats is not None and not matrices[0].is_meta
    if config.salient_allocation == "output" and known:
        score = (group.stats.sq_sum / group.stats.count) * _weight_stats(matrices).sq_sum
    if config.sort_within_heads and group.heads:
        blocks = group.heads[0]
    return Demand(tuple(len(w) for w in matrices), matrices[0].shape[1], score, blocks)


def _weight_stats(matrices: Iterable[Tensor]) -> ChannelStats:
    """Statistics of the rows of all matrices that read an input; sq_sum is its column norms."""
    stats = None
    for weight in matrices:
        stats = stats or ChannelStats.empty(weight.shape[1])
        stats.update(weight)
    return stats


def ready_groups(
    model: nn.Module,
    groups: list[Group],
    config: MixedQuantConfig,
    batches,
    spill: Path | None = None,
) -> Iterator[Ready]:
    """Every group in forward order, calibrated on the layers before it as they are by then.

    spill: as for `smoothquant.calibration.blocks.blocks`; GPTQ's matrices go there, too.
    """
    if not config.needs_tokens:
        for group in _smoothed(model, groups, config, {}):
            plan, reason = _plan(group, group.matrices(model), config)
            yield Ready(group, plan, config, reason)
        return
    for block in blocks(model, [group.item.name for group in groups], batches, spill):
        inside = [group for group in groups if block.holds(group.name)]
        rows = {}
        if config.smooth_alpha == "search":
            inputs = _items(group for group in inside if group.reads_norm)
            rows = sample_rows(block, inputs, [item.name for item in inputs])
        inside = _smoothed(model, inside, config, rows)
        # without Hessians nothing needs room
        for chunk in _chunks(model, inside) if config.weight_rounding == "gptq" else [inside]:
            yield from _calibrated(model, block, chunk, config, spill)


def _items(groups: Iterable[Group]) -> list[LayerInput]:
    """Their layer inputs, each once."""
    return list(dict.fromkeys(group.item for group in groups))


def _smoothed(
    model: nn.Module, groups: list[Group], config: MixedQuantConfig, rows: Mapping[str, Tensor]
) -> list[Group]:
    """The groups with the statistics of smoothed inputs, the model's norms and weights having been
    smoothed. rows: of the inputs, for smooth_alpha="search"."""
    if config.smooth_alpha is None:
        return groups
    modules = dict(model.named_modules())
    factors: dict[LayerInput, Tensor] = {}
    for item in _items(group for group in groups if group.reads_norm):
        readers = [group for group in groups if group.item == item and group.reads_norm]
        seen = [group.stats.abs_max for group in readers if group.stats is not None]
        if not seen:
            continue
        largest = torch.stack(seen).amax(0)
        alpha = config.smooth_alpha
        if alpha == "search":
            x = rows.get(item.name)
            alpha = None if x is None else _best_alpha(model, item, readers, largest, x, config)
        if alpha is not None:
            _unshare(modules, item)
            fold = fold_of_input(modules, item, largest, alpha)
            apply_fold(fold)
            factors[item] = fold.scales
    return [
        group._replace(stats=group.stats.divided(factors[group.item]))
        if group.reads_norm and group.item in factors and group.stats is not None
        else group
        for group in groups
    ]


def _unshare(modules: Mapping[str, nn.Module], item: LayerInput) -> None:
    """Give the norm and the readers of an input parameters of their own: a copy of the model that
    shares its tensors with this one must not be smoothed along."""
    readers = [*item.linears, item.experts, item.router]
    for module in (modules[name] for name in (item.norm, *readers) if name):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def _best_alpha(
    model: nn.Module,
    item: LayerInput,
    readers: Sequence[Group],
    largest: Tensor,
    x: Tensor,
    config: MixedQuantConfig,
) -> float | None:
    """The strength of smoothing of least output error, summed over the readers; None for no
    smoothing. A strength that leaves the range of the model's dtype is none to take."""
    modules = dict(model.named_modules())
    trial = dataclasses.replace(config.settled(), weight_rounding="nearest")

    def error(alpha: float | None) -> float:
        factor = torch.ones(x.shape[1])
        if alpha is not None:
            try:
                factor = fold_of_input(modules, item, largest, alpha).scales.float()
            except ValueError:
                return float("inf")
        total = 0.0
        for group in readers:
            weight = group.weight(model).float()
            stats = group.stats and group.stats.divided(factor)
            plan, _ = _plan(group._replace(stats=stats), [(weight * factor, None)], trial)
            total += Trial(x / factor, weight * factor, x @ weight.T, plan).error(trial)
        return total

    return min((None, *ALPHAS), key=error)


def _calibrated(
    model: nn.Module,
    block: Block,
    groups: list[Group],
    config: MixedQuantConfig,
    spill: Path | None,
) -> Iterator[Ready]:
    """Groups of one block, all planned before the first is packed."""
    inputs = _items(groups)
    rows = {}
    if config.searches:
        rows = sample_rows(block, inputs, [group.name for group in groups])
    ready = []
    for group in groups:
        plan, reason = _plan(group, group.matrices(model), config)
        own = config
        if config.searches:
            sample = rows.pop(group.name, None), group.weight(model)
            own = resolve(config, *sample, plan, _never_negative(group.stats))
            del sample  # a copy of the weights
        ready.append(Ready(group, plan, own, reason))
    if config.weight_rounding == "gptq":
        choices = {item.group.name: (item.plan, item.config) for item in ready}
        hessians = collect_hessians(block, inputs, choices, spill)
        ready = (
            _with_curvature(item, hessians.pop(item.group.name, None), spill) for item in ready
        )
    yield from ready


def _never_negative(stats: ChannelStats | None) -> bool:
    """Whether calibration has seen the channels' minima, none of them negative."""
    return stats is not None and not stats.mean_only and bool((stats.minimum >= 0).all())


def _with_curvature(item: Ready, hessian: Tensor | None, spill: Path | None) -> Ready:
    """The group with what GPTQ needs, or rounded to nearest where there is none."""
    # summed up where the model is; the CPU's LAPACK works in place
    factor = None if hessian is None else gptq.inverse_factor(hessian.cpu(), gptq.DAMPING, spill)
    if factor is not None:
        k4 = len(factor) - item.plan.num_salient
        return item._replace(curvature=gptq.curvature(factor, k4, spill))
    why = "no token reached it" if hessian is None else "no damping helped"
    logger.warning("%s is rounded to nearest: %s", item.group.name, why)
    return item._replace(reason=f"{item.reason}; rounded to nearest, not by GPTQ: {why}")


def _chunks(model, groups: list[Group]) -> Iterator[list[Group]]:
    """Consecutive groups whose Hessians fit in gptq.HESSIAN_BYTES together, at least one."""
    chunk: list[Group] = []
    left = gptq.HESSIAN_BYTES
    for group in groups:
        needed = 4 * group.matrices(model)[0][0].shape[1] ** 2
        if chunk and needed > left:
            yield chunk
            chunk, left = [], gptq.HESSIAN_BYTES
        chunk.append(group)
        left -= needed
    if chunk:
        yield chunk


def _groups(model: nn.Module, item: LayerInput, stats) -> Iterator[Group]:
    if item.linears:
        entry = (
            next((stats[name] for name in item.linears if name in stats), None) if stats else None
        )
        if entry is None and stats is not None:
            raise _missing(item.linears, stats)
        yield Group(item, item.linears, entry, heads=_heads(model, item))
    if item.experts:
        names = expert_names(item.experts, model.get_submodule(item.experts))
        # published statistics are of nn.Linear modules only, which fused experts are not
        published = stats and all(getattr(entry, "mean_only", False) for entry in stats.values())
        if stats is not None and not published and not any(name in stats for name in names):
            raise _missing(tuple(names), stats)
        for name, (expert, part) in names.items():
            entry = stats.get(name) if stats is not None else None
            seen = not isinstance(entry, ChannelStats) or entry.count > 0
            yield Group(item, (name,), entry if seen else None, (item.experts, expert, part))


def _heads(model: nn.Module, item: LayerInput) -> tuple[int, int] | None:
    """(heads, heads of v) of an output of attention, or None."""
    if not item.num_heads:
        return None
    reader, maker = (model.get_submodule(names[0]) for names in (item.linears, item.made_by))
    values = value_rows(item, reader.in_features, maker.out_features)
    return None if values is None else (item.num_heads, len(values))


def _missing(names: tuple[str, ...], stats: Mapping) -> ValueError:
    wanted = " or ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    present = ", ".join(map(str, list(stats)[:4])) or "nothing"
    return ValueError(f"stats has no entry for {wanted}; its {len(stats)} entries begin: {present}")


def _plan(group: Group, matrices, config: MixedQuantConfig) -> tuple[ChannelPlan, str]:
    """The group's plan, on the weights' device, and what it was chosen by."""
    stats, sort_stats, chosen_by = group.stats, None, "calibration"
    by_weight = config.sort != "none" and (
        config.sort_by == "weight" or (stats is not None and stats.mean_only)
    )
    of_weights = None
    if stats is None or by_weight or config.salient_metric == "output":
        of_weights = _weight_stats(weight for weight, _ in matrices)
    if stats is None or by_weight:
        sort_stats, chosen_by = of_weights, "calibration, order by weights"
    if stats is None:
        stats, chosen_by = of_weights, "weights"
        if group.expert:
            chosen_by = "weights: no calibration statistics of this expert"
    choices = {
        "num_salient": group.num_salient,
        "salient_metric": config.salient_metric,
        "sort": config.sort,
        "sort_stats": sort_stats,
        "column_norms": of_weights.sq_sum if config.salient_metric == "output" else None,
    }
    if config.sort_within_heads and group.heads:
        plan = choose_within_heads(stats, *group.heads, **choices)
    else:
        plan = choose_channels(stats, tp_blocks=config.tp_blocks, **choices)
    return plan._replace(perm=plan.perm.to(matrices[0][0].device)), chosen_by
