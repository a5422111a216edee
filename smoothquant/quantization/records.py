"""Records of what quantization did to each parameter of a model."""

from __future__ import annotations

import dataclasses
import html
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.version import install_command
from ..layers.linear import QuantizedLinear
from ..models.families import LayerInput, known_inputs
from ..models.kept import kept_modules
from ..models.linears import is_linear
from ..models.tables import find_tables

logger = logging.getLogger("smoothquant")
SHOWN_REASONS, SHOWN_ROWS = 4, 60  # in a report's repr, and in its table in notebooks
EMBEDDING = "embedding"  # the reason of an embedding that stays, or the beginning of it


@dataclass(frozen=True)
class LinearRecord:
    """What quantization did to one weight matrix or other parameter.

    Attributes:
        name: full name of the module or expert matrix; for a parameter that is not a module's
            ``weight``, such as a bias, the name of the parameter.
        shape: (N, K) of a quantized matrix, else the parameter's shape.
        num_salient: salient input channels of a quantized matrix, which are not rounded to 4 bits.
        bits_per_weight: bits of all its tensors except the bias, per weight.
        action: "quantized" or "kept".
        reason: why it was kept, or what its channels were chosen by.
    """

    name: str
    shape: tuple[int, ...]
    num_salient: int
    bits_per_weight: float
    action: str
    reason: str


class QuantizationReport(list[LinearRecord]):
    """The records of all parameters of a model, the quantized ones first: a list that prints as a
    summary, and that notebooks show as a table."""

    @property
    def quantized(self) -> list[LinearRecord]:
        """The records of the quantized matrices."""
        return [record for record in self if record.action == "quantized"]

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of a quantized weight, scales and permutations included; NaN if there is
        none."""
        weights = sum(math.prod(record.shape) for record in self.quantized)
        bits = sum(math.prod(record.shape) * record.bits_per_weight for record in self.quantized)
        return bits / weights if weights else math.nan

    def to_pandas(self) -> Any:
        """The records as a pandas DataFrame, with a column for each attribute of `LinearRecord`.

        Raises:
            RuntimeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise RuntimeError(
                f"to_pandas needs pandas, which is not installed ({error}): "
                f"{install_command('experiments')}"
            ) from error
        names = [field.name for field in dataclasses.fields(LinearRecord)]
        return pandas.DataFrame([dataclasses.asdict(record) for record in self], columns=names)

    def __repr__(self) -> str:
        weights = sum(math.prod(record.shape) for record in self.quantized)
        kept = Counter(record.reason for record in self if record.action != "quantized")
        reasons = [f"{reason} ({count})" for reason, count in kept.most_common(SHOWN_REASONS)]
        more = len(kept) - len(reasons)
        reasons += [f"{more} more reasons"] if more > 0 else []
        return (
            f"QuantizationReport of {len(self)} parameters\n"
            f"  quantized: {len(self.quantized)} matrices with {weights:,} weights"
            f"{f' at {self.bits_per_weight:.3f} bits' if weights else ''}\n"
            f"  kept: {len(self) - len(self.quantized)}: {', '.join(reasons) or 'nothing'}"
        )

    def _repr_html_(self) -> str:
        head = ("name", "shape", "action", "bits", "salient", "reason")
        rows = [
            (
                record.name,
                " x ".join(map(str, record.shape)),
                record.action,
                f"{record.bits_per_weight:.3f}",
                str(record.num_salient),
                record.reason,
            )
            for record in self[:SHOWN_ROWS]
        ]
        more = len(self) - len(rows)
        lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
        rest = f"<p>and {more:,} more: to_pandas() has all</p>" if more else ""
        return f"<pre>{html.escape(repr(self))}</pre><table>{''.join(lines)}</table>{rest}"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def quantization_report(model: nn.Module) -> QuantizationReport:
    """A record for every parameter of a quantized model, the quantized ones first.

    These are the records that `quantize` returned. For a model that was loaded quantized, they are
    reconstructed, with "as stored" as the reason of quantized matrices.

    Raises:
        ValueError: the model is not quantized.
    """
    known = getattr(model, "mixedquant_report", None)
    if known is not None:
        return known
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        raise ValueError(f"model must be quantized; got {type(model).__name__}")
    quantized = [quantized_record(name, layer, "as stored") for name, layer in layers]
    config: Any = getattr(model, "mixedquant_config", None)
    kept = kept_modules(model, config.ignore if config else ())
    kept |= find_tables(model, config).kept if config else {}
    kept |= getattr(model, "mixedquant_unreached", {})
    return QuantizationReport(quantized + kept_records(model, known_inputs(model), kept))


