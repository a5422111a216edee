"""The walk over a model: every linear of a float model becomes a quantized one, in place."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .calibration import calibration_batches, collect_stats, load_stats
from .config import MixedQuantConfig
from .families import ATTENTION_INPUTS, LayerInput, known_inputs, layer_inputs, output_heads
from .linear import (
    QuantizedLinear,
    W4A4Linear,
    is_finite,
    largest_magnitude,
    linear_class,
    refuse_quantized,
    salient_dtype_for,
)
from .moe import PARTS, W4A4Experts
from .pipeline import Group, Ready, model_groups, ready_groups, with_shares
from .sorting import ChannelStats, check_blocks

logger = logging.getLogger("smoothquant")

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEPT_DTYPES = (*WEIGHT_DTYPES, torch.float64)  # of parameters that are looked through for NaN


@dataclass(frozen=True)
class LinearRecord:
    """What became of one weight matrix, or of another parameter.

    name: full name of the module, or of one expert's matrix; of a bias or whatever is no module's
        weight, its own.
    shape: (N, K) of a quantized matrix.
    num_salient: input channels kept in 16 bits inside a quantized matrix.
    bits_per_weight: of all its tensors but the bias.
    action: "quantized" or "kept".
    reason: why it was kept, or what its channels were chosen by.
    """

    name: str
    shape: tuple[int, ...]
    num_salient: int
    bits_per_weight: float
    action: str
    reason: str


@torch.no_grad()
def quantize(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | str | os.PathLike | None = None,
    batches: Sequence[Tensor] | None = None,
    *,
    tokenizer=None,
    progress: bool = True,
) -> list[LinearRecord]:
    """Quantize a float model in place, freeing each float weight as soon as it is packed (those of
    fused experts together, block by block).

    Linears that share an input (q/k/v, gate/up) share one permutation and salient set. Output
    heads and embeddings stay as they are, and so do routers where the table of families knows
    them. An expert without statistics is quantized by those of its weights.

    Args:
        model: a float model (float32, float16 or bfloat16); see `smoothquant.families`.
        config: all choices.
        stats: {name of a linear: statistics of its input}, as `smoothquant.collect_stats` gives
            it, or a file that `smoothquant.load_stats` reads; None takes them from batches, and
            without batches the weights alone choose salient channels and order.
        batches: int64 [B, T] tensors of token ids, without padding, for
            ``weight_rounding="gptq"`` (tens of thousands of tokens), ``act_clip="search"`` and
            ``act_format="auto"`` (thousands). The model runs over them one decoder layer at a time,
            each on what the quantized layers before it give. None, and no stats either: drawn from
            ``config.calibration`` if that is given.
        tokenizer: the model's, for ``config.calibration``.
        progress: show progress bars.

    Returns:
        A record for every parameter, the quantized ones first, as `quantization_report` has them.

    Raises:
        ValueError: a missing or unfit entry of stats, a weight that is not finite, a model that is
            quantized already. TypeError: an argument or weight of a wrong type. CheckpointError: a
            broken file of statistics. Nothing has been changed then.
    """
    if isinstance(stats, (str, os.PathLike)):
        stats = load_stats(stats)
    _check_arguments(model, config, stats)
    if config.calibration is not None and stats is None and batches is None:
        batches = calibration_batches(model, tokenizer, config)
    check_batches(config, batches)
    items = layer_inputs(model)
    check_kept_weights(model, items)
    if stats is None and batches is not None:
        stats = collect_stats(model, batches, progress=progress)
    items, groups = checked_groups(model, config, stats, items)
    for group in groups:
        check_weights(model, group)
    warn_of_missing_stats(config, stats, groups)
    records = []
    total = sum(len(group.names) for group in groups)
    with tqdm(total=total, desc="quantizing", unit="linear", disable=not progress) as bar:
        for record in pack(model, config, ready_groups(model, groups, config, batches)):
            records.append(record)
            bar.update()
    return finish(model, config, items, records)


def pack(
    model: nn.Module, config: MixedQuantConfig, ready: Iterable[Ready]
) -> Iterator[LinearRecord]:
    """Put quantized layers into the model, group after group; yields the record of each matrix."""
    experts: dict[tuple[int, str], QuantizedLinear] = {}
    places = module_places(model)
    for group, plan, own, reason, curvature in ready:
        records = []
        for name in group.names:
            weight, bias = group.matrix(model, name)
            layer = linear_class(own).from_weight(
                weight,
                bias,
                own,
                plan,
                quantize_output=config.quantize_output
                and name.rpartition(".")[2] in ATTENTION_INPUTS,
                curvature=curvature,
            )
            del weight, bias
            if not group.expert:
                replace_module(model, name, layer, places)
            else:
                block, *place = group.expert
                experts[tuple(place)] = layer
                if len(experts) == _num_matrices(model, block):
                    act_fn = model.get_submodule(block).act_fn
                    replace_module(model, block, W4A4Experts(experts, act_fn), places)
                    experts = {}
            records.append(_quantized_record(name, layer, reason))
        del curvature  # before its records have the caller write a layer, or the next is made
        yield from records


def finish(
    model: nn.Module,
    config: MixedQuantConfig,
    items: Sequence[LayerInput],
    records: list[LinearRecord],
) -> list[LinearRecord]:
    """Tell a model that it is quantized, and transformers if it is one of its; all records."""
    model.mixedquant_config = config
    model.mixedquant_report = records + _kept_records(model, items)
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        from .hf import attach

        attach(model)
    return model.mixedquant_report


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a quantized model back into a plain one, in place: in each layer's place a linear of the
    weight that its codes stand for, in the place of W4A4Experts the model's own fused experts.
    Linears are of the class that a transformers model has for them, else nn.Linear.

    Activations are quantized no more (nor is what ``quantize_output`` names). What was folded into
    norms and rows of other layers stays: the model computes what its weights say.

    Args:
        model: quantized, by either backend; one with fused experts must be of transformers.
        dtype: of the weights; None for that of the model's first parameter. float16 and bfloat16
            round them.

    Raises:
        ValueError: the model is not quantized, its experts are of an unknown class, or a weight is
            beyond the dtype's range. TypeError: dtype is none of a model's. Nothing has been
            changed then.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError(f"model must be a quantized one; got {type(model).__name__}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.dtype in WEIGHT_DTYPES), None)
        dtype = dtype or torch.float32
    elif dtype not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, W4A4Experts)}
    originals, places = _float_modules(model), module_places(model)
    unknown = [name for name in blocks if name not in originals]
    if unknown:
        raise ValueError(
            f"{unknown[0]} of {type(model).__name__} has no float module to go back to"
        )
    if dtype == torch.float16:  # what is out of its range is found before anything is changed
        for name, layer in layers.items():
            _float_weight(name, layer, dtype)
    for name, block in blocks.items():
        fused = originals[name]
        for part in PARTS:
            names = [f"{name}.{expert}.{part}" for expert in range(block.num_experts)]
            weights = [_float_weight(each, layers.pop(each), dtype) for each in names]
            setattr(fused, part, nn.Parameter(torch.stack(weights)))
        replace_module(model, name, fused, places)
    while layers:
        name, layer = layers.popitem()
        shape, linear = (layer.out_features, layer.in_features), originals.get(name)
        if not isinstance(linear, nn.Linear) or linear.weight.shape != shape:
            linear = nn.Linear(*reversed(shape), bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(_float_weight(name, layer, dtype))
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
        replace_module(model, name, linear, places)
        del layer
    for name in ("mixedquant_config", "mixedquant_report"):
        vars(model).pop(name, None)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def _float_weight(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    weight = layer.dequantize().to(dtype)
    if not is_finite(weight):
        raise ValueError(f"weight of {name} is beyond the range of {dtype}")
    return weight


def _float_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a transformers model as it was built, without memory; none of another."""
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return {}
    with torch.device("meta"):
        return dict(type(model)(model.config).named_modules())


