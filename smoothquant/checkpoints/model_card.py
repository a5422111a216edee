"""The README.md of a saved model: how it was quantized, its size, and what was measured of it."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core.config import MixedQuantConfig
from ..core.files import atomic_file
from ..core.tensors import dtype_name
from ..core.version import __version__
from ..quantization.records import quantization_report
from .manifest import CARD, Manifest
from .sizes import bytes_by_kind

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EVALUATION = "\n## Evaluation\n"  # the last part
DEFAULTS = MixedQuantConfig()


def add_evaluation(folder: str | os.PathLike, evaluation: Mapping[str, float]) -> None:
    """Put measured numbers at the end of a folder's card, in the place of earlier ones."""
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with atomic_file(path) as partial:
        partial.write_text(text.partition(EVALUATION)[0] + _measured(evaluation), encoding="utf-8")


def model_card(model: nn.Module, evaluation: Mapping[str, float] | None = None) -> str:
    """A card in Markdown, with the head that the Hugging Face Hub reads.

    Every number in it is counted from the model's tensors, or given.

    Args:
        model: a quantized transformers model.
        evaluation: {what was measured, and on what: number}, for a table of its own.

    Raises:
        ValueError: the model is not quantized, or a number is none.
    """
    manifest = Manifest.of_model(model)
    config, num_bits = manifest.config, manifest.config.num_bits
    records = [r for r in quantization_report(model) if r.action == "quantized"]
    weights = {record.name: math.prod(record.shape) for record in records}
    bits = sum(r.bits_per_weight * weights[r.name] for r in records) / max(1, sum(weights.values()))
    salient = sum(r.num_salient * r.shape[0] for r in records) / max(1, sum(weights.values()))
    kinds = bytes_by_kind(model)
    chosen = Counter(record.reason for record in records)
    source = _source(model)
    head = ["library_name: transformers", "tags: [mixedquant, w4a4, quantized]"]
    if source:
        head.append(f"base_model: {source}")
    facts = [
        ("architecture", type(model).__name__),
        ("quantized layers", f"{len(records):,} with {sum(weights.values()):,} weights"),
        ("bits per quantized weight", f"{bits:.3f}, scales and permutations included"),
        ("weights of salient channels", f"{salient:.2%}"),
        ("size", f"{sum(kinds.values()):,} bytes"),
        ("other tensors", dtype_name(manifest.dtype)),
        ("channels chosen by", ", ".join(f"{why} ({n} layers)" for why, n in chosen.items())),
        ("written by", f"smoothquant {__version__}"),
    ]
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {source or type(model).__name__} in {num_bits} bits, weights and activations",
        f"{'Quantized' if config.backend == 'int4' else 'Simulated'} by MixedQuant: groups of "
        f"sorted channels in {num_bits}-bit integers, weights of salient channels in "
        f"{'8-bit integers' if config.salient_format == 'int8' else '16 bits'}.",
        _table(("", ""), facts),
        "## Choices\n\n" + _table(("field", "value"), _choices(config).items()),
        "## Bytes\n\n" + _table(("kind", "bytes"), [(k, f"{n:,}") for k, n in kinds.items()]),
    ]
    parts.append(
        "## Use\n\n```python\nimport smoothquant  # has transformers know the method\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n```"
    )
    return "\n\n".join(parts) + "\n" + (_measured(evaluation) if evaluation else "")


def _measured(evaluation: Mapping[str, float]) -> str:
    for name, value in evaluation.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"evaluation of {name!r} must be a number; got {value!r}")
    rows = [(name, f"{value:.5g}") for name, value in evaluation.items()]
    return f"{EVALUATION}\n{_table(('measured', 'value'), rows)}\n"


def _source(model: nn.Module) -> str | None:
    """The Hub's name of the float model; a folder's would tell of the machine."""
    name = str(getattr(model, "name_or_path", "") or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _choices(config: MixedQuantConfig) -> dict[str, Any]:
    """The recipe and what is another than usual; of a calibration file its name."""
    fields = config.to_dict()
    if isinstance(config.calibration, str):
        fields["calibration"] = Path(config.calibration).name
    usual = DEFAULTS.to_dict()
    shown = {"recipe", "group_size", "salient_prop"}
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (name in shown or value != usual[name])
    }


def _table(head: tuple[str, str], rows) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(_cell(part) for part in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
