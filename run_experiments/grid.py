"""Sweeps as data: what a cell is, what names it, and the presets.

A cell is one piece of work that can be done, kept and looked up by itself: the calibration of a
model, the perplexity of the unquantized model, or the perplexity and size of one quantized model.
Its key is the sha256 of its specification, so that a result can only be found again by a run that
would compute the same thing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

PUBLISHED_GROUP_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED_SALIENT_PROPS = (0.0, 0.01, 0.05, 0.1)
TASKS = ("calibration", "baseline", "quantized")


@dataclass(frozen=True)
class Cell:
    """The specification of one piece of work: plain JSON values only.

    task: "calibration", "baseline" (the unquantized model) or "quantized".
    model: name, sha256 of the model's files, dtype of its floating-point tensors.
    versions: version of every package that takes part in the numbers.
    calibration: data and sha256 of the texts, number and length of the token blocks, seed of the
        order of the texts. None for a baseline.
    evaluation: data and sha256 of the texts, windows (None: all), seqlen. None for a calibration.
    config: the fields of MixedQuantConfig. Only for "quantized".
    """

    task: str
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The canonical JSON text: sorted names, no spaces, ASCII."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def key(self) -> str:
        """sha256 of `to_json`, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def label(self) -> str:
        """A few words for progress bars and tables."""
        if self.config is None:
            return {"baseline": "unquantized model"}.get(self.task, self.task)
        fields = self.config
        return (
            f"g={fields['group_size']} p={100 * fields['salient_prop']:g}% "
            f"sort={fields['sort']} {fields['backend']}"
        )


def canonical_json(value: Any) -> str:
    """One text for equal JSON values, whatever the order of their names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Product:
    """Every combination of these choices."""

    group_sizes: tuple[int, ...]
    salient_props: tuple[float, ...]
    sorts: tuple[str, ...] = ("rms",)
    backends: tuple[str, ...] = ("int4",)


@dataclass(frozen=True)
class Preset:
    """A named sweep. windows=None means all; model is a name or folder `load_model` knows."""

    about: str
    model: str
    products: tuple[Product, ...]
    windows: int | None
    seqlen: int
    calibration_blocks: int
    calibration_block_size: int
    seed: int = 42
    dtype: str = "float32"


_PAPER = Product(PUBLISHED_GROUP_SIZES, PUBLISHED_SALIENT_PROPS, ("max",))

PRESETS = {
    "default": Preset(
        about="the bundled SmolLM2-135M: 3 group sizes x 4 salient shares, then the 4 other sorts "
        "and the simulation at one group size",
        model="smollm2-135m",
        products=(
            Product((32, 128, 512), PUBLISHED_SALIENT_PROPS),
            Product((128,), (0.05,), ("none", "max", "mean3std", "argmax")),
            Product((128,), PUBLISHED_SALIENT_PROPS, backends=("fake",)),
        ),
        windows=4,
        seqlen=1024,
        calibration_blocks=8,
        calibration_block_size=512,
    ),
    "paper": Preset(
        about="the published grid: 9 group sizes x 4 salient shares, sorted by max, 10 windows of "
        "2,048 (with --windows all: the whole test split)",
        model="smollm2-135m",
        products=(_PAPER,),
        windows=10,
        seqlen=2048,
        calibration_blocks=32,
        calibration_block_size=512,
    ),
    "opt": Preset(
        about="the published grid on the bundled tiny OPT",
        model="tiny-opt",
        products=(_PAPER,),
        windows=4,
        seqlen=512,
        calibration_blocks=16,
        calibration_block_size=512,
    ),
    "tiny": Preset(
        about="a few cells of the bundled tiny OPT, done in seconds",
        model="tiny-opt",
        products=(
            Product((16, 64), (0.0, 0.05)),
            Product((64,), (0.05,), ("none",)),
            Product((64,), (0.05,), backends=("fake",)),
        ),
        windows=2,
        seqlen=128,
        calibration_blocks=4,
        calibration_block_size=128,
    ),
}


def override(preset: Preset, products: Mapping[str, tuple], **fields: Any) -> Preset:
    """Return `preset` with some choices replaced.

    products: {field of Product: values}, replaced in every product of the preset.
    fields: fields of Preset.
    """
    return replace(
        preset, products=tuple(replace(p, **products) for p in preset.products), **fields
    )


def configs(products: Iterable[Product]) -> list[dict[str, Any]]:
    """The quantization settings of `products` as MixedQuantConfig fields, each once, in order.

    Raises:
        ValueError, TypeError: a setting that MixedQuantConfig refuses, or no setting at all.
    """
    from smoothquant.config import MixedQuantConfig

    unique: dict[str, dict[str, Any]] = {}
    for product in products:
        for backend, sort, group_size, salient_prop in itertools.product(
            product.backends, product.sorts, product.group_sizes, product.salient_props
        ):
            fields = MixedQuantConfig(
                group_size=group_size,
                # 0 and 0.0 are the same share and must give the same key.
                salient_prop=float(salient_prop),
                sort=sort,
                backend=backend,
            ).to_dict()
            unique.setdefault(canonical_json(fields), fields)
    if not unique:
        raise ValueError("the sweep has no cells: group_sizes, salient_props, sorts and backends")
    return list(unique.values())


def cells(
    preset: Preset,
    *,
    model: Mapping[str, Any],
    versions: Mapping[str, str],
    calibration_data: Mapping[str, Any],
    evaluation_data: Mapping[str, Any],
) -> list[Cell]:
    """All cells of a sweep: the calibration, the unquantized model, then every setting.

    model, versions: as in Cell. calibration_data, evaluation_data: name and sha256 of the texts.
    """
    calibration = {
        **calibration_data,
        "blocks": preset.calibration_blocks,
        "block_size": preset.calibration_block_size,
        "seed": preset.seed,
    }
    evaluation = {**evaluation_data, "windows": preset.windows, "seqlen": preset.seqlen}
    common = {"model": model, "versions": versions}
    return [
        Cell("calibration", calibration=calibration, **common),
        Cell("baseline", evaluation=evaluation, **common),
        *(
            Cell("quantized", calibration=calibration, evaluation=evaluation, config=c, **common)
            for c in configs(preset.products)
        ),
    ]
