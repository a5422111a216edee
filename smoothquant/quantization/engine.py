"""The steps that quantize a model: check, group, calibrate, pack, finish.

`Plan` implements them. Three callers drive it, each at its own pace: `smoothquant.quantize` (a
model in memory), `smoothquant.convert` (a folder, layer by layer) and the transformers plug-in
(weights as they are loaded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.collect import collect_stats
from ..calibration.tokens import chosen_batches
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..core.progress import progress_bar
from ..layers.experts import W4A4Experts
from ..layers.linear import linear_class
from ..models.families import ATTENTION_INPUTS, layer_inputs
from ..models.kept import kept_modules
from ..models.modules import module_places, replace_module
from ..models.routing import num_experts
from ..models.tables import find_tables
from .checks import (
    check_arguments,
    check_batches,
    check_kept_weights,
    check_modules,
    check_table,
    check_weights,
    checked_groups,
    current_stats,
    reached_inputs,
    warn_of_missing_stats,
    warn_of_tables,
)
from .pipeline import UNREACHED, Group, Ready, model_groups, ready_groups
from .records import (
    LinearRecord,
    QuantizationReport,
    kept_records,
    quantized_record,
    warn_if_mostly_kept,
)
from .tables import pack_table
from .tuning import Tuning, check_state, check_tunable

# (model, batches, output head whose input's statistics are needed or None) -> statistics
Collect = Callable[[nn.Module, Sequence[Tensor], str | None], Mapping[str, ChannelStats]]


class Plan:
    """The quantization of one model.

    Creating a plan checks the arguments and the model and collects statistics, without changing the
    model. `pack` quantizes all groups of linears or some of them. `finish` marks the model as
    quantized.

    Args:
        model: a float model.
        config, stats, batches, tokenizer: as for `smoothquant.quantize`.
        collect: computes statistics from the model and batches; None for `collect_stats`.
        spill: a folder for large tensors (`smoothquant.core.spill`); None keeps them in memory.
        tuning_state: as for `smoothquant.quantize`.
        weights_to_come: the model has no weights yet. Those of a group must be there when it is
            packed, the others at `finish`, which checks them.
        progress: show progress bars.

    Attributes:
        items: the model's layer inputs, in forward order.
        tables: the output head and embeddings to quantize (`models.tables`).
        kept: {linear, experts module or embedding that stays as it is: why}.
        unreached: those of them that stay because no calibration token reached them.
        groups: groups of linears that share a channel plan, in forward order.
        config: the given one, with the field calibration set to what was chosen.
        records: {name of a matrix: its record} for the matrices packed so far.

    Raises:
        ValueError, TypeError: as `smoothquant.quantize`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MixedQuantConfig,
        stats: Mapping[str, ChannelStats] | None = None,
        batches: Sequence[Tensor] | None = None,
        *,
        tokenizer: Any = None,
        collect: Collect | None = None,
        spill: Path | None = None,
        tuning_state: Path | None = None,
        weights_to_come: bool = False,
        progress: bool = False,
    ) -> None:
        check_arguments(model, config, stats)
        stats = current_stats(model, stats)
        batches, config = chosen_batches(model, config, stats, batches, tokenizer)
        check_batches(config, batches)
        if config.tune:
            check_tunable(model, config)
            check_state(tuning_state)
        elif tuning_state is not None:
            raise ValueError("tuning_state needs tune=True (recipe='tuned')")
        self.model, self.config, self.batches = model, config, batches
        self.spill, self.progress = spill, progress
        self.items = layer_inputs(model, config.ignore)
        tables = find_tables(model, config)
        self.tables = tables.quantized
        self.kept = kept_modules(model, config.ignore) | tables.kept
        self._weights_to_come = weights_to_come
        check_modules(model, self.items)
        if not weights_to_come:
            check_kept_weights(model, self.items)
            for table in self.tables:
                check_table(model, table, stats)
        self._checked = batches is not None and not weights_to_come
        if self._checked:  # before calibration, whose error would name a layer after the broken one
            for group in model_groups(model, self.items, None):
                check_weights(model, group)
        if stats is None and batches is not None:
            head = next((table.head for table in self.tables if table.needs_statistics), None)
            if collect is None:
                stats = collect_stats(
                    model, batches, progress=progress, ignore=config.ignore, head=head
                )
            else:
                stats = collect(model, batches, head)
        self.items, unreached = reached_inputs(self.items, stats, config)
        self.unreached: dict[str, str] = {}
        if config.unreached == "keep":
            self.unreached = dict.fromkeys(unreached, UNREACHED)
            self.kept |= self.unreached
        self.groups = checked_groups(model, config, stats, self.items)
        self.records: dict[str, LinearRecord] = {}
        self._head_stats = {
            table.head: stats[table.head]
            for table in self.tables
            if table.head and table.needs_statistics and stats and table.head in stats
        }
        warn_of_missing_stats(config, stats, self.groups, unreached)
        warn_of_tables(self.tables, tables.kept, stats)
        self._tuning: Tuning | None = None
        if config.tune:
            assert batches is not None, "check_batches refuses a config that needs tokens"
            self._tuning = Tuning(model, config, batches, tuning_state, progress)

    @torch.no_grad()
    def pack(self, groups: Sequence[Group] | None = None) -> Iterator[LinearRecord]:
        """Replace the linears of the given groups (default: all) by quantized ones.

        Checks the weights of all these groups before it packs the first one, unless creating the
        plan did. Yields the record of each matrix.
        """
        groups = self.groups if groups is None else groups
        for group in () if self._checked else groups:
            check_weights(self.model, group)
        ready = ready_groups(self.model, groups, self.config, self.batches, self.spill)
        for record in _pack(self.model, self.config, ready):
            self.records[record.name] = record
            yield record

    def pack_all(self) -> None:
        """`pack` every group, with a progress bar."""
        with self.bar() as bar:
            for _ in self.pack():
                bar.update()

    def bar(self) -> Any:
        """A progress bar over all matrices, advanced by those that are packed already."""
        total = sum(len(group.names) for group in self.groups)
        return progress_bar(
            total=total,
            initial=len(self.records),
            desc="quantizing",
            unit="linear",
            shown=self.progress,
        )

    @torch.no_grad()
    def finish(self) -> QuantizationReport:
        """Quantize the output head and the embeddings, tune the model if the config says so, and
        mark it as quantized.

        Returns:
            The records of all parameters: packed matrices in forward order, then the others.
        """
        if self._weights_to_come:
            check_kept_weights(self.model, self.items)
            # Loading may have untied a head that the config ties: its file has two weights.
            tables = find_tables(self.model, self.config)
            self.tables, self.kept = tables.quantized, self.kept | tables.kept
            for table in self.tables:
                check_table(self.model, table, None)
        for table in self.tables:
            record = pack_table(self.model, table, self.config, self._head_stats)
            self.records[record.name] = record
        if self._tuning is not None:
            self._tuning.run(self.model, [group.names for group in self.groups])
        packed = [self.records[name] for group in self.groups for name in group.names]
        packed += [self.records[table.name] for table in self.tables]
        report = QuantizationReport(packed + kept_records(self.model, self.items, self.kept))
        warn_if_mostly_kept(self.model, report)
        model: Any = self.model
        model.mixedquant_config, model.mixedquant_report = self.config, report
        model.mixedquant_unreached = self.unreached
        return report


def _pack(
    model: nn.Module, config: MixedQuantConfig, ready: Iterable[Ready]
) -> Iterator[LinearRecord]:
    """Put quantized layers into the model, group by group; yield the record of each matrix."""
    experts: dict[tuple[int, str], nn.Module] = {}
    places = module_places(model)
    for group, plan, layer_config, reason, curvature in ready:
        records = []
        for name in group.names:
            weight, bias = group.matrix(model, name)
            layer = linear_class(layer_config).from_weight(
                weight,
                bias,
                layer_config,
                plan,
                quantize_output=config.quantize_output
                and name.rpartition(".")[2] in ATTENTION_INPUTS,
                curvature=curvature,
            )
            del weight, bias
            if not group.expert:
                replace_module(model, name, layer, places)
            else:
                block, index, part = group.expert
                experts[index, part] = layer
                fused = model.get_submodule(block)
                if len(experts) == 2 * num_experts(fused):
                    replace_module(model, block, W4A4Experts(experts, fused), places)
                    experts = {}
                del fused
            records.append(quantized_record(name, layer, reason))
        del curvature  # free its memory before the caller writes the layer or the next is made
        yield from records
