"""Checks of the arguments of `smoothquant.quantize`, made before anything changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.stats_files import with_current_names
from ..channels.sorting import check_blocks
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..core.tensors import is_finite, largest_magnitude
from ..layers.linear import refuse_quantized, salient_dtype_for
from ..models.families import LayerInput, layer_inputs, without
from ..models.float8 import SCALE
from ..models.linears import is_linear
from ..models.modules import check_no_adapter
from ..models.tables import Table
from .pipeline import Group, model_groups, with_shares

logger = logging.getLogger("smoothquant")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEPT_DTYPES = (*WEIGHT_DTYPES, torch.float64)  # parameters checked for NaN


def warn_of_missing_stats(
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None,
    groups: Sequence[Group],
    unreached: Sequence[str],
) -> None:
    """Log a warning where modules stay or channels are chosen by the weights for lack of
    statistics."""
    if unreached:
        more = ", ..." if len(unreached) > 8 else ""
        outcome = "which stay as they are"
        if config.unreached == "weights":
            outcome = "whose salience and order come from the weights"
        logger.warning(
            "no calibration token reached %d layers, %s: %s%s",
            len(unreached),
            outcome,
            ", ".join(unreached[:8]),
            more,
        )
    if stats is None:
        logger.warning("no calibration statistics: salience and order come from the weights alone")
    elif config.sort != "none" and any(group.stats and group.stats.mean_only for group in groups):
        logger.warning(
            "statistics have only a mean per channel: sort=%r is computed from the weights",
            config.sort,
        )
    without = [
        g.name
        for g in groups
        if g.expert and g.stats is None and stats is not None and g.expert[0] not in unreached
    ]
    if without:
        logger.warning(
            "no statistics for %d expert matrices (first: %s): their salience and order come from "
            "the weights",
            len(without),
            without[0],
        )


def warn_of_tables(
    tables: Sequence[Table], kept: Mapping[str, str], stats: Mapping[str, ChannelStats] | None
) -> None:
    """Log a warning where an output head or embeddings stay in 16 bits against the config, other
    than by its ``ignore``, or where a head has no statistics."""
    for name, reason in kept.items():
        if "ignore=" not in reason:
            logger.warning("%s stays in 16 bits: %s", name, reason)
    for table in tables:
        if table.needs_statistics and stats is not None and table.head not in stats:
            logger.warning(
                "no statistics for the output head %s: its salience and order come from the "
                "weights",
                table.head,
            )


def check_arguments(model: Any, config: Any, stats: Any) -> None:
    """Raise ValueError or TypeError for arguments that `smoothquant.quantize` does not accept."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(config, MixedQuantConfig):
        raise TypeError(f"config must be a MixedQuantConfig; got {type(config).__name__}")
    if stats is not None and not isinstance(stats, Mapping):
        raise TypeError(
            f"stats must be a mapping of module names or None; got {type(stats).__name__}"
        )
    if is_linear(model):
        raise ValueError(
            "model must contain nn.Linear modules, not be one; use W4A4Linear.from_float"
        )
    check_no_adapter(model)
    check_not_offloaded(model)
    refuse_quantized(model)
    for name, module in model.named_modules():
        if any(leaf.endswith(SCALE) for leaf in (*module._parameters, *module._buffers)):
            raise ValueError(
                f"model must be a float model; {name} has FP8 weights with scales: load it with "
                "quantization_config=FineGrainedFP8Config(dequantize=True)"
            )


def check_not_offloaded(model: Any) -> None:
    """Raise ValueError if a ``device_map`` has moved weights out of the model, whose parameters are
    on meta until their module runs: to the disk or, for a model on a GPU, to the CPU."""
    places = getattr(model, "hf_device_map", None) or {}
    on_meta = [n for n, p in model.named_parameters(remove_duplicate=False) if p.is_meta]
    for block, place in places.items():
        prefix = f"{block}." if block else ""
        if place in ("cpu", "disk") and any(f"{name}.".startswith(prefix) for name in on_meta):
            raise ValueError(
                "device_map must not offload weights while they are quantized, but it has "
                f"{block or 'the whole model'} on {place!r}: quantize with device_map='cpu', save "
                "the quantized model, and load that with the device_map"
            )


def check_batches(config: MixedQuantConfig, batches: Any) -> None:
    """Raise ValueError unless `batches` provides the calibration tokens that the config needs."""
    if batches is None and not config.needs_tokens:
        return
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(
            f"{config.needs_tokens or 'stats'} needs batches of calibration tokens: give "
            f"batches, [B, T] token ids, or MixedQuantConfig(calibration=a file or texts); "
            f"got {batches!r:.80}"
        )
    for index, batch in enumerate(batches):
        fits = isinstance(batch, Tensor) and batch.ndim == 2 and batch.numel() > 0
        if not fits or batch.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"batches[{index}] must be a [B, T] tensor of token ids; got {batch!r:.80}"
            )


