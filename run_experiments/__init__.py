"""Sweeps over quantization settings: `python -m run_experiments --help`."""

from .report import plot_results
from .run_experiments import (
    Evaluator,
    get_calib_dataset,
    get_calib_feat,
    main,
    run_experiments,
    sweep,
)

__all__ = [
    "Evaluator",
    "get_calib_dataset",
    "get_calib_feat",
    "main",
    "plot_results",
    "run_experiments",
    "sweep",
]
