"""Register a quantized model with transformers, so that `save_pretrained` saves it as such."""

from __future__ import annotations

import importlib

from torch import nn

from ..models.modules import is_transformers_model
from ..quantization.engine import Plan
from ..quantization.records import QuantizationReport


def attach(model: nn.Module) -> None:
    """Update the quantizer of a transformers model; do nothing for any other model."""
    if is_transformers_model(model):
        # Not a plain import: hf imports transformers, and this module.
        importlib.import_module(f"{__package__}.hf").set_quantizer(model)


def finish_and_attach(plan: Plan) -> QuantizationReport:
    """Call `plan.finish` and `attach` the model."""
    records = plan.finish()
    attach(plan.model)
    return records
