"""Let transformers know that one of its models is quantized, so that it saves the model as such."""

from __future__ import annotations

import importlib

from torch import nn

from ..models.modules import is_transformers_model
from ..quantization.engine import Plan
from ..quantization.records import LinearRecord


def attach(model: nn.Module) -> None:
    """Bring a transformers model's quantizer up to date; any other model is left alone."""
    if is_transformers_model(model):
        # By name: it imports transformers, and it is a driver of plans itself.
        importlib.import_module(f"{__package__}.hf").set_quantizer(model)


def finish(plan: Plan) -> list[LinearRecord]:
    """`Plan.finish`, and attach the model to transformers."""
    records = plan.finish()
    attach(plan.model)
    return records