def quantization_report(model: nn.Module) -> list[LinearRecord]:
    """A record for every parameter of a quantized model, the quantized ones first: what `quantize`
    gave, or of a model that was loaded quantized what can be seen of it."""
    known = getattr(model, "mixedquant_report", None)
    if known is not None:
        return known
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        raise ValueError(f"model must be a quantized one; got {type(model).__name__}")
    quantized = [_quantized_record(name, layer, "as stored") for name, layer in layers]
    return quantized + _kept_records(model, known_inputs(model))


def warn_of_missing_stats(config: MixedQuantConfig, stats, groups: list[Group]) -> None:
    """Log where weights have to choose in the place of statistics."""
    if stats is None:
        logger.warning("no calibration statistics: the weights alone choose salience and order")
    elif config.sort != "none" and any(group.stats and group.stats.mean_only for group in groups):
        logger.warning(
            "statistics hold only a mean per channel: sort=%r is taken from the weights",
            config.sort,
        )
    alone = [g.name for g in groups if g.expert and g.stats is None and stats is not None]
    if alone:
        logger.warning(
            "no statistics of %d expert matrices, %s the first: their weights choose salience and "
            "order",
            len(alone),
            alone[0],
        )


def module_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules but share its tensors, so that layers can be swapped for nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def simulate(model: nn.Module) -> None:
    """Put the simulation of each layer of a packed model, of the same codes and in the model's
    dtype, into its place: the arithmetic alone changes."""
    places = module_places(model)
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, W4A4Linear):
            replace_module(model, name, module.simulated(dtype), places)


