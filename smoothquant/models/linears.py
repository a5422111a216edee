"""Modules that compute x W^T + b: nn.Linear, and transformers' Conv1D, which stores W transposed.

GPT-2, GPT, ImageGPT, CLVP and Decision Transformer are made of Conv1D layers. This module does not
import transformers: classes are compared by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONV1D = "transformers.pytorch_utils.Conv1D"


def class_path(kind: type) -> str:
    """The module and name of a class, such as "torch.nn.modules.linear.Linear"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_conv1d(module: object) -> bool:
    """Whether a module is a Conv1D, or of a subclass."""
    return any(class_path(base) == CONV1D for base in type(module).__mro__)


def is_linear(module: object) -> bool:
    """Whether a module is an nn.Linear or a Conv1D, or of a subclass."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_weight(module: Any) -> Tensor:
    """The weight of an nn.Linear, a Conv1D or an nn.Embedding as [N, K]: for a Conv1D a view."""
    weight: Tensor = module.weight
    return weight.T if is_conv1d(module) else weight


@torch.no_grad()
def set_linear_weight(module: Any, weight: nn.Parameter) -> None:
    """Give an nn.Linear or a Conv1D the weight [N, K]."""
    module.weight = nn.Parameter(weight.T.contiguous()) if is_conv1d(module) else weight