def checked_groups(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | None,
    items: list[LayerInput] | None = None,
    *,
    stats_to_come: bool = False,
) -> list[Group]:
    """The groups of a model, with shapes and statistics checked.

    Args:
        items: the model's layer inputs, if the caller has them already.
        stats_to_come: statistics will be collected later, so that it is no error to have none.
    """
    means_only = not stats_to_come
    if stats:
        means_only = any(getattr(entry, "mean_only", False) for entry in stats.values())
    for needed, name in (
        (config.smooth_alpha is not None, "smooth_alpha"),
        (config.salient_allocation == "output", "salient_allocation='output'"),
    ):
        if needed and means_only:
            raise ValueError(f"{name} needs statistics with more than a mean per channel")
    if items is None:
        stats = current_stats(model, stats)
        items, _ = reached_inputs(layer_inputs(model, config.ignore), stats, config)
        check_modules(model, items)
    if config.smooth_alpha is not None and not any(item.norm for item in items):
        raise ValueError(
            f"smooth_alpha must be None: {type(model).__name__} has no norm that feeds only linears"
        )
    groups = model_groups(model, items, stats)
    for group in groups:
        for name, (weight, _) in zip(group.names, group.matrices(model), strict=True):
            if group.stats is not None:
                _check_stats(name, weight, group.stats)
            check_blocks(weight.shape[1], config.tp_blocks, name)
            if config.sort_within_heads and group.heads and group.heads[0] % config.tp_blocks:
                raise ValueError(
                    f"tp_blocks must divide the {group.heads[0]} heads of {name} with "
                    f"sort_within_heads=True; got {config.tp_blocks}"
                )
    return with_shares(model, groups, config)


def current_stats(
    model: nn.Module, stats: Mapping[str, ChannelStats] | None
) -> Mapping[str, ChannelStats] | None:
    """The statistics by names that the model has; see `with_current_names`."""
    return stats and with_current_names(stats, dict(model.named_modules()))


def reached_inputs(
    items: Sequence[LayerInput], stats: Mapping[str, ChannelStats] | None, config: MixedQuantConfig
) -> tuple[list[LayerInput], list[str]]:
    """The inputs to quantize, and the names of the modules that calibration did not reach, which
    are not among them unless the config's ``unreached`` is "weights".

    A module was not reached if its statistics cover no row. The matrices of single experts are not
    looked at: without tokens, they are quantized by their weights.
    """

    def unreached(names: Sequence[str]) -> bool:
        entry = next((stats[name] for name in names if name in stats), None) if stats else None
        return isinstance(entry, ChannelStats) and not entry.count.item()

    names: list[str] = []
    for item in items:
        names += item.linears if unreached(item.linears) else ()
        names += [item.experts] if item.experts and unreached([item.experts]) else []
    return list(items) if config.unreached == "weights" else without(items, names), names


def check_modules(model: nn.Module, items: Iterable[LayerInput]) -> None:
    """Raise TypeError for a module that is no nn.Linear where the table of families says so, and
    ValueError for one with hooks, which its quantized layer would not call."""
    for item in items:
        for name in (*item.linears, *([item.experts] if item.experts else [])):
            module = model.get_submodule(name)
            if name != item.experts and not is_linear(module):
                raise TypeError(f"{name} must be an nn.Linear; got {type(module).__name__}")
            hooks = (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            if any(hooks):
                raise ValueError(
                    f"{name} has hooks, which its quantized layer would not call; remove them, or "
                    "keep the layer with MixedQuantConfig(ignore=...)"
                )


def check_weights(model: nn.Module, group: Group) -> None:
    """Raise ValueError or TypeError if a weight or bias of the group cannot be quantized."""
    for name, (weight, bias) in zip(group.names, group.matrices(model), strict=True):
        _check_weight(name, weight, bias)


def check_table(model: nn.Module, table: Table, stats: Mapping[str, ChannelStats] | None) -> None:
    """Raise ValueError or TypeError if an output head or embeddings cannot be quantized."""
    for name in (table.head, *table.embeddings):
        if name is None:
            continue
        module: Any = model.get_submodule(name)
        _check_weight(name, module.weight, getattr(module, "bias", None))
        if name == table.head and stats and name in stats:
            _check_stats(name, module.weight, stats[name])


def check_kept_weights(model: nn.Module, items: Iterable[LayerInput]) -> None:
    """Raise ValueError for NaN or Inf in a parameter that is not quantized.

    A checkpoint with one could be saved, but not loaded.
    """
    quantized = {name for item in items for name in (*item.linears, item.experts)}

    def kept(name: str) -> bool:
        return name.rpartition(".")[0] not in quantized

    for name, _ in non_finite_parameters(model, kept):
        raise ValueError(f"parameter {name} holds NaN or Inf")


def non_finite_parameters(
    model: nn.Module, selected: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, largest magnitude) of the parameters that contain NaN or Inf.

    Skips parameters on the meta device and those whose dtype is not in `KEPT_DTYPES`.

    Args:
        selected: whether to check the parameter of this name.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if selected(name) and parameter.dtype in KEPT_DTYPES and not parameter.is_meta:
            largest = largest_magnitude(parameter)
            if not largest.isfinite():
                yield name, largest


def _check_weight(name: str, weight: Tensor, bias: Tensor | None) -> None:
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in WEIGHT_DTYPES or tensor.device.type == "meta":
            raise TypeError(
                f"{what} of {name} must be float32, float16 or bfloat16 and not on meta; "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not is_finite(tensor):
            raise ValueError(f"{what} of {name} holds NaN or Inf")
    stored = salient_dtype_for(weight.dtype)
    if largest_magnitude(weight).to(stored).isinf():
        raise ValueError(f"weight of {name} holds values beyond the range of {stored}")


def _check_stats(name: str, weight: Tensor, entry: Any) -> None:
    if not isinstance(entry, ChannelStats):
        raise TypeError(f"stats of {name} must be ChannelStats; got {type(entry).__name__}")
    if entry.num_channels != weight.shape[1]:
        raise ValueError(
            f"stats of {name} must have {weight.shape[1]} channels; got {entry.num_channels}"
        )
    if entry.count == 0 or not entry.is_finite():
        raise ValueError(f"stats of {name} must be finite and cover at least one row")