def simulated_copy(model: nn.Module) -> nn.Module:
    """A copy of a packed model, simulated; it shares all tensors but those of the layers."""
    copied = module_copy(model)
    simulate(copied)
    return copied


_Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def module_places(model: nn.Module) -> _Places:
    """{module: (its parent, its name there) for every place that the model has it in}."""
    places: _Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(child, []).append((parent, name))
    return places


def replace_module(
    model: nn.Module, name: str, module: nn.Module, places: _Places | None = None
) -> None:
    """Put `module` in the place of a submodule, under every name that the model has for it.

    places: `module_places` of the model, to look for them but once where many are replaced; the
    submodule and what is below it leave it, so that nothing keeps their weights.
    """
    old = model.get_submodule(name)
    module.train(old.training)
    places = module_places(model) if places is None else places
    for parent, key in places.pop(old):
        setattr(parent, key, module)
    below = set(old.modules())
    for child in below & places.keys():
        elsewhere = [place for place in places.pop(child) if place[0] not in below]
        if elsewhere:
            places[child] = elsewhere


def _check_arguments(model, config, stats) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(config, MixedQuantConfig):
        raise TypeError(f"config must be a MixedQuantConfig; got {type(config).__name__}")
    if stats is not None and not isinstance(stats, Mapping):
        raise TypeError(f"stats must be a mapping of names or None; got {type(stats).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError("model must hold nn.Linear modules; W4A4Linear.from_float quantizes one")
    refuse_quantized(model)


def check_batches(config: MixedQuantConfig, batches) -> None:
    """Raise ValueError unless these are the token ids that the config needs."""
    if batches is None and not config.needs_tokens:
        return
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(
            f"{config.needs_tokens or 'stats'} needs batches: a list of [B, T] token ids to "
            f"calibrate on; got {batches!r:.80}"
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
) -> tuple[list[LayerInput], list[Group]]:
    """The model's layer inputs (or items, where they are known) and groups, shapes and statistics
    having been found fit. stats_to_come: where there are none yet, what needs them is no fault."""
    means_only = not stats_to_come
    if stats:
        means_only = any(getattr(entry, "mean_only", False) for entry in stats.values())
    for needed, name in (
        (config.smooth_alpha is not None, "smooth_alpha"),
        (config.salient_allocation == "output", "salient_allocation='output'"),
    ):
        if needed and means_only:
            raise ValueError(f"{name} needs stats that know more than each channel's mean")
    items = layer_inputs(model) if items is None else items
    for item in items:
        for name in item.linears:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise TypeError(f"{name} must be an nn.Linear; got {type(module).__name__}")
    if config.smooth_alpha is not None and not any(item.norm for item in items):
        raise ValueError(
            f"smooth_alpha must be None: no norm of {type(model).__name__} feeds linears only"
        )
    groups = model_groups(model, items, stats)
    for group in groups:
        for name, (weight, _) in zip(group.names, group.matrices(model), strict=True):
            if group.stats is not None:
                _check_stats(name, weight, group)
            check_blocks(weight.shape[1], config.tp_blocks, name)
            if config.sort_within_heads and group.heads and group.heads[0] % config.tp_blocks:
                raise ValueError(
                    f"tp_blocks must divide the {group.heads[0]} heads of {name} with "
                    f"sort_within_heads=True; got {config.tp_blocks}"
                )
    return items, with_shares(model, groups, config)


def check_weights(model: nn.Module, group: Group) -> None:
    """Raise ValueError or TypeError for a weight or bias of a group that cannot be quantized."""
    for name, (weight, bias) in zip(group.names, group.matrices(model), strict=True):
        _check_weight(name, weight, bias)


def check_kept_weights(model: nn.Module, items: Iterable[LayerInput]) -> None:
    """Raise ValueError for NaN or Inf in a parameter that none of these inputs' readers is: what is
    saved with one is not loaded."""
    linears: set[str] = set()
    fused: set[str] = set()
    for item in items:
        linears.update(item.linears)
        fused.update(f"{item.experts}.{part}" for part in PARTS if item.experts)

    def kept(name: str) -> bool:
        return name not in fused and name.rpartition(".")[0] not in linears

    for name, _ in non_finite_parameters(model, kept):
        raise ValueError(f"parameter {name} holds NaN or Inf")


def non_finite_parameters(
    model: nn.Module, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """(name, largest magnitude) of each parameter of a wanted name that holds NaN or Inf. Those
    without memory, or of a dtype that is none of a float model, are not looked at."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if wanted(name) and parameter.dtype in KEPT_DTYPES and not parameter.is_meta:
            largest = largest_magnitude(parameter)
            if not largest.isfinite():
                yield name, largest


def _check_weight(name: str, weight: Tensor, bias: Tensor | None) -> None:
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in WEIGHT_DTYPES or tensor.device.type == "meta":
            raise TypeError(
                f"{what} of {name} must be float32, float16 or bfloat16 with values; "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not is_finite(tensor):
            raise ValueError(f"{what} of {name} holds NaN or Inf")
    stored = salient_dtype_for(weight.dtype)
    if largest_magnitude(weight).to(stored).isinf():
        raise ValueError(f"weight of {name} holds values beyond the range of {stored}")


def _check_stats(name: str, weight: Tensor, group: Group) -> None:
    entry = group.stats
    if not isinstance(entry, ChannelStats):
        raise TypeError(f"stats of {name} must be ChannelStats; got {type(entry).__name__}")
    if entry.num_channels != weight.shape[1]:
        raise ValueError(
            f"stats of {name} must have {weight.shape[1]} channels; got {entry.num_channels}"
        )
    if entry.count == 0 or not entry.is_finite():
        raise ValueError(f"stats of {name} must be finite and of at least one row")


def _num_matrices(model: nn.Module, experts: str) -> int:
    return model.get_submodule(experts).gate_up_proj.shape[0] * len(PARTS)


def _quantized_record(name: str, layer: QuantizedLinear, chosen_by: str) -> LinearRecord:
    shape = (layer.out_features, layer.in_features)
    held = sum(tensor.nbytes for key, tensor in layer.state_dict().items() if key != "bias")
    bits = 8 * held / max(1, shape[0] * shape[1])
    return LinearRecord(name, shape, layer.num_salient, bits, "quantized", chosen_by)


def _kept_records(model: nn.Module, items: Sequence[LayerInput]) -> list[LinearRecord]:
    heads = output_heads(model)
    routers = {item.router for item in items}
    kept = []

    def keep(name: str, tensor: Tensor, reason: str) -> None:
        short, bits = name.removesuffix(".weight"), 8.0 * tensor.element_size()
        kept.append(LinearRecord(short, tuple(tensor.shape), 0, bits, "kept", reason))

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        reason = f"parameter of {type(module).__name__}"
        if leaf == "bias":
            reason = "bias"
        elif isinstance(module, nn.Embedding):
            reason = "embedding"
        elif isinstance(module, nn.Linear):
            reason = "output head" if block in heads else "not in the table of families"
        elif leaf == "weight" and block in routers:
            reason = "router"
        elif parameter.dim() == 3:
            reason = "fused parameter without a row in the table of families"
        keep(name, parameter, reason)
    for block, module in modules.items():
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            keep(f"{block}.bias", module.bias, "bias")
    return kept
