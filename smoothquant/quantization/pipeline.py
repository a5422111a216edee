"""Prepare the matrices of a float model for packing, one group at a time in forward order.

The steps: calibrate, smooth, choose channels, resolve searched options, collect Hessians for GPTQ.
The caller packs each group as it comes, so that later layers are calibrated on the outputs of the
quantized layers before them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from ..models.linears import linear_weight
from ..models.routing import DOWN, expert_matrix, expert_names
from .search import ALPHAS, Trial, resolve
from .smoothing import apply_fold, fold_of_input, unshare

logger = logging.getLogger("smoothquant")
UNREACHED = "no calibration token reached it"  # in a record's reason


class Group(NamedTuple):
    """Matrices that read the same rows and share a channel plan: linears, or one expert matrix.

    Attributes:
        item: the layer input that they read.
        names: full names of the matrices.
        stats: statistics of the input, or None.
        expert: (name of the experts module, index of the expert, part) of an expert matrix.
        heads: (number of heads, number of heads of v) if the input is an attention output and they
            are known.
        num_salient: number of salient channels.
        unreached: calibration ran, but no token reached the group, so that stats is None.
    """

    item: LayerInput
    names: tuple[str, ...]
    stats: ChannelStats | None
    expert: tuple[str, int, str] | None = None
    heads: tuple[int, int] | None = None
    num_salient: int = 0
    unreached: bool = False

    @property
    def name(self) -> str:
        """The name of the group's input: that of the first matrix."""
        return self.names[0]

    @property
    def reads_norm(self) -> bool:
        """Whether the group reads the output of item.norm; second matrices of experts do not."""
        return self.item.norm is not None and (not self.expert or self.expert[2] != DOWN)

    def matrices(self, model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [N, K], bias [N] or None) of every matrix."""
        return [self.matrix(model, name) for name in self.names]

    def matrix(self, model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        """(weight [N, K], bias [N] or None) of one matrix.

        Unlike `matrices`, this does not unpack siblings that are quantized already.
        """
        if self.expert:
            experts, index, part = self.expert
            return expert_matrix(model.get_submodule(experts), index, part)
        module: Any = model.get_submodule(name)
        return linear_weight(module), getattr(module, "bias", None)  # embeddings have none

    def weight(self, model: nn.Module) -> Tensor:
        """All weights concatenated along the rows, [sum of N, K]."""
        return torch.cat([weight for weight, _ in self.matrices(model)])


class Ready(NamedTuple):
    """A group with everything needed to pack it.

    Attributes:
        group: the group.
        plan: its channel plan.
        config: the config with searched options replaced by the values found for this group.
        reason: what the channels were chosen by.
        curvature: for GPTQ, else None.
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
    """All groups of a model in forward order, with num_salient still 0.

    Raises:
        ValueError: an entry of `stats` is missing.
    """
    return [group for item in items for group in _groups(model, item, stats)]


def with_shares(model: nn.Module, groups: list[Group], config: MixedQuantConfig) -> list[Group]:
    """The groups with their numbers of salient channels."""
    demands = [_demand(model, group, config) for group in groups]
    shares = share_out(demands, config)
    if config.tp_blocks > 1 and config.salient_allocation == "uniform":
        _warn_of_shares({(d.channels, n) for d, n in zip(demands, shares, strict=True)}, config)
    return [group._replace(num_salient=n) for group, n in zip(groups, shares, strict=True)]


def _warn_of_shares(shares: Iterable[tuple[int, int]], config: MixedQuantConfig) -> None:
    """Warn of numbers of salient channels that whole groups for every part of tensor parallelism
    have moved far from the config's.

    Args:
        shares: (channels, how many of them are salient), of all layer inputs.
    """
    wanted = config.salient_prop
    for channels, salient in shares:
        share = salient / channels
        if (wanted and share > 1.5 * wanted) or (config.bits and not salient):
            logger.warning(
                "tp_blocks=%d makes %.0f %% of %d channels salient, so that every part has "
                "whole groups; a group_size below %d comes closer to %s",
                config.tp_blocks,
                100 * share,
                channels,
                config.group_size,
                f"salient_prop={wanted}" if wanted else f"bits={config.bits}",
            )


def _demand(model: nn.Module, group: Group, config: MixedQuantConfig) -> Demand:
    matrices = [weight for weight, _ in group.matrices(model)]
    score, blocks = None, config.tp_blocks
    # Without weight values or statistics (a dry run), a group gets the average share.
    has_values = group.stats is not None and not matrices[0].is_meta
    if config.salient_allocation == "output" and has_values:
        assert group.stats is not None
        score = (group.stats.sq_sum / group.stats.count) * _weight_stats(matrices).sq_sum
    if config.sort_within_heads and group.heads:
        blocks = group.heads[0]
    rows, channels = tuple(len(w) for w in matrices), matrices[0].shape[1]
    return Demand(rows, channels, score, blocks, config.tp_blocks)


