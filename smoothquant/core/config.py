"""The choices that turn a float model into a MixedQuant model, in one validated value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

MAX_ROTATION = 512
SORTS = ("none", "max", "mean3std", "argmax", "rms")
SALIENT_METRICS = ("mean", "max", "rms", "output")

CHOICES = {
    "salient_metric": SALIENT_METRICS,
    "salient_format": ("16bit", "int8"),
    "salient_allocation": ("uniform", "output"),
    "sort": SORTS,
    "sort_by": ("activation", "weight"),
    "weight_quant": ("per_group", "per_channel", "per_tensor"),
    "weight_scale": ("max", "mse"),
    "weight_rounding": ("nearest", "gptq"),
    "act_format": ("symmetric", "unsigned", "zero_point", "auto"),
    "act_quant": ("per_group", "per_token", "per_tensor"),
    "backend": ("int4", "fake"),
    "non_finite": ("propagate", "raise"),
}

# What a recipe puts where a field is None. "group": the largest rotation that fits a group.
RECIPES = {
    "rtn": {
        "rotation": 0,
        "act_format": "symmetric",
        "act_clip": 1.0,
        "weight_scale": "max",
        "weight_rounding": "nearest",
    },
    "fast": {
        "rotation": "group",
        "act_format": "zero_point",
        "act_clip": 0.95,
        "weight_scale": "mse",
        "weight_rounding": "nearest",
    },
    "best": {
        "rotation": "group",
        "act_format": "auto",
        "act_clip": "search",
        "weight_scale": "mse",
        "weight_rounding": "gptq",
    },
}


@dataclasses.dataclass(frozen=True)
class MixedQuantConfig:
    """How the Linear layers of a model are quantized.

    Every field is checked on construction; a bad one raises ValueError (wrong value) or TypeError
    (wrong type) that names the field and the value.

    Args:
        recipe: a set of values for the fields marked (recipe), which a value given overrides:
            "rtn" rounds to nearest; "fast" adds rotation, zero-points, an activation clip and
            error-minimizing weight scales; "best" finds clip and format per layer and rounds by
            GPTQ, for which `quantize` needs calibration tokens.
        num_bits: bits of the quantized weights and activations. 2-4 with ``backend="int4"`` (codes
            are stored as 4-bit), 2-8 with ``backend="fake"`` (2-7 with zero-points).
        group_size: consecutive channels, in sorted order, that share one scale; any integer >= 1.
            The last group of a row may be short.
        salient_prop: share of input channels that are salient, not rounded to num_bits, in [0, 1].
        bits: bits per weight of all quantized layers together, scales and permutations included, in
            place of salient_prop: as many channels are salient as keep to it.
        salient_metric: score that makes a channel salient: mean ``E|x|``, ``max|x|``, ``rms``, or
            "output": sum x^2 times the squared norm of the weight columns that read the channel.
        salient_allocation: "uniform": the same share in every layer; "output": the
            channels of all layers compete by what they make of their layer's squared outputs, the
            average share staying what it is.
        salient_format: how the salient channels' weights are stored: "16bit" (bfloat16, or float16
            of a float16 model) or "int8" with a scale per output channel. Activations of salient
            channels are not rounded in either.
        sort: key by which the quantized channels are sorted, largest first; "none" keeps order.
        sort_by: take the sort key from "activation" or "weight" statistics.
        tp_blocks: salient channels are picked and the others sorted inside each of that many equal
            parts of a layer's channels, so that as many devices can hold a part each (tensor
            parallelism); must divide the channels of every layer. `choose_channels` has the order.
        sort_within_heads: channels of an attention output move only inside their head, alike in
            all heads that share a head of v, so that `fold_permutations` can move the order into
            v's rows. Without effect where the table of families does not know the heads.
        smooth_alpha: strength in [0, 1] by which the inputs that a norm makes are smoothed
            (Xiao et al., 2022), folded into the norm and the weights; None: not; "search" finds
            one, or none, per input on calibration tokens.
        rotation: (recipe) size of the orthonormal Hadamard blocks that the quantized channels are
            rotated in, inside each group: 0 (none), a power of two up to 512, or "group" for the
            largest that fits a group.
        weight_scale: (recipe) "max" covers the largest weight, "mse" is the smaller scale of least
            squared error.
        weight_rounding: (recipe) "nearest", or "gptq": GPTQ (Frantar et al., 2022), and coordinate
            descent of codes and scales from there.
        act_format: (recipe) codes of the activations: "symmetric" around 0, "unsigned" (for inputs
            that are never negative; what is negative saturates at 0), or with a "zero_point" per
            scale. "auto" chooses per layer, on calibration tokens: zero-points, or unsigned codes
            without rotation where no negative value was seen and they come nearer to the float
            output.
        weight_quant: elements that share a weight scale: a group, an output channel, the tensor.
        act_quant: elements that share an activation scale: a group, a token, or (only
            ``backend="fake"``) the whole live tensor.
        quantize_output: also quantize the outputs of q/k/v (the inputs of the attention products).
        backend: "int4" packs real 4-bit weights and runs integer kernels; "fake" simulates the same
            choices in the tensor's dtype.
        act_clip: (recipe) factor in [2^-10, 1] on the range of each activation group; "search"
            finds one per layer on calibration tokens.
        non_finite: what a NaN or Inf in a token does: "propagate" makes that token's outputs NaN,
            "raise" raises ValueError.
        calibration: what `quantize` calibrates on when it is given a tokenizer and neither
            statistics nor tokens: a file that `smoothquant.core.texts.read_texts` reads, or texts.
            `to_dict` names texts by their sha256 only.
        calibration_tokens: tokens drawn from there, in blocks of 1,024 or as many as the model has
            positions for.
        seed: of the draw.
    """

    # what transformers knows the method by
    quant_method: ClassVar[str] = "mixedquant"

    recipe: str = "rtn"
    num_bits: int = 4
    group_size: int = 128
    salient_prop: float | None = None
    bits: float | None = None
    salient_metric: str = "rms"
    salient_allocation: str = "uniform"
    salient_format: str = "16bit"
    sort: str = "rms"
    sort_by: str = "activation"
    tp_blocks: int = 1
    sort_within_heads: bool = False
    smooth_alpha: float | str | None = None
    rotation: int | str | None = None
    weight_quant: str = "per_group"
    weight_scale: str | None = None
    weight_rounding: str | None = None
    act_quant: str = "per_group"
    act_format: str | None = None
    act_clip: float | str | None = None
    quantize_output: bool = False
    backend: str = "int4"
    non_finite: str = "propagate"
    calibration: str | os.PathLike | Sequence[str] | None = None
    calibration_tokens: int = 32768
    seed: int = 42

    def __post_init__(self) -> None:
        if self.recipe not in list(RECIPES):
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {self.recipe!r}")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.rotation == "group":
            check_integer("group_size", self.group_size, 1)
            largest = 1 << (min(int(self.group_size), MAX_ROTATION).bit_length() - 1)
            object.__setattr__(self, "rotation", largest)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        most_bits = (
            4 if self.backend == "int4" else 7 if self.act_format in ("zero_point", "auto") else 8
        )
        self._set("num_bits", check_integer, 2, most_bits)
        self._set("group_size", check_integer, 1, 2**62)
        if self.bits is not None:
            if self.salient_prop is not None:
                raise ValueError(
                    "salient_prop must be left out where bits is given, which decides it; "
                    f"got {self.salient_prop!r} and bits={self.bits!r}"
                )
            self._set("bits", check_real, 0.0, 32.0)
        else:
            if self.salient_prop is None:
                object.__setattr__(self, "salient_prop", 0.05)
            self._set("salient_prop", check_real, 0.0, 1.0)
        if self.smooth_alpha not in (None, "search"):
            self._set("smooth_alpha", check_real, 0.0, 1.0)
        self._set("tp_blocks", check_integer, 1)
        self._set("rotation", check_integer, 0, MAX_ROTATION)
        if self.rotation & (self.rotation - 1):
            raise ValueError(f"rotation must be 0 or a power of two; got {self.rotation}")
        if self.act_format == "unsigned" and self.rotation > 1:
            raise ValueError(
                "act_format='unsigned' needs rotation=0, which makes negative values of positive "
                f"ones; got rotation={self.rotation}"
            )
        if self.act_clip != "search":
            self._set("act_clip", check_real, 2.0**-10, 1.0)
        for name in ("sort_within_heads", "quantize_output"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool; got {getattr(self, name)!r}")
        self._set("calibration_tokens", check_integer, 1)
        self._set("seed", check_integer, 0)
        object.__setattr__(self, "calibration", _checked_calibration(self.calibration))
        if self.backend == "int4" and self.act_quant == "per_tensor":
            raise ValueError(
                "act_quant='per_tensor' takes its scale from the whole live batch, so a token's "
                "result would depend on other tokens; use act_quant='per_token' or backend='fake'"
            )

    @property
    def searches(self) -> str:
        """The first choice that is left to a trial on calibration tokens, in words, or ""."""
        open_choices = (("act_format", "auto"), ("act_clip", "search"))
        return next((f"{f}={v!r}" for f, v in open_choices if getattr(self, f) == v), "")

    @property
    def needs_tokens(self) -> str:
        """What `quantize` needs calibration tokens for, beside statistics, in words, or ""."""
        if self.weight_rounding == "gptq":
            return "weight_rounding='gptq'"
        return self.searches or ("smooth_alpha='search'" if self.smooth_alpha == "search" else "")

    def settled(self) -> MixedQuantConfig:
        """The config with what `searches` leaves to a trial decided without one: zero-points in
        place of act_format="auto", no clip in place of act_clip="search"."""
        return dataclasses.replace(
            self,
            act_format="zero_point" if self.act_format == "auto" else self.act_format,
            act_clip=1.0 if self.act_clip == "search" else self.act_clip,
        )

    def _set(self, name: str, check, low, high=None) -> None:
        """Check a number and keep it as a plain Python one, which JSON can hold."""
        object.__setattr__(self, name, check(name, getattr(self, name), low, high))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; calibration texts by their sha256."""
        fields = dataclasses.asdict(self)
        if isinstance(self.calibration, tuple):
            digest = hashlib.sha256("\0".join(self.calibration).encode()).hexdigest()
            fields["calibration"] = f"sha256:{digest}"
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MixedQuantConfig:
        """The inverse of :meth:`to_dict`; an unknown field raises ValueError."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown MixedQuantConfig field(s): {', '.join(unknown)}")
        return cls(**fields)


def layer_group_size(config: MixedQuantConfig, k4: int) -> int:
    """Channels to a scale in a layer of k4 INT4 channels; all where nothing is per group."""
    by_group = "per_group" in (config.weight_quant, config.act_quant)
    return max(1, min(config.group_size, k4) if by_group else k4)


def parse_field(text: str) -> tuple[str, Any]:
    """(name, value) of a word "name=value"; what is no JSON is a word. ValueError without a "="."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _checked_calibration(calibration: Any) -> str | tuple[str, ...] | None:
    """A path as str, texts as a tuple."""
    if calibration is None or isinstance(calibration, (str, os.PathLike)):
        return calibration if calibration is None else os.fspath(calibration)
    if isinstance(calibration, Sequence) and all(isinstance(text, str) for text in calibration):
        return tuple(calibration)
    raise TypeError(f"calibration must be a path or a sequence of texts; got {calibration!r:.80}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; TypeError for no integer, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {span}; got {value!r}")
    return int(value)


def check_real(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float; TypeError for no real number, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not low <= value <= high:  # a NaN is in no interval
        raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {value!r}")
    return float(value)


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
