"""MixedQuantConfig: every option of the quantization, in one validated value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

MAX_ROTATION = 512
MAX_GROUP_SIZE = 2**62
# Names for the field `calibration`.
WIKITEXT, WEIGHTS = "wikitext2", "weights"
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
    "unreached": ("keep", "weights"),
    "non_finite": ("propagate", "raise"),
}
TABLE_FORMATS = ("16bit", "int8", "int4")  # of output heads and embeddings

# Fields that folders and sweeps did not always have, and what they mean where they are missing.
NEWER: dict[str, Any] = {
    "act_bits": None,
    "unreached": "keep",
    "head": "16bit",
    "embeddings": "16bit",
    "ignore": [],
    "tune": False,
}

# The values that each recipe gives to fields left at None. rotation="group" is the largest rotation
# that fits a group.
RECIPES: dict[str, dict[str, Any]] = {
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
for _recipe in RECIPES.values():
    _recipe["tune"] = False
RECIPES["tuned"] = RECIPES["best"] | {"tune": True}


SHOWN_PATTERNS = 8  # patterns of `ignore` in a repr


@dataclasses.dataclass(frozen=True, repr=False)
class MixedQuantConfig:
    """How the Linear layers of a model are quantized.

    The constructor checks every field. A bad field raises ValueError (wrong value) or TypeError
    (wrong type); the message names the field and the value.

    Args:
        recipe: default values for the fields marked (recipe); explicit values override them. "fast"
            uses rotation, zero-points, an activation clip and error-minimizing weight scales.
            "best" also searches clip and format per layer and rounds by GPTQ; it needs calibration
            tokens. "tuned" is "best", then trained on those tokens. "rtn" only rounds to nearest.
        num_bits: bits of the quantized weights, and of the activations unless act_bits is given:
            2-4 with ``backend="int4"`` (weights always take 4 bits of storage), 2-8 with
            ``backend="fake"``.
        act_bits: bits of the quantized activations, 2-8 (2-7 with unsigned codes or zero-points);
            None is num_bits. 8 makes a W4A8 model: the same packed weights, more accurate, and as
            fast where the processor multiplies bytes (docs/results.md). With 8, recipes use
            symmetric codes and no clip.
        group_size: number of consecutive channels, in sorted order, that share a scale; >= 1. The
            last group of a row may be shorter.
        salient_prop: share of input channels that are salient, that is, not rounded to num_bits;
            in [0, 1]. Default 0.05.
        bits: target size in bits per weight over all quantized layers, including scales and
            permutations. Replaces salient_prop: as many channels are salient as the target allows.
            An INT4 output head or embeddings meet the target by themselves; it does not apply to
            INT8 ones.
        salient_metric: score that ranks channels for salience: "mean" (``E|x|``), "max"
            (``max|x|``), "rms", or "output" (sum x^2 times the squared norm of the weight columns
            that read the channel).
        salient_allocation: "uniform" gives every layer the same share of salient channels. "output"
            keeps the average share, but lets the channels of all layers compete: those that
            contribute most to their layer's squared outputs win.
        salient_format: storage of the salient channels' weights: "16bit" (bfloat16, or float16 in a
            float16 model) or "int8" with a scale per output channel. Salient activations are not
            rounded in either format.
        sort: key that the quantized channels are sorted by, largest first; "none" keeps their
            order.
        sort_by: compute the sort key from "activation" or "weight" statistics.
        tp_blocks: for tensor parallelism: split each layer's input channels into this many equal
            blocks and choose salient channels and sort within each block, so that every device can
            hold one block. Must divide the input channels of every layer. The number of salient
            channels is rounded so that blocks have whole groups, where any number does that. See
            `choose_channels` for the resulting order.
        sort_within_heads: move channels of an attention output only within their head, and the same
            way in all heads that share a head of v, so that `fold_permutations` can move the order
            into the rows of v. No effect if the table of families does not describe the heads.
        smooth_alpha: smoothing strength in [0, 1] (Xiao et al., 2022) for inputs produced by a
            norm, folded into the norm and the weights. None turns smoothing off; "search" picks a
            strength, or no smoothing, per input on calibration tokens.
        rotation: (recipe) size of the orthonormal Hadamard blocks that rotate the quantized
            channels within each group: 0 (none), a power of two up to 512, or "group" for the
            largest that fits a group.
        weight_scale: (recipe) "max" covers the largest weight; "mse" picks the smaller scale with
            the least squared error.
        weight_rounding: (recipe) "nearest", or "gptq": GPTQ (Frantar et al., 2022) followed by
            coordinate descent on codes and scales.
        act_format: (recipe) codes of the activations: "symmetric" around 0; "unsigned", for inputs
            that are never negative (negative values saturate at 0); or "zero_point", with a
            zero-point per scale. "auto" chooses per layer on calibration tokens: zero-points, or
            unsigned codes without rotation if no negative value was seen and they match the float
            output better.
        weight_quant: what shares a weight scale: a group, an output channel or the tensor.
        act_quant: what shares an activation scale: a group, a token, or (only with
            ``backend="fake"``) the whole batch.
        tune: (recipe) when all layers are quantized, train weight scales, salient weights and
            activation clips by the KL divergence from the float model, in sequences of 256
            calibration tokens (`smoothquant.quantization.tuning`). The result is kept only if it is
            better on a tenth of the tokens that is held out. Needs the whole model in memory.
        quantize_output: also quantize the outputs of q, k and v, the inputs of the attention
            products.
        backend: "int4" packs 4-bit weights and runs integer kernels; "fake" simulates the same
            quantization in the tensor's dtype.
        act_clip: (recipe) factor in [2^-10, 1] on the range of each activation group; "search"
            picks one per layer on calibration tokens.
        non_finite: handling of NaN or Inf in a token: "propagate" makes that token's outputs NaN,
            "raise" raises ValueError.
        calibration: what a model is calibrated on that gets neither statistics nor tokens: texts; a
            file for `smoothquant.core.texts.read_texts`; "wikitext2", the bundled validation split
            of WikiText-2; or "weights": nothing, so that salient channels and order come from the
            weights alone, which costs much accuracy. None is "wikitext2" if the model takes token
            ids and its tokenizer is found, else "weights", with a warning. `to_dict` replaces texts
            by their sha256.
        calibration_tokens: number of tokens drawn from the calibration data, in blocks of 1,024 or
            the model's maximum length if that is shorter.
        seed: random seed of that draw.
        unreached: what becomes of a layer that calibration ran past, such as a vision tower when
            the calibration data is text: "keep" leaves it in 16 bits; "weights" quantizes it with
            salient channels and order chosen from its weights alone. Both warn. Without
            calibration, every layer is quantized by its weights. Experts that no token is routed
            to are, too, if their layer's others are reached.
        head: format of the output head: "16bit" keeps it as it is; "int8" has INT8 weights with a
            scale per group; "int4" has packed INT4 weights like the other linears. Both quantize
            the head's inputs to 8 bits, and round to nearest. None is "int8". What cannot be
            quantized stays; the report says why.
        embeddings: the same for the input embeddings, which dequantize the rows they look up. A
            tied head and embeddings are one weight: set either of the two, or both alike.
        ignore: patterns of modules that stay as they are, with everything inside them. A pattern
            is one or more whole parts of a module's name, separated by dots: "lm_head",
            "vision_tower", "mlp.gate" or "model.layers.0". With "*", "?" or "[", it must match the
            full name as in `fnmatch`. After "re:", it is a regular expression that must match from
            the start of the full name, as in `re.match`. A pattern that matches no module is an
            error.
    """

    # The method's name in transformers.
    quant_method: ClassVar[str] = "mixedquant"

    recipe: str = "fast"
    num_bits: int = 4
    act_bits: int | None = None
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
    tune: bool | None = None
    act_quant: str = "per_group"
    act_format: str | None = None
    act_clip: float | str | None = None
    quantize_output: bool = False
    backend: str = "int4"
    non_finite: str = "propagate"
    calibration: str | os.PathLike | Sequence[str] | None = None
    calibration_tokens: int = 32768
    seed: int = 42
    unreached: str = "keep"
    head: str | None = None
    embeddings: str | None = None
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.recipe not in list(RECIPES):  # a list, because recipe may be unhashable
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {self.recipe!r}")
        for name, value in (RECIPES[self.recipe] | self._exceptions()).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.rotation == "group":
            self._set("group_size", check_integer, 1, MAX_GROUP_SIZE)
            largest = 1 << (min(int(self.group_size), MAX_ROTATION).bit_length() - 1)
            object.__setattr__(self, "rotation", largest)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name in ("head", "embeddings"):
            if (value := getattr(self, name)) is not None and value not in list(TABLE_FORMATS):
                raise ValueError(f"{name} must be one of {', '.join(TABLE_FORMATS)}; got {value!r}")
        self._set("num_bits", check_integer, 2, 4 if self.backend == "int4" else 8)
        most_bits = 8 if self.act_format == "symmetric" else 7  # codes are signed bytes
        if self.act_bits is not None:
            self._set("act_bits", check_integer, 2, most_bits)
        elif self.num_bits > most_bits:
            raise ValueError(
                f"num_bits must be in [2, {most_bits}] with act_format={self.act_format!r} unless "
                f"act_bits is given; got {self.num_bits!r}"
            )
        self._set("group_size", check_integer, 1, MAX_GROUP_SIZE)
        if self.bits is not None:
            if self.salient_prop is not None:
                raise ValueError(
                    "salient_prop and bits exclude each other; "
                    f"got salient_prop={self.salient_prop!r} and bits={self.bits!r}"
                )
            self._set("bits", check_real, 0.0, 32.0)
        else:
            if self.salient_prop is None:
                object.__setattr__(self, "salient_prop", 0.05)
            self._set("salient_prop", check_real, 0.0, 1.0)
        if self.smooth_alpha not in (None, "search"):
            self._set("smooth_alpha", check_real, 0.0, 1.0)
        self._set("tp_blocks", check_integer, 1)
        rotation = check_integer("rotation", self.rotation, 0, MAX_ROTATION)
        object.__setattr__(self, "rotation", rotation)
        if rotation & (rotation - 1):
            raise ValueError(f"rotation must be 0 or a power of two; got {rotation}")
        if self.act_format == "unsigned" and rotation > 1:
            raise ValueError(
                "act_format='unsigned' needs rotation=0, because rotating turns positive values "
                f"negative; got rotation={rotation}"
            )
        if self.act_clip != "search":
            self._set("act_clip", check_real, 2.0**-10, 1.0)
        for name in ("sort_within_heads", "quantize_output", "tune"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool; got {getattr(self, name)!r}")
        self._set("calibration_tokens", check_integer, 1)
        self._set("seed", check_integer, 0)
        object.__setattr__(self, "ignore", _checked_patterns(self.ignore))
        object.__setattr__(self, "calibration", _checked_calibration(self.calibration))
        if self.backend == "int4" and self.act_quant == "per_tensor":
            raise ValueError(
                "act_quant='per_tensor' takes one scale from the whole batch, so a token's result "
                "would depend on other tokens; use act_quant='per_token' or backend='fake'"
            )

    def __repr__(self) -> str:
        """The recipe and the fields that it does not imply, as a call that makes this config; texts
        as their number and hash. `to_dict` has all fields."""
        sizes = ("recipe", "group_size", "num_bits", "act_bits", "bits", "backend")
        implied = MixedQuantConfig(**{name: getattr(self, name) for name in sizes})
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            usual = field.default if field.name in sizes else getattr(implied, field.name)
            if field.name != "recipe" and value == usual:
                continue
            text = repr(value)
            if field.name == "calibration" and isinstance(value, tuple):
                texts = "1 text" if len(value) == 1 else f"{len(value):,} texts"
                text = f"<{texts}, {_digest(value)[:15]}>"
            elif field.name == "ignore" and len(value) > SHOWN_PATTERNS:
                text = f"<{len(value):,} patterns>"
            shown.append(f"{field.name}={text}")
        return f"MixedQuantConfig({', '.join(shown)})"

    @property
    def activation_bits(self) -> int:
        """``act_bits``, or ``num_bits`` if it is None."""
        return self.num_bits if self.act_bits is None else self.act_bits

    @property
    def scheme(self) -> str:
        """Bits of weights and activations, such as "W4A4"."""
        return f"W{self.num_bits}A{self.activation_bits}"

    @property
    def searches(self) -> str:
        """The first field to be searched per layer on calibration tokens, as "name='value'"; ""
        if there is none."""
        searched = (("act_format", "auto"), ("act_clip", "search"))
        return next((f"{f}={v!r}" for f, v in searched if getattr(self, f) == v), "")

    @property
    def needs_tokens(self) -> str:
        """The first field that needs calibration tokens, not only statistics, as "name='value'"; ""
        if there is none."""
        if self.weight_rounding == "gptq":
            return "weight_rounding='gptq'"
        if self.searches or self.smooth_alpha == "search":
            return self.searches or "smooth_alpha='search'"
        return "tune=True" if self.tune else ""

    def settled(self) -> MixedQuantConfig:
        """The config with searched fields set to fixed values: act_format="auto" becomes
        "zero_point", act_clip="search" becomes 1."""
        return dataclasses.replace(
            self,
            act_format="zero_point" if self.act_format == "auto" else self.act_format,
            act_clip=1.0 if self.act_clip == "search" else self.act_clip,
        )

    def _exceptions(self) -> dict[str, Any]:
        """Values for fields left at None that replace the recipe's, as those cannot be combined
        with the given ones."""
        values: dict[str, Any] = {}
        if isinstance(self.activation_bits, int) and self.activation_bits > 7:
            values |= {"act_format": "symmetric", "act_clip": 1.0}
        if self.act_format == "unsigned":
            values["rotation"] = 0
        return values

    def _set(self, name: str, check: Callable[..., float], *bounds: float) -> None:
        """Check a number and store it as a plain int or float, which JSON can hold."""
        object.__setattr__(self, name, check(name, getattr(self, name), *bounds))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; calibration texts are replaced by their sha256. Fields
        that are newer than others are left out at the value that stands for the time before:
        ``act_bits`` None, ``unreached`` "keep", ``head`` and ``embeddings`` "16bit", ``ignore``
        empty, ``tune`` False."""
        fields = dataclasses.asdict(self)
        if isinstance(self.calibration, tuple):
            fields["calibration"] = _digest(self.calibration)
        fields["ignore"] = list(self.ignore)
        return {n: v for n, v in fields.items() if n not in NEWER or v != NEWER[n]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MixedQuantConfig:
        """The inverse of :meth:`to_dict`: without ``head`` and ``embeddings``, both are "16bit". An
        unknown field raises ValueError."""
        return cls.from_fields(NEWER | fields)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> MixedQuantConfig:
        """A config with these fields and the defaults of all others; an unknown field raises
        ValueError.

        ``modules_to_not_convert``, transformers' name for ``ignore``, is accepted too.
        """
        alias = "modules_to_not_convert"
        if alias in fields:
            if fields.get("ignore"):
                raise ValueError(f"ignore and {alias} are the same field; give one of them")
            fields = {**fields, "ignore": fields[alias] or ()}
            del fields[alias]
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown MixedQuantConfig field(s): {', '.join(unknown)}")
        return cls(**fields)


def _digest(texts: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()}"


def layer_group_size(config: MixedQuantConfig, k4: int) -> int:
    """Channels that share a scale in a layer with k4 INT4 channels; all k4 if neither weights nor
    activations are quantized per group."""
    has_groups = "per_group" in (config.weight_quant, config.act_quant)
    return max(1, min(config.group_size, k4) if has_groups else k4)


def table_config(config: MixedQuantConfig, kind: str, k: int) -> MixedQuantConfig:
    """The config of the layer of an output head or embeddings with k channels.

    Args:
        config: the model's.
        kind: "int8" or "int4".
    """
    fields: dict[str, Any] = {
        "head": "16bit",
        "embeddings": "16bit",
        "ignore": (),
        # Errors of a head's input go straight into the logits.
        "act_bits": 8,
        "act_format": "symmetric",
        "act_clip": 1.0,
        "weight_rounding": "nearest",
        "tune": False,
        "smooth_alpha": None,
        "salient_allocation": "uniform",
        "tp_blocks": 1,
        "sort_within_heads": False,
        "quantize_output": False,
        "num_bits": 4,
    }
    if kind == "int8":
        fields |= {
            "num_bits": 4 if config.backend == "int4" else 8,  # two planes of 4 bits
            "group_size": int8_group_size(layer_group_size(config, k), k),
            "bits": None,
            "salient_prop": 0.0,
            "salient_format": "16bit",
            "sort": "none",
            "rotation": 0,
            "weight_quant": "per_group",
            "weight_scale": "max",
        }
    return dataclasses.replace(config, **fields)


SMALLEST_INT8_GROUP = 16


def int8_group_size(most: int, k: int) -> int:
    """The largest group size in [16, most] that divides k channels; if there is none, the smallest
    one above."""
    smaller = range(min(most, k), SMALLEST_INT8_GROUP - 1, -1)
    larger = range(max(most, SMALLEST_INT8_GROUP), k)
    return next((size for size in (*smaller, *larger) if k % size == 0), max(1, k))


def parse_field(text: str) -> tuple[str, Any]:
    """Split "name=value". The value is parsed as JSON, and kept as a string if it is not JSON.

    Raises:
        ValueError: text has no "=", or no name before it.
    """
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise ValueError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """Read MixedQuantConfig fields from a TOML, YAML or JSON file; their values are not checked.

    Raises:
        ValueError: the suffix is unknown, there is no such file, or it does not hold a table.
        RuntimeError: the file is TOML, and Python is older than 3.11.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise ValueError(f"config_file must end in .toml, .yaml, .yml or .json; got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"config_file: no such file: {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        if suffix == ".toml":
            fields = _toml(text)
        elif suffix == ".json":
            fields = json.loads(text)
        else:
            import yaml  # transformers requires it

            fields = yaml.safe_load(text)
    except RuntimeError:
        raise
    except Exception as error:  # each format has errors of its own
        raise ValueError(f"config_file: cannot read {str(path)!r}: {error}") from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"config_file must hold fields and values; got {str(path)!r}")
    return fields


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:
        raise RuntimeError("reading TOML needs Python 3.11; use YAML or JSON") from error
    return tomllib.loads(text)


def _checked_calibration(calibration: Any) -> str | tuple[str, ...] | None:
    """The calibration field, normalized: a path as str, texts as a tuple of str."""
    if calibration is None or isinstance(calibration, (str, os.PathLike)):
        return calibration if calibration is None else os.fspath(calibration)
    if isinstance(calibration, Sequence) and all(isinstance(text, str) for text in calibration):
        return tuple(calibration)
    raise TypeError(f"calibration must be a path or a sequence of texts; got {calibration!r:.80}")


def _checked_patterns(patterns: Any) -> tuple[str, ...]:
    """The ignore field as a tuple."""
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"ignore must be a sequence of patterns; got {patterns!r:.80}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"ignore must contain strings; got {pattern!r:.80}")
        if not pattern.removeprefix("re:"):
            raise ValueError(f"ignore must not contain an empty pattern; got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"ignore: {pattern!r} is no regular expression: {error}"
                ) from error
    return tuple(patterns)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int.

    Raises:
        TypeError: value is not an integer.
        ValueError: value is not in [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {span}; got {value!r}")
    return number


def check_real(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float.

    Raises:
        TypeError: value is not a real number.
        ValueError: value is not in [low, high].
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real:
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not low <= value <= high:  # also catches NaN; before float(), which a huge int overflows
        raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {value!r}")
    return float(value)


def published_config(
    backend: str, act_quant: str, *, num_bits: int, salient_prop: float | None, **fields: Any
) -> MixedQuantConfig:
    """The config for the arguments of the published functions (`smoothquant.fake_quant`).

    They round to nearest and do not calibrate by themselves. num_bits is called ``quant_bits``,
    ``salient_prop=None`` means 0, and ``act_quant="per_tensor"`` is always allowed. The int4
    backend then quantizes per token, which is at least as fine: with one scale for the whole batch,
    a token's result would depend on the others.
    """
    check_integer("quant_bits", num_bits, 2, 8)
    if backend == "int4" and num_bits > 4:
        raise ValueError(
            f"quant_bits must be in [2, 4] with backend='int4'; got {num_bits!r} "
            "(backend='fake' takes up to 8)"
        )
    if backend == "int4" and act_quant == "per_tensor":
        warnings.warn(
            "act_quant='per_tensor' makes a token's result depend on the whole batch; "
            "backend='int4' quantizes per token instead (backend='fake' simulates per_tensor)",
            stacklevel=3,
        )
        act_quant = "per_token"
    return MixedQuantConfig(
        recipe="rtn",
        calibration=WEIGHTS,
        backend=backend,
        act_quant=act_quant,
        num_bits=num_bits,
        salient_prop=0.0 if salient_prop is None else salient_prop,
        head="16bit",
        embeddings="16bit",
        **fields,
    )