def _weight_stats(matrices: Iterable[Tensor]) -> ChannelStats:
    """Statistics over the rows of all matrices; sq_sum is the squared norms of their columns."""
    stats: ChannelStats | None = None
    for weight in matrices:
        stats = stats or ChannelStats.empty(weight.shape[1])
        stats.update(weight)
    assert stats is not None, "a group has at least one matrix"
    return stats


def ready_groups(
    model: nn.Module,
    groups: Sequence[Group],
    config: MixedQuantConfig,
    batches: Sequence[Tensor] | None,
    spill: Path | None = None,
) -> Iterator[Ready]:
    """Yield every group in forward order, calibrated on the current state of the layers before it.

    Args:
        batches: calibration tokens; required if ``config.needs_tokens``.
        spill: as for `smoothquant.calibration.blocks.blocks`; GPTQ's matrices go there too.
    """
    if not config.needs_tokens:
        for group in _smoothed(model, groups, config, {}):
            plan, reason = channel_plan(group, group.matrices(model), config)
            yield Ready(group, plan, config, reason)
        return
    assert batches is not None
    for block in blocks(model, [group.item.name for group in groups], batches, spill):
        in_block = [group for group in groups if block.holds(group.name)]
        rows: dict[str, Tensor] = {}
        if config.smooth_alpha == "search":
            inputs = _items(group for group in in_block if group.reads_norm)
            rows = sample_rows(block, inputs, [item.name for item in inputs])
        in_block = _smoothed(model, in_block, config, rows)
        # Chunks limit the memory for Hessians, which only GPTQ needs.
        for chunk in _chunks(model, in_block) if config.weight_rounding == "gptq" else [in_block]:
            yield from _calibrated(model, block, chunk, config, spill)


def _items(groups: Iterable[Group]) -> list[LayerInput]:
    """The distinct layer inputs of the groups."""
    return list(dict.fromkeys(group.item for group in groups))


def _smoothed(
    model: nn.Module, groups: Sequence[Group], config: MixedQuantConfig, rows: Mapping[str, Tensor]
) -> list[Group]:
    """Smooth the norms and weights of the model; return the groups with statistics to match.

    Args:
        rows: sample rows of the inputs, for smooth_alpha="search".
    """
    if config.smooth_alpha is None:
        return list(groups)
    modules = dict(model.named_modules())
    factors: dict[LayerInput, Tensor] = {}
    for item in _items(group for group in groups if group.reads_norm):
        readers = [group for group in groups if group.item == item and group.reads_norm]
        maxima = [group.stats.abs_max for group in readers if group.stats is not None]
        if not maxima:
            continue
        largest = torch.stack(maxima).amax(0)
        alpha: float | None = None
        if config.smooth_alpha != "search":
            alpha = float(config.smooth_alpha)
        elif item.name in rows:
            alpha = _best_alpha(model, item, readers, largest, rows[item.name], config)
        if alpha is not None:
            unshare(modules, item)
            fold = fold_of_input(modules, item, largest, alpha)
            apply_fold(fold)
            factors[item] = fold.scales
    return [
        group._replace(stats=group.stats.divided(factors[group.item]))
        if group.reads_norm and group.item in factors and group.stats is not None
        else group
        for group in groups
    ]


def _best_alpha(
    model: nn.Module,
    item: LayerInput,
    readers: Sequence[Group],
    largest: Tensor,
    x: Tensor,
    config: MixedQuantConfig,
) -> float | None:
    """The smoothing strength with the least output error over all readers; None for no smoothing.

    Skips strengths whose factors leave the range of the model's dtype.
    """
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
            plan, _ = channel_plan(group._replace(stats=stats), [(weight * factor, None)], trial)
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
    """Yield groups of one block. All are planned before the first one is packed."""
    inputs = _items(groups)
    rows: dict[str, Tensor] = {}
    if config.searches:
        rows = sample_rows(block, inputs, [group.name for group in groups])
    ready = []
    for group in groups:
        plan, reason = channel_plan(group, group.matrices(model), config)
        resolved = config
        if config.searches:
            x, weight = rows.pop(group.name, None), group.weight(model)
            resolved = resolve(config, x, weight, plan, _never_negative(group.stats))
            del x, weight  # the weight is a copy
        ready.append(Ready(group, plan, resolved, reason))
    if config.weight_rounding != "gptq":
        yield from ready
        return
    choices = {item.group.name: (item.plan, item.config) for item in ready}
    hessians = collect_hessians(block, inputs, choices, spill)
    for item in ready:
        yield _with_curvature(item, hessians.pop(item.group.name, None), spill)


