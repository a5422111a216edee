"""Sweeps as data: cells, their keys, and the presets.

A cell is one unit of work with a stored result: the calibration of a model, the perplexity of the
unquantized model, the scores and size of one quantized model, or the errors of its layers.

A cell's key is the sha256 of its specification. A run therefore reuses a result only if it would
compute the same thing.

`smoothquant` is imported inside functions here: figures can be drawn from stored results without
it and without torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

PUBLISHED_GROUP_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED_SALIENT_PROPS = (0.0, 0.01, 0.05, 0.1)
SORTS = ("none", "max", "mean3std", "argmax", "rms")
TASKS = ("calibration", "baseline", "quantized", "layers")
MIXEDQUANT = "mixedquant"
# Other methods, simulated in `peers`: {name: whether it uses group sizes}.
OTHER_METHODS = {
    "per-token-rtn": False,
    "smoothquant-style": False,
    "quarot-style": True,
    "atom-style": True,
}


@dataclass(frozen=True)
class Cell:
    """The specification of one unit of work, as plain JSON values.

    Args:
        task: "calibration", "baseline" (the unquantized model), "quantized" or "layers" (the
            errors of a quantized model's layers).
        model: name, sha256 of each model file, dtype of the floating-point tensors.
        versions: version of every package that affects the numbers.
        calibration: name and sha256 of the text, number and length of the token blocks, and the
            seed that draws them. Quantization takes its statistics, and GPTQ its tokens, from these
            blocks. None for a baseline.
        evaluation: name and sha256 of the text, windows (None: all) and seqlen. For a quantized
            model also "against", the task it is compared with. None for a calibration.
        config: fields of MixedQuantConfig, or {"method", "group_size"} for one of `OTHER_METHODS`.
            Only for "quantized" and "layers".
    """

    task: str
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces, ASCII."""
        return canonical_json({name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @cached_property
    def key(self) -> str:
        """sha256 of `to_json`, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def needs(self) -> list[Cell]:
        """The cells whose results this one needs."""
        needs = []
        if self.task in ("quantized", "layers"):
            needs.append(self._companion("calibration", calibration=self.calibration))
        if self.task == "quantized":
            needs.append(self._companion("baseline", evaluation=_without_reference(self)))
        return needs

    def _companion(self, task: str, **parts: Any) -> Cell:
        return Cell(task, model=self.model, versions=self.versions, **parts)

    @property
    def label(self) -> str:
        """A short name for progress output."""
        if self.config is None:
            return {"baseline": "unquantized model"}.get(self.task, self.task)
        if self.task == "layers":
            return f"layers of {self.settings}"
        return f"{self.settings} {self.config.get('backend', '')}".rstrip()

    @property
    def settings(self) -> str:
        """A name for the quantization settings, without the backend."""
        fields = self.config or {}
        group = "" if fields["group_size"] is None else f" g={fields['group_size']}"
        if "method" in fields:
            return fields["method"] + group
        share = f"{100 * fields['salient_prop']:g}%"
        return f"{fields['recipe']}{group} p={share} sort={fields['sort']}"


def _without_reference(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in (cell.evaluation or {}).items() if key != "against"}


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values, whatever the order of their names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Product:
    """Every combination of these choices.

    Args:
        methods: "mixedquant" and names from `OTHER_METHODS`. The other methods depend on no choice
            but the group size.
        fields: (name, value) of MixedQuantConfig fields that are the same in every combination.
    """

    group_sizes: tuple[int, ...]
    salient_props: tuple[float, ...]
    sorts: tuple[str, ...] = ("rms",)
    backends: tuple[str, ...] = ("int4",)
    recipes: tuple[str, ...] = ("rtn",)
    methods: tuple[str, ...] = (MIXEDQUANT,)
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Preset:
    """A named sweep.

    Args:
        about: description for `--help`.
        model: a name, folder or id that `load_model` accepts.
        windows: windows of the test split to evaluate; None for all.
        calibration_blocks: token blocks for statistics.
        gptq_blocks: token blocks for settings that need tokens (GPTQ, searches), in place of
            calibration_blocks; these settings gain from more tokens.
        layer_windows: windows for measuring the errors of each layer; 0 to skip this.
        seed: draws the token blocks.
        keep: save the model with the lowest perplexity.
    """

    about: str
    model: str
    products: tuple[Product, ...]
    windows: int | None
    seqlen: int
    calibration_blocks: int
    calibration_block_size: int
    gptq_blocks: int = 64
    layer_windows: int = 0
    seed: int = 42
    dtype: str = "float32"
    keep: bool = False


_PAPER = Product(PUBLISHED_GROUP_SIZES, PUBLISHED_SALIENT_PROPS, ("max",))

PRESETS = {
    "default": Preset(
        about='SmolLM2-135M: recipes "rtn" and "fast" at 2 group sizes, "best" at g = 32; keeps '
        "the most accurate model",
        model="smollm2-135m",
        products=(
            Product((128, 32), (0.05,), recipes=("rtn", "fast")),
            Product((32,), (0.05,), recipes=("best",)),
        ),
        windows=4,
        seqlen=1024,
        calibration_blocks=8,
        calibration_block_size=512,
        gptq_blocks=8,
        keep=True,
    ),
    "rtn": Preset(
        about="round to nearest: 3 group sizes x 4 salient shares; at g = 128 also the other 4 "
        "sort keys and the simulation",
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
    "recipes": Preset(
        about='every recipe at 3 group sizes x 2 salient shares; "best" takes minutes per cell',
        model="smollm2-135m",
        products=(Product((32, 128, 512), (0.05, 0.1), recipes=("rtn", "fast", "best")),),
        windows=4,
        seqlen=1024,
        calibration_blocks=32,
        calibration_block_size=1024,
        gptq_blocks=32,
    ),
    "full-test": Preset(
        about="the main rows of recipes on the whole test split; at least half an hour per cell",
        model="smollm2-135m",
        products=(
            Product((128,), (0.05,), recipes=("rtn", "fast", "best")),
            Product((128,), (0.1,), recipes=("best",)),
            Product((128,), (0.05,), backends=("fake",), recipes=("best",)),
        ),
        windows=None,
        seqlen=1024,
        calibration_blocks=32,
        calibration_block_size=1024,
        gptq_blocks=32,
    ),
    "peers": Preset(
        about='recipes "rtn" and "best" against simulations of other methods at g = 128',
        model="smollm2-135m",
        products=(
            Product((128,), (0.05, 0.1), recipes=("rtn", "best")),
            Product((512,), (0.0,), recipes=("best",)),  # fewer bits than quarot-style
            Product(
                (128,),
                (),
                methods=("per-token-rtn", "smoothquant-style", "quarot-style", "atom-style"),
            ),
        ),
        windows=4,
        seqlen=1024,
        calibration_blocks=32,
        calibration_block_size=1024,
        gptq_blocks=32,
    ),
    "grid": Preset(
        about='the published grid by "rtn" with every sort key, and by "best"; 8 k calibration '
        "tokens (for tiny-opt add --seqlen 512)",
        model="smollm2-135m",
        products=(
            Product(PUBLISHED_GROUP_SIZES, PUBLISHED_SALIENT_PROPS, SORTS),
            Product(PUBLISHED_GROUP_SIZES, PUBLISHED_SALIENT_PROPS, recipes=("best",)),
        ),
        windows=4,
        seqlen=1024,
        calibration_blocks=16,
        calibration_block_size=512,
        gptq_blocks=16,
    ),
    "paper": Preset(
        about="the published grid: 9 group sizes x 4 salient shares, sorted by max, 10 windows of "
        "2,048 tokens (--windows all: the whole test split)",
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
        about="a few cells of the bundled tiny OPT; takes seconds",
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
        gptq_blocks=16,
    ),
}


def override(preset: Preset, products: Mapping[str, tuple], **fields: Any) -> Preset:
    """Return a copy of `preset` with some choices replaced.

    Args:
        preset: the preset to copy.
        products: {field of Product: values}, replaced in every product.
        fields: fields of Preset to replace.
    """
    return replace(
        preset, products=tuple(replace(p, **products) for p in preset.products), **fields
    )


def configs(products: Iterable[Product]) -> list[dict[str, Any]]:
    """Return the distinct settings of `products` in order, as values for `Cell.config`.

    Raises:
        ValueError, TypeError: MixedQuantConfig refuses a setting, a method is unknown, or there are
            no settings.
    """
    unique: dict[str, dict[str, Any]] = {}
    for product in products:
        for method in product.methods:
            settings = _mixedquant if method == MIXEDQUANT else _other_method
            for fields in settings(method, product):
                unique.setdefault(canonical_json(fields), fields)
    if not unique:
        raise ValueError(
            "the sweep has no cells: group_sizes, salient_props, sorts, backends, recipes, methods"
        )
    return list(unique.values())


def _mixedquant(method: str, product: Product) -> Iterator[dict[str, Any]]:
    from smoothquant.core.config import MixedQuantConfig

    for backend, recipe, sort, group_size, salient_prop in itertools.product(
        product.backends,
        product.recipes,
        product.sorts,
        product.group_sizes,
        product.salient_props,
    ):
        fields = {
            "group_size": group_size,
            # 0 and 0.0 must give the same key
            "salient_prop": float(salient_prop),
            "sort": sort,
            "backend": backend,
            "recipe": recipe,
        }
        yield MixedQuantConfig.from_dict(fields | dict(product.fields)).to_dict()


def _other_method(method: str, product: Product) -> Iterator[dict[str, Any]]:
    from smoothquant.core.config import check_integer

    if method not in OTHER_METHODS:
        raise ValueError(
            f"method must be one of {', '.join([MIXEDQUANT, *OTHER_METHODS])}; got {method!r}"
        )
    for group_size in product.group_sizes:
        check_integer("group_size", group_size, 1)
        yield {"method": method, "group_size": group_size if OTHER_METHODS[method] else None}


def cells(
    preset: Preset,
    *,
    model: Mapping[str, Any],
    versions: Mapping[str, str],
    calibration_data: Mapping[str, Any],
    evaluation_data: Mapping[str, Any],
) -> list[Cell]:
    """Return all cells of a sweep: calibrations, baseline, quantized models, errors by layer.

    Args:
        preset: what to sweep over.
        model, versions: as in `Cell`.
        calibration_data, evaluation_data: name and sha256 of the texts.
    """
    common = {"model": model, "versions": versions}
    evaluation = {**evaluation_data, "windows": preset.windows, "seqlen": preset.seqlen}
    baseline = Cell("baseline", evaluation=evaluation, **common)
    quantized = [
        Cell(
            "quantized",
            calibration=_calibration(preset, calibration_data, fields),
            evaluation={**evaluation, "against": baseline.task},
            config=fields,
            **common,
        )
        for fields in configs(preset.products)
    ]
    layers = [
        replace(cell, task="layers", evaluation={**evaluation, "windows": preset.layer_windows})
        for cell in quantized
        if preset.layer_windows and (cell.config or {}).get("backend") == "int4"
    ]
    calibrations = [Cell("calibration", calibration=c.calibration, **common) for c in quantized]
    return [*{c.key: c for c in calibrations}.values(), baseline, *quantized, *layers]


def _calibration(
    preset: Preset, data: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    from smoothquant.core.config import MixedQuantConfig

    needs_tokens = "method" in fields or MixedQuantConfig.from_dict(dict(fields)).needs_tokens
    return {
        **data,
        "blocks": preset.gptq_blocks if needs_tokens else preset.calibration_blocks,
        "block_size": preset.calibration_block_size,
        "seed": preset.seed,
    }