class WeightCounts(NamedTuple):
    """How many weights of a model are quantized, stay as they are, and belong to embeddings.

    Weights are the elements of 2-D and 3-D parameters. One that an embedding and an output head
    share counts as the embedding's.
    """

    quantized: int
    kept: int
    embeddings: int

    @property
    def share(self) -> float:
        """The quantized share of all weights but embeddings, in [0, 1]."""
        return self.quantized / max(1, self.quantized + self.kept)

    def __str__(self) -> str:
        total = self.quantized + self.kept
        return (
            f"{self.share:.1%} of the weights are quantized: "
            f"{self.quantized:,} of {total:,}, without {self.embeddings:,} of embeddings"
        )


def weight_counts(model: nn.Module) -> WeightCounts:
    """Count the weights of a quantized model."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    kept = [p for p in model.parameters() if p.dim() in (2, 3) and p not in embeddings]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return WeightCounts(
        sum(layer.in_features * layer.out_features for layer in layers),
        sum(parameter.numel() for parameter in kept),
        sum(weight.numel() for weight in embeddings),
    )


def warn_if_mostly_kept(model: nn.Module, records: Sequence[LinearRecord]) -> None:
    """Log a warning if fewer than half of a model's weights are quantized, with the reasons."""
    counts = weight_counts(model)
    if counts.quantized >= counts.kept:
        return
    sizes: Counter[str] = Counter()
    for record in records:
        is_embedding = record.reason.startswith(EMBEDDING)
        if record.action == "kept" and len(record.shape) in (2, 3) and not is_embedding:
            sizes[record.reason] += math.prod(record.shape)
    most = "; ".join(f"{size:,} ({reason})" for reason, size in sizes.most_common(3))
    logger.warning("only %s; most of the others: %s", counts, most)


def quantized_record(name: str, layer: QuantizedLinear, chosen_by: str) -> LinearRecord:
    """The record of a quantized layer."""
    shape = (layer.out_features, layer.in_features)
    size = sum(tensor.nbytes for key, tensor in layer.state_dict().items() if key != "bias")
    bits = 8 * size / max(1, shape[0] * shape[1])
    return LinearRecord(name, shape, layer.num_salient, bits, "quantized", chosen_by)


def kept_records(
    model: nn.Module, items: Sequence[LayerInput], kept: Mapping[str, str]
) -> list[LinearRecord]:
    """The records of all parameters that are not quantized.

    Args:
        items: the model's layer inputs.
        kept: {module: why it stays}, from `kept_modules`.
    """
    routers = {item.router for item in items}
    records = []

    def keep(name: str, tensor: Tensor, reason: str) -> None:
        short, bits = name.removesuffix(".weight"), 8.0 * tensor.element_size()
        records.append(LinearRecord(short, tuple(tensor.shape), 0, bits, "kept", reason))

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block, _, leaf = name.rpartition(".")
        module = modules[block]
        reason = f"parameter of {type(module).__name__}"
        if leaf == "bias":
            reason = "bias"
        elif isinstance(module, nn.Embedding):
            reason = kept.get(block, EMBEDDING)
        elif block in kept:
            reason = kept[block]
        elif is_linear(module):
            reason = "not in the table of families"
        elif leaf == "weight" and block in routers:
            reason = "router"
        elif parameter.dim() == 3:
            reason = "fused parameter, not in the table of families"
        keep(name, parameter, reason)
    for block, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            keep(f"{block}.bias", module.bias, "bias")
    return records
