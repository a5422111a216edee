"""Sweeps over quantization settings: `python -m run_experiments --help`."""

from .report import plot_results
from .run_experiments import find_front, main, run_experiments, sweep

__all__ = [
    "Evaluator",
    "find_front",
    "get_calib_dataset",
    "get_calib_feat",
    "main",
    "plot_results",
    "run_experiments",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name in __all__:  # the names that need torch
        from . import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
