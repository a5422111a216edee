"""The choices that turn a float model into a MixedQuant model, in one validated value."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from typing import Any

SORTS = ("none", "max", "mean3std", "argmax", "rms")
SALIENT_METRICS = ("mean", "max", "rms")
CHOICES = {
    "salient_metric": SALIENT_METRICS,
    "sort": SORTS,
    "sort_by": ("activation", "weight"),
    "weight_quant": ("per_group", "per_channel", "per_tensor"),
    "act_quant": ("per_group", "per_token", "per_tensor"),
    "backend": ("int4", "fake"),
    "non_finite": ("propagate", "raise"),
}


@dataclasses.dataclass(frozen=True)
class MixedQuantConfig:
    """How the Linear layers of a model are quantized.

    Every field is checked on construction; a bad one raises ValueError (wrong value) or TypeError
    (wrong type) that names the field and the value.

    Args:
        num_bits: bits of the quantized weights and activations. 2-4 with ``backend="int4"`` (codes
            are stored as 4-bit), 2-8 with ``backend="fake"``.
        group_size: consecutive channels, in sorted order, that share one scale; any integer >= 1.
            The last group of a row may be short.
        salient_prop: share of input channels kept in 16 bits, in [0, 1].
        salient_metric: score that makes a channel salient: mean ``E|x|``, ``max|x|`` or ``rms``.
        sort: key by which the quantized channels are sorted, largest first; "none" keeps order.
        sort_by: take the sort key from "activation" or "weight" statistics.
        weight_quant: elements that share a weight scale: a group, an output channel, the tensor.
        act_quant: elements that share an activation scale: a group, a token, or (only
            ``backend="fake"``) the whole live tensor.
        quantize_output: also quantize the outputs of q/k/v (the inputs of the attention products).
        backend: "int4" packs real 4-bit weights and runs integer kernels; "fake" simulates the same
            choices in the tensor's dtype.
        act_clip: factor in (0, 1] on the largest magnitude of each activation group.
        non_finite: what a NaN or Inf in a token does: "propagate" makes that token's outputs NaN,
            "raise" raises ValueError.
    """

    num_bits: int = 4
    group_size: int = 128
    salient_prop: float = 0.05
    salient_metric: str = "rms"
    sort: str = "rms"
    sort_by: str = "activation"
    weight_quant: str = "per_group"
    act_quant: str = "per_group"
    quantize_output: bool = False
    backend: str = "int4"
    act_clip: float = 1.0
    non_finite: str = "propagate"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        check_integer("num_bits", self.num_bits, 2, 4 if self.backend == "int4" else 8)
        check_integer("group_size", self.group_size, 1)
        check_real("salient_prop", self.salient_prop, 0.0, 1.0)
        check_real("act_clip", self.act_clip, 0.0, 1.0)
        if self.act_clip == 0:
            raise ValueError("act_clip must be in (0, 1]; got 0")
        if not isinstance(self.quantize_output, bool):
            raise TypeError(f"quantize_output must be a bool; got {self.quantize_output!r}")
        if self.backend == "int4" and self.act_quant == "per_tensor":
            raise ValueError(
                "act_quant='per_tensor' takes its scale from the whole live batch, so a token's "
                "result would depend on other tokens; use act_quant='per_token' or backend='fake'"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MixedQuantConfig:
        """The inverse of :meth:`to_dict`; an unknown field raises ValueError."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown MixedQuantConfig field(s): {', '.join(unknown)}")
        return cls(**fields)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {span}; got {value!r}")


def check_real(name: str, value: Any, low: float, high: float) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {value!r}")


def published_config(
    backend: str, act_quant: str, *, num_bits: int, salient_prop: float | None, **fields: Any
) -> MixedQuantConfig:
    """The config for arguments of the published functions.

    They allow ``act_quant="per_tensor"`` everywhere; the int4 backend then quantizes per token,
    which is never coarser: a scale of the whole live batch would make a token depend on the others.
    They say ``salient_prop=None`` for 0, and call num_bits ``quant_bits``.
    """
    check_integer("quant_bits", num_bits, 2, 8)
    if backend == "int4" and num_bits > 4:
        raise ValueError(
            f"quant_bits must be in [2, 4] with backend='int4'; got {num_bits!r} "
            "(backend='fake' takes up to 8)"
        )
    if backend == "int4" and act_quant == "per_tensor":
        warnings.warn(
            "act_quant='per_tensor' depends on the live batch; backend='int4' quantizes per token "
            "instead (backend='fake' simulates per_tensor)",
            stacklevel=3,
        )
        act_quant = "per_token"
    return MixedQuantConfig(
        backend=backend,
        act_quant=act_quant,
        num_bits=num_bits,
        salient_prop=0.0 if salient_prop is None else salient_prop,
        **fields,
    )
