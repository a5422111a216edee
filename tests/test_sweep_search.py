"""The search for the Pareto front of perplexity against size."""

import json
import math
import random
import sys

import pytest

from run_experiments import find_front, grid, runner
from run_experiments.grid import PRESETS
from run_experiments.rows import Row, front, stored_rows
from run_experiments.run_experiments import main
from run_experiments.search import Budget, space
from run_experiments.store import Store

GROUPS, SHARES, SORTS = (8, 16, 32, 64, 128, 256), (0.0, 0.01, 0.02, 0.05, 0.1), ("none", "rms")
PRESET = grid.override(PRESETS["tiny"], {"group_sizes": GROUPS, "salient_props": SHARES})
PRESET = grid.override(PRESET, {"sorts": SORTS, "backends": ("fake",)})


def score(config):
    """(perplexity, bytes) similar to real models.

    Smaller groups and more salient channels cost bytes, and most combinations are not on the front.
    """
    g, p = config["group_size"], config["salient_prop"]
    size = 1000 * (4 + 16 / g + 12 * p)
    worse = 0.0 if config["sort"] == "rms" else 4.0
    return 20 + 0.1 * g + 30 * math.exp(-60 * p) + worse, int(size)


@pytest.fixture
def computed(monkeypatch):
    """Make `score` compute the cells; a list of the keys of computed cells."""
    keys = []

    def run_cell(cell, bench):
        keys.append(cell.key)
        result = {"windows": 2, "seqlen": 128, "tokens": 254, "run": {}}
        if cell.config:
            perplexity, size = score(cell.config)
            result |= {"perplexity": perplexity, "model_bytes": size, "bits_per_weight": 4.5}
        else:
            result |= {"perplexity": 20.0, "model_bytes": 16000, "model_bytes_16_bit": 16000}
        return result

    class Bench:
        def __init__(self, *_, **__):
            pass

        def check(self, cells):
            pass

    monkeypatch.setattr(runner, "run_cell", run_cell)
    monkeypatch.setattr(runner, "Bench", Bench)
    return keys


def front_of(store, cells):
    rows = front(stored_rows(store, cells))
    return [(row.result["model_bytes"], row.result["perplexity"]) for row in rows]


def area(front):
    """The area that a front dominates, up to size 8000 and perplexity 80."""
    ends = [size for size, _ in front[1:]] + [8000]
    pairs = zip(front, ends, strict=True)
    return sum((end - size) * (80 - perplexity) for (size, perplexity), end in pairs)


def test_the_space_is_every_combination_of_the_choices():
    preset = space(PRESETS["rtn"])
    configs = grid.configs(preset.products)
    assert len(configs) == 3 * 4 * 5 and {c["backend"] for c in configs} == {"int4"}


def test_the_front_has_the_models_that_no_other_beats():
    def row(size, perplexity, backend="int4"):
        result = {"model_bytes": size, "perplexity": perplexity}
        return Row({"backend": backend, "group_size": 8}, result)

    rows = [row(5, 9.0), row(3, 20.0), row(4, 21.0), row(4, 15.0), row(6, 9.0), row(2, None)]
    best = front([*rows, row(1, 1.0, "fake"), Row(None, {"perplexity": 1.0})])
    assert best == [rows[1], rows[3], rows[0]]


@pytest.mark.long
def test_the_whole_space_gives_the_exact_front(computed, tmp_path):
    store = Store(tmp_path)
    cells = find_front(PRESET, store, Budget(), progress=False)
    assert len(computed) == len(set(computed)) == 2 + 60 and len(cells) == 62
    points = sorted({score(c.config)[::-1] for c in cells if c.config})
    expected = [
        p for p in points if not any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in points)
    ]
    assert front_of(store, cells) == expected


@pytest.mark.long
def test_a_third_of_the_space_gives_most_of_the_front_and_can_be_continued(computed, tmp_path):
    whole, part = Store(tmp_path / "whole"), Store(tmp_path / "part")
    everything = find_front(PRESET, whole, Budget(), progress=False)
    best = area(front_of(whole, everything))
    by_chance = [
        area(front_of(whole, random.Random(seed).sample(everything[2:], 20))) for seed in range(50)
    ]
    computed.clear()
    cells = find_front(PRESET, part, Budget(cells=20), progress=False)
    assert len(computed) == 2 + 20 == len(cells)
    assert area(front_of(part, cells)) > 0.95 * best
    assert area(front_of(part, cells)) > sum(by_chance) / len(by_chance)
    first = set(computed)
    cells = find_front(PRESET, part, Budget(cells=5), progress=False)
    assert len(computed) == 2 + 25 == len(cells) and first < set(computed)
    # stored results are free
    assert len(find_front(PRESET, whole, Budget(cells=1), progress=False)) == 62


def test_a_budget_in_minutes_ends_the_search(computed, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 60))  # every call is a minute later
    monkeypatch.setattr("run_experiments.search.time.monotonic", lambda: next(clock))
    cells = find_front(PRESET, Store(tmp_path), Budget(minutes=3.5), progress=False)
    assert len(cells) == 2 + 3


@pytest.mark.long
def test_models_that_overflow_are_computed_once(computed, tmp_path, monkeypatch):
    finite = runner.run_cell

    def run_cell(cell, bench):
        result = finite(cell, bench)
        return result | ({"perplexity": None} if (cell.config or {}).get("sort") == "none" else {})

    monkeypatch.setattr(runner, "run_cell", run_cell)
    store = Store(tmp_path)
    find_front(PRESET, store, Budget(cells=30), progress=False)
    cells = find_front(PRESET, store, Budget(), progress=False)
    assert len(computed) == 62 and all(math.isfinite(p) for _, p in front_of(store, cells))


@pytest.mark.parametrize("text", ["0", "-3", "m", "1.5", "0m", "infm", "nanm", "4h", ""])
def test_invalid_budgets_are_refused(text, capsys):
    with pytest.raises(ValueError, match="budget must be like"):
        Budget.from_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["--search", f"--budget={text}"])
    assert stop.value.code == 2 and "budget" in capsys.readouterr().err


def test_budgets_are_cells_or_minutes():
    assert Budget.from_text("40") == Budget(cells=40)
    assert Budget.from_text("1.5m") == Budget(minutes=1.5)


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch, computed):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RuntimeError, match=r"mixedquant\[search\]"):
        find_front(PRESET, Store(tmp_path), Budget(cells=1), progress=False)
    assert computed == []


@pytest.mark.long
def test_the_command_searches_real_models(tmp_path, capsys):
    """The tiny OPT with two workers: the command prints and draws a front."""
    arguments = ["--preset", "tiny", "--search", "--budget", "4", "--jobs", "2", "--threads", "1"]
    arguments += ["--output", str(tmp_path / "r"), "--figures", str(tmp_path / "f")]
    arguments += ["--group-sizes", "16", "64", "--salient-props", "0", "0.05", "0.2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 combinations" in printed and "Pareto front: " in printed
    records = [json.loads(path.read_text()) for path in (tmp_path / "r").glob("*.json")]
    assert sum(record["spec"]["task"] == "quantized" for record in records) == 4
