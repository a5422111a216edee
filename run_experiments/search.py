"""Search for the Pareto front of perplexity against size without computing a whole sweep.

Optuna proposes the settings. Its trials are cells in the store, so a search uses the results of
earlier sweeps and searches, and can be stopped and resumed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smoothquant.core.version import install_command

from .grid import Cell, Preset, Product
from .store import Store

# Dimensions of the search space: (field of Product, field of a cell's config, is it ordered).
DIMENSIONS = (
    ("group_sizes", "group_size", True),
    ("salient_props", "salient_prop", True),
    ("sorts", "sort", False),
    ("recipes", "recipe", False),
)
MAX_REPEATS = 20  # after so many proposals of known cells in a row, draw one at random
SEED = 0

Choice = tuple[Any, ...]  # one value per dimension


@dataclass(frozen=True)
class Budget:
    """When a search ends. Cells that have been started are always finished.

    Args:
        cells: number of quantized models to evaluate; stored results are free.
        minutes: duration of this run.
    """

    cells: float = math.inf
    minutes: float = math.inf

    @classmethod
    def from_text(cls, text: str) -> Budget:
        """Parse "40" (cells) or "30m" (minutes); ValueError for anything else."""
        number, in_minutes = text.removesuffix("m"), text.endswith("m")
        try:
            value = float(number) if in_minutes else int(number)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise ValueError(f"budget must be like 40 (cells) or 30m (minutes); got {text!r}")
        return cls(minutes=value) if in_minutes else cls(cells=value)


def space(preset: Preset) -> Preset:
    """Return a preset with every combination of `preset`'s choices, on the integer kernels."""
    choices = {
        name: tuple(dict.fromkeys(v for product in preset.products for v in getattr(product, name)))
        for name, _, _ in DIMENSIONS
    }
    fields = tuple(dict.fromkeys(pair for product in preset.products for pair in product.fields))
    return replace(preset, products=(Product(**choices, fields=fields),), layer_windows=0)


def search(
    plan: Sequence[Cell],
    store: Store,
    budget: Budget,
    at_once: int,
    compute: Callable[[list[Cell]], None],
) -> list[Cell]:
    """Evaluate cells until the budget is spent or none are left.

    Args:
        plan: the cells of a `space`.
        store: where results are read from and written to.
        budget: when to stop.
        at_once: cells per round, proposed before any of their results are known.
        compute: computes cells, and the cells they need, into the store.

    Returns:
        The quantized cells that are now in the store.

    Raises:
        RuntimeError: Optuna is not installed.
    """
    study = _Study([cell for cell in plan if cell.task == "quantized"])
    for cell in list(study.untried.values()):
        result = store.get(cell)
        if result is not None:
            study.tell(cell, result)
    spent, started = 0, time.monotonic()
    while (
        study.untried
        and spent < budget.cells
        and time.monotonic() - started < 60 * budget.minutes
    ):  # fmt: skip
        cells = study.propose(int(min(at_once, budget.cells - spent)))
        compute(cells)
        for cell in cells:
            result = store.get(cell)
            if result is None:
                raise RuntimeError(f"output: the result of {cell.label} vanished from the store")
            study.tell(cell, result)
        spent += len(cells)
    return study.tried


class _Study:
    """An Optuna study whose trials are cells. Each cell is told once."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise RuntimeError(
                f"the search needs a package that is not installed ({error}): "
                f"{install_command('search')}"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._random = optuna, random.Random(SEED)
        self.untried = {_choice(cell): cell for cell in cells}
        self.tried: list[Cell] = []
        self._trials: dict[str, Any] = {}  # {key of a proposed cell: its trial}
        values = [sorted(set(column)) for column in zip(*self.untried, strict=True)]
        self._values = dict(zip((name for _, name, _ in DIMENSIONS), values, strict=True))
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(0, len(self._values[name]) - 1)
            if is_ordered
            else optuna.distributions.CategoricalDistribution(self._values[name])
            for _, name, is_ordered in DIMENSIONS
        }
        sampler = optuna.samplers.TPESampler(
            seed=SEED, n_startup_trials=max(4, len(self.untried) // 10), constant_liar=True
        )
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)

    def propose(self, count: int) -> list[Cell]:
        """Propose up to `count` untried cells."""
        proposed: dict[str, Cell] = {}
        repeats = 0
        while len(proposed) < min(count, len(self.untried)):
            if repeats >= MAX_REPEATS:
                left = [c for c, cell in self.untried.items() if cell.key not in proposed]
                self._study.enqueue_trial(self._params(self._random.choice(left)))
            trial = self._study.ask(self._distributions)
            cell = self.untried.get(self._choice_of(trial.params))
            if cell is None or cell.key in proposed:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                repeats += 1
                continue
            proposed[cell.key], self._trials[cell.key], repeats = cell, trial, 0
        return list(proposed.values())

    def tell(self, cell: Cell, result: dict[str, Any]) -> None:
        """Record the result of a cell, whether it was proposed or not."""
        choice = _choice(cell)
        del self.untried[choice]
        self.tried.append(cell)
        trial, state = self._trials.pop(cell.key, None), self._optuna.trial.TrialState
        values: list[float] | None = [result["perplexity"], result["model_bytes"]]
        if result["perplexity"] is None:  # the model overflowed: there is no value to learn from
            values = None
        if trial is not None:
            self._study.tell(trial, values, state.FAIL if values is None else None)
        elif values is not None:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=self._params(choice), distributions=self._distributions, values=values
                )
            )

    def _params(self, choice: Choice) -> dict[str, Any]:
        return {
            name: self._values[name].index(value) if is_ordered else value
            for (_, name, is_ordered), value in zip(DIMENSIONS, choice, strict=True)
        }

    def _choice_of(self, params: dict[str, Any]) -> Choice:
        return tuple(
            self._values[name][params[name]] if is_ordered else params[name]
            for _, name, is_ordered in DIMENSIONS
        )


def _choice(cell: Cell) -> Choice:
    config = cell.config or {}
    return tuple(config[name] for _, name, _ in DIMENSIONS)
