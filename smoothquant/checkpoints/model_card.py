"""The model card (README.md): how the model was quantized, its size and its measured quality."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..core.config import NEWER, MixedQuantConfig
from ..core.files import atomic_file
from ..core.tensors import dtype_name
from ..core.version import DISTRIBUTION, __version__
from ..quantization.records import quantization_report
from .manifest import CARD, Manifest
from .sizes import bytes_by_kind

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EVALUATION = "\n## Evaluation\n"  # the last section
DEFAULTS = MixedQuantConfig()


def add_evaluation(folder: str | os.PathLike, evaluation: Mapping[str, float]) -> None:
    """Write measured numbers at the end of a folder's model card, replacing earlier ones.

    They also go into the ``model-index`` of its metadata, unless that was edited in a way that
    rewriting it would lose, such as comments. The rest of the card stays as it is.

    Args:
        folder: a folder of a quantized model; without a card, one is made that holds nothing else.
        evaluation: {"metric, dataset": number}.

    Raises:
        ValueError: a value is not a number.
    """
    section = _evaluation_section(evaluation)
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with atomic_file(path) as partial:
        partial.write_text(_indexed(text.partition(EVALUATION)[0] + section, evaluation), "utf-8")


def _indexed(text: str, evaluation: Mapping[str, float]) -> str:
    """A card with the evaluation in its metadata, where rewriting these loses nothing."""
    try:
        card = ModelCard(text)
    except Exception:  # YAML errors, or whatever else odd metadata causes
        return text
    if str(card) != text or not card.data.to_dict():
        return text
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    metadata: Any = card.data
    metadata.model_name = metadata.get("model_name") or (title[1] if title else "model")
    metadata.eval_results = _eval_results(evaluation)
    return str(card)


def model_card(model: nn.Module, evaluation: Mapping[str, float] | None = None) -> str:
    """A card in Markdown, with the metadata that the Hugging Face Hub reads.

    Every number is either counted from the model's tensors or given in `evaluation`.

    Args:
        model: a quantized transformers model.
        evaluation: {"metric, dataset": number}, for the evaluation table and ``model-index``.

    Raises:
        ValueError: the model is not quantized, or a value of `evaluation` is not a number.
    """
    manifest = Manifest.of_model(model)
    config, scheme = manifest.config, manifest.config.scheme
    records = [r for r in quantization_report(model) if r.action == "quantized"]
    weights = {record.name: math.prod(record.shape) for record in records}
    bits = sum(r.bits_per_weight * weights[r.name] for r in records) / max(1, sum(weights.values()))
    salient = sum(r.num_salient * r.shape[0] for r in records) / max(1, sum(weights.values()))
    kinds = bytes_by_kind(model)
    reasons = Counter(record.reason for record in records)
    source = _source(model)
    title = f"{source or type(model).__name__} in {scheme}"
    section = _evaluation_section(evaluation) if evaluation else ""
    metadata = ModelCardData(
        library_name="transformers",
        tags=["mixedquant", scheme.lower(), "quantized"],
        base_model=source,
        model_name=title if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )
    facts = [
        ("architecture", type(model).__name__),
        ("quantized layers", f"{len(records):,} with {sum(weights.values()):,} weights"),
        ("bits per quantized weight", f"{bits:.3f}, including scales and permutations"),
        ("weights of salient channels", f"{salient:.2%}"),
        ("size", f"{sum(kinds.values()):,} bytes"),
        ("dtype of other tensors", dtype_name(manifest.dtype)),
        ("channels chosen by", ", ".join(f"{why} ({n} layers)" for why, n in reasons.items())),
        ("written by", f"{DISTRIBUTION} {__version__}"),
    ]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"{'Quantized' if config.backend == 'int4' else 'Simulated'} by MixedQuant: groups of "
        f"sorted channels, weights in {config.num_bits}-bit and activations in "
        f"{config.activation_bits}-bit integers, weights of salient channels in "
        f"{'8-bit integers' if config.salient_format == 'int8' else '16 bits'}.",
        _table(("", ""), facts),
        "## Quantization config\n\n" + _table(("field", "value"), _shown_fields(config).items()),
        "## Size\n\n" + _table(("kind", "bytes"), [(k, f"{n:,}") for k, n in kinds.items()]),
        f"## Usage\n\n```\npip install {DISTRIBUTION}\n```\n\n"
        "transformers can read this folder only after `import smoothquant`. Without that, it warns "
        "of an unknown quantization type and returns a model with random weights.\n\n"
        "```python\nimport smoothquant  # registers the quantization method\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n```",
    ]
    return "\n\n".join(parts) + "\n" + section


def _evaluation_section(evaluation: Mapping[str, float]) -> str:
    for name, value in evaluation.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"evaluation of {name!r} must be a number; got {value!r}")
    rows = [(name, f"{value:.5g}") for name, value in evaluation.items()]
    return f"{EVALUATION}\n{_table(('metric', 'value'), rows)}\n"


def _eval_results(evaluation: Mapping[str, float]) -> list[EvalResult]:
    """The entries of ``model-index``; names are split at the first comma."""
    results = []
    for name, value in evaluation.items():
        metric, _, dataset = (part.strip() for part in name.partition(","))
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"\W+", "-", dataset.lower()).strip("-") or "unknown",
                dataset_name=dataset or "unknown",
                metric_type=metric,
                metric_value=float(value),  # numpy scalars would become Python objects in YAML
            )
        )
    return results


def _source(model: nn.Module) -> str | None:
    """The float model's Hub id, or None: a local path would reveal the user's folders."""
    name = str(getattr(model, "name_or_path", "") or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _shown_fields(config: MixedQuantConfig) -> dict[str, Any]:
    """The main settings and all that are not at their default; a calibration file by its name."""
    fields = NEWER | config.to_dict()
    if isinstance(config.calibration, str):
        fields["calibration"] = Path(config.calibration).name
    defaults = NEWER | DEFAULTS.to_dict()
    always = {"recipe", "group_size", "salient_prop"}
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (name in always or value != defaults.get(name))
    }


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines: list[tuple[str, Any]] = [head, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(_cell(part) for part in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