def _never_negative(stats: ChannelStats | None) -> bool:
    """Whether calibration recorded the channels' minima and none is negative."""
    return stats is not None and not stats.mean_only and bool((stats.minimum >= 0).all())


def _with_curvature(item: Ready, hessian: Tensor | None, spill: Path | None) -> Ready:
    """Add the curvature for GPTQ, or fall back to rounding to nearest if there is none."""
    # The Hessian is on the model's device; the CPU's LAPACK factors it in place.
    factor = None if hessian is None else gptq.inverse_factor(hessian.cpu(), gptq.DAMPING, spill)
    if factor is not None:
        k4 = len(factor) - item.plan.num_salient
        return item._replace(curvature=gptq.curvature(factor, k4, spill))
    why = "no token reached it" if hessian is None else "its Hessian is singular"
    logger.warning("%s is rounded to nearest: %s", item.group.name, why)
    return item._replace(reason=f"{item.reason}; rounded to nearest, not by GPTQ: {why}")


def _chunks(model: nn.Module, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Split groups into runs whose Hessians together fit in gptq.HESSIAN_BYTES (at least one)."""
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


def _groups(
    model: nn.Module, item: LayerInput, stats: Mapping[str, ChannelStats] | None
) -> Iterator[Group]:
    if item.linears:
        entry = (
            next((stats[name] for name in item.linears if name in stats), None) if stats else None
        )
        if entry is None and stats is not None:
            raise _missing(item.linears, stats)
        unreached = _covers_nothing(entry)
        yield Group(
            item,
            item.linears,
            None if unreached else entry,
            heads=_heads(model, item),
            unreached=unreached,
        )
    if item.experts:
        names = expert_names(item.experts, model.get_submodule(item.experts))
        # Published statistics cover nn.Linear modules only, not fused experts.
        published = stats and all(getattr(entry, "mean_only", False) for entry in stats.values())
        if stats is not None and not published and not any(name in stats for name in names):
            raise _missing(tuple(names), stats)
        for name, (expert, part) in names.items():
            entry = stats.get(name) if stats is not None else None
            unused = _covers_nothing(entry)
            yield Group(item, (name,), None if unused else entry, (item.experts, expert, part))


def _covers_nothing(entry: object) -> bool:
    return isinstance(entry, ChannelStats) and not entry.count.item()


def _heads(model: nn.Module, item: LayerInput) -> tuple[int, int] | None:
    """(number of heads, number of heads of v) of an attention output, or None."""
    if not item.num_heads:
        return None
    reader, maker = (model.get_submodule(name) for name in (item.linears[0], item.made_by[0]))
    values = value_rows(item, linear_weight(reader).shape[1], len(linear_weight(maker)))
    return None if values is None else (item.num_heads, len(values))


def _missing(names: tuple[str, ...], stats: Mapping[str, Any]) -> ValueError:
    wanted = " or ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    first = ", ".join(map(str, list(stats)[:4])) or "none"
    return ValueError(
        f"stats has no entry for {wanted}; first of its {len(stats)} entries: {first}"
    )


def channel_plan(
    group: Group, matrices: Sequence[tuple[Tensor, Tensor | None]], config: MixedQuantConfig
) -> tuple[ChannelPlan, str]:
    """The group's channel plan, on the weights' device, and what it was chosen by."""
    stats, sort_stats, chosen_by = group.stats, None, "calibration"
    by_weight = config.sort != "none" and (
        config.sort_by == "weight" or (stats is not None and stats.mean_only)
    )
    column_norms: Tensor | None = None
    if stats is None or by_weight or config.salient_metric == "output":
        weight_stats = _weight_stats(weight for weight, _ in matrices)
        if stats is None or by_weight:
            sort_stats, chosen_by = weight_stats, "calibration, order by weights"
        if stats is None:
            stats, chosen_by = weight_stats, "weights"
            if group.unreached:
                chosen_by = f"weights: {UNREACHED}"
            if group.expert:
                chosen_by = "weights: no calibration statistics for this expert"
        if config.salient_metric == "output":
            column_norms = weight_stats.sq_sum
    choices: dict[str, Any] = {
        "num_salient": group.num_salient,
        "salient_metric": config.salient_metric,
        "sort": config.sort,
        "sort_stats": sort_stats,
        "column_norms": column_norms,
    }
    if config.sort_within_heads and group.heads:
        plan = choose_within_heads(stats, *group.heads, **choices)
    else:
        plan = choose_channels(stats, tp_blocks=config.tp_blocks, **choices)
    return plan._replace(perm=plan.perm.to(matrices[0][0].device)), chosen_by
