"""Sweeps: specifications, the store, resuming, reports and the published functions."""

import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import plotly.offline
import pyarrow.parquet
import pytest
import torch

import run_experiments
from run_experiments import drawing, grid, page, report, runner, tables
from run_experiments.grid import PRESETS, Cell, Product
from run_experiments.peers import METHODS
from run_experiments.plots import plots_of
from run_experiments.rows import Row
from run_experiments.run_experiments import main
from run_experiments.store import Store
from smoothquant import load_quantized, quantize
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration import collect_stats, load_stats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.evaluation.perplexity import Evaluator
from smoothquant.model_size import Byte, get_model_size

ROOT = Path(__file__).resolve().parent.parent

TINY = PRESETS["tiny"]


def some_cells(preset=TINY):
    return grid.cells(
        preset,
        model={"name": "a", "files": {"model.safetensors": "00"}, "dtype": "float32"},
        versions={"torch": "2.13.0"},
        calibration_data={"data": "x", "split": "validation", "sha256": "01"},
        evaluation_data={"data": "x", "split": "test", "sha256": "02"},
    )


def results_in(folder):
    """{file name: bytes} of all finished cells."""
    files = [*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted sweep: (folder of the store, folder of the figures)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output, figures = folder / "results", folder / "figures"
    words = [
        "--preset",
        "tiny",
        "--output",
        output,
        "--figures",
        figures,
        "--keep",
        folder / "best",
    ]
    assert main(list(map(str, words))) == 0
    return output, figures


# ---- grid ----


def test_a_cell_survives_json_with_the_same_key():
    for cell in some_cells():
        again = Cell.from_json(cell.to_json())
        assert again == cell and again.key == cell.key
        shuffled = dict(reversed(list(json.loads(cell.to_json()).items())))
        assert Cell.from_json(json.dumps(shuffled)).key == cell.key


def test_the_key_never_changes():
    # A changed key discards every finished cell of every user: change it only on purpose.
    assert some_cells()[1].key == "c0ea1bacbbc437ecb1d7111bf5ad083597cdf2af822cdb5bbd481de105b3440d"


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "a", "files": {"model.safetensors": "ff"}, "dtype": "float32"}},
        {"versions": {"torch": "2.14.0"}},
        {"calibration_data": {"data": "x", "split": "validation", "sha256": "ff"}},
        {"evaluation_data": {"data": "x", "split": "test", "sha256": "ff"}},
    ],
)
def test_the_key_depends_on_every_input(change):
    parts = {
        "model": {"name": "a", "files": {"model.safetensors": "00"}, "dtype": "float32"},
        "versions": {"torch": "2.13.0"},
        "calibration_data": {"data": "x", "split": "validation", "sha256": "01"},
        "evaluation_data": {"data": "x", "split": "test", "sha256": "02"},
    }
    quantized = grid.cells(TINY, **parts)[-1]
    assert grid.cells(TINY, **(parts | change))[-1].key != quantized.key
    for field in ("seed", "calibration_blocks", "windows", "seqlen"):
        other = dataclasses.replace(TINY, **{field: getattr(TINY, field) + 1})
        assert grid.cells(other, **parts)[-1].key != quantized.key
    for field, value in (("sort", "max"), ("num_bits", 3), ("act_clip", 0.9)):
        other = dataclasses.replace(quantized, config={**quantized.config, field: value})
        assert other.key != quantized.key


def test_presets():
    assert len(some_cells(PRESETS["default"])) == 2 + 4 + 1
    assert len(some_cells(PRESETS["rtn"])) == 2 + 12 + 4 + 4
    assert len(some_cells(PRESETS["recipes"])) == 2 + 3 * 3 * 2
    assert len(some_cells(PRESETS["peers"])) == 2 + 2 * 2 + 1 + 4
    assert len(some_cells(PRESETS["paper"])) == 2 + 9 * 4
    for preset in PRESETS.values():
        keys = [cell.key for cell in some_cells(preset)]
        assert len(set(keys)) == len(keys)


def test_equal_settings_make_one_cell():
    products = [Product((8, 8), (0, 0.0, 0.05)), Product((8,), (0.05,))]
    assert len(grid.configs(products)) == 2


def test_recipes_and_methods_are_dimensions():
    product = Product((16, 64), (0.05,), recipes=("rtn", "best"), methods=("mixedquant", *METHODS))
    configs = grid.configs([product])
    recipes = [(c["recipe"], c["group_size"]) for c in configs if "recipe" in c]
    assert recipes == [("rtn", 16), ("rtn", 64), ("best", 16), ("best", 64)]
    assert {c["weight_rounding"] for c in configs if c.get("recipe") == "best"} == {"gptq"}
    # a method without groups makes one cell, whatever the group sizes
    assert [c for c in configs if "method" in c] == [
        {"method": "per-token-rtn", "group_size": None},
        {"method": "smoothquant-style", "group_size": None},
        *({"method": "quarot-style", "group_size": g} for g in (16, 64)),
        *({"method": "atom-style", "group_size": g} for g in (16, 64)),
    ]


def test_fields_apply_to_every_combination():
    product = Product((16, 64), (0.0,), recipes=("rtn", "fast"), fields=(("act_clip", 0.5),))
    configs = grid.configs([product])
    assert len(configs) == 4 and {c["act_clip"] for c in configs} == {0.5}


def test_cells_record_their_number_of_calibration_blocks():
    products = (Product((64,), (0.0,), recipes=("rtn", "best"), methods=("mixedquant", *METHODS)),)

    def calibrations(**fields):
        plan = some_cells(dataclasses.replace(TINY, products=products, **fields))
        quantized = {c.settings: c for c in plan if c.task == "quantized"}
        return quantized, [c.calibration["blocks"] for c in plan if c.task == "calibration"]

    cells, blocks = calibrations()
    assert blocks == [TINY.calibration_blocks, TINY.gptq_blocks]
    assert cells["rtn g=64 p=0% sort=rms"].calibration["blocks"] == TINY.calibration_blocks
    assert cells["best g=64 p=0% sort=rms"].calibration["blocks"] == TINY.gptq_blocks
    assert cells["atom-style g=64"].calibration["blocks"] == TINY.gptq_blocks
    # more tokens for GPTQ do not affect settings without GPTQ
    others, _ = calibrations(gptq_blocks=17)
    changed = {name for name in cells if others[name].key != cells[name].key}
    assert changed == set(cells) - {"rtn g=64 p=0% sort=rms"}
    assert len(calibrations(gptq_blocks=TINY.calibration_blocks)[1]) == 1


def test_layer_errors_are_measured_for_packed_models():
    plan = some_cells(dataclasses.replace(TINY, layer_windows=3))
    layers = [cell for cell in plan if cell.task == "layers"]
    packed = [c for c in plan if c.task == "quantized" and c.config["backend"] == "int4"]
    assert [c.config for c in layers] == [c.config for c in packed]
    assert {c.evaluation["windows"] for c in layers} == {3}


def test_override_replaces_in_every_product():
    preset = grid.override(PRESETS["rtn"], {"backends": ("fake",)}, windows=2)
    assert {config["backend"] for config in grid.configs(preset.products)} == {"fake"}
    assert preset.windows == 2


# ---- store ----


def test_the_store_returns_what_was_put(tmp_path):
    cell, other = some_cells()[:2]
    store = Store(tmp_path / "new" / "folder")
    assert store.get(cell) is None
    store.put(cell, {"perplexity": 1.0000000000000002, "run": {}})
    assert store.get(cell) == {"perplexity": 1.0000000000000002, "run": {}}
    assert store.get(other) is None
    assert sorted(path.name for path in store.folder.iterdir()) == [f"{cell.key}.json", "runs"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1.5", "2.5"),
        lambda text: text.replace('"checksum"', '"check"'),
        lambda text: text.replace('"format_version": 2', '"format_version": 9'),
        lambda text: text.replace("tiny", "huge"),
        lambda text: "[]",
        lambda text: "\0" * 100,
    ],
)
def test_a_damaged_cell_is_moved_aside_with_a_warning(tmp_path, damage):
    cell = dataclasses.replace(some_cells()[1], model={"name": "tiny"})
    store = Store(tmp_path)
    store.put(cell, {"perplexity": 1.5, "run": {}})
    path = store.path(cell)
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"{path.name}.*damaged.*will be computed again"):
        assert store.get(cell) is None
    assert not path.exists() and path.with_name(path.name + ".damaged").exists()


def test_a_failed_write_keeps_the_old_cell(tmp_path, monkeypatch):
    cell = some_cells()[1]
    store = Store(tmp_path)
    store.put(cell, {"perplexity": 1.5, "run": {}})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                store.put(cell, {"perplexity": 2.5, "run": {}})
        assert store.get(cell)["perplexity"] == 1.5
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_the_store_refuses_a_file_as_its_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output.*file"):
        Store(tmp_path / "file")


# ---- sweeps ----

RECIPES = grid.override(
    TINY,
    {
        "group_sizes": (64,),
        "salient_props": (0.05,),
        "sorts": ("rms",),
        "backends": ("int4",),
        "recipes": ("rtn", "best"),
        "methods": ("mixedquant", *METHODS),
    },
    layer_windows=1,
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A sweep over recipes and methods, with layer errors: (store, cells, {settings: result})."""
    store = Store(tmp_path_factory.mktemp("recipes"))
    plan = run_experiments.sweep(RECIPES, store, progress=False)
    rows = {c.settings: store.get(c) for c in plan if c.task == "quantized"}
    return store, plan, rows


@pytest.mark.long
def test_recipes_and_methods_are_compared_with_the_16_bit_model(compared):
    _, plan, rows = compared
    assert len(plan) == 2 + 1 + 2 + 4 + 2
    for result in rows.values():
        assert result["kl"] > 0 and 0 < result["top1"] < 1
    rtn, best = (rows[f"{recipe} g=64 p=5% sort=rms"] for recipe in ("rtn", "best"))
    assert best["kl"] < 0.7 * rtn["kl"] and best["top1"] > rtn["top1"]
    assert best["bits_per_weight"] == rtn["bits_per_weight"]
    assert rows["quarot-style g=64"]["kl"] < 0.5 * rows["per-token-rtn"]["kl"]
    assert rows["quarot-style g=64"]["bits_per_weight"] == 4.25


def test_scores_match_the_evaluator(compared):
    _, _, rows = compared
    model, tokenizer = load_bundled("tiny-opt")
    blocks = runner.calibration_blocks(
        tokenizer, {"split": "validation", "blocks": 16, "block_size": 128, "seed": TINY.seed}
    )
    quantized = runner.module_copy(model)
    config = MixedQuantConfig(
        recipe="best", group_size=64, salient_prop=0.05, head="16bit", embeddings="16bit"
    )
    quantize(quantized, config, collect_stats(model, blocks), blocks, progress=False)
    evaluator = Evaluator(wikitext("test"), tokenizer, "cpu", 2, seq_len=128, progress=False)
    expected = evaluator.compare(quantized, model)
    actual = rows["best g=64 p=5% sort=rms"]
    assert actual["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert actual["kl"] == pytest.approx(expected.kl, abs=1e-6)
    assert actual["top1"] == pytest.approx(expected.top1)


@pytest.mark.long
def test_without_stored_head_inputs_the_baseline_runs_again(compared, tmp_path, monkeypatch):
    """A model that scales its logits stores none: the scores are the same, but take longer."""
    monkeypatch.setattr(
        Evaluator, "head_inputs", lambda self, model: (self.token_nlls(model), None)
    )
    preset = grid.override(RECIPES, {"recipes": ("rtn",), "methods": ("mixedquant",)})
    store = Store(tmp_path)
    plan = run_experiments.sweep(
        dataclasses.replace(preset, layer_windows=0), store, progress=False
    )
    assert not store.artifact(plan[1]).exists()
    (cell,) = (c for c in plan if c.task == "quantized")
    actual, expected = store.get(cell), compared[2][cell.settings]
    assert actual["kl"] == pytest.approx(expected["kl"], abs=1e-6)
    assert actual["perplexity"] == expected["perplexity"] and actual["top1"] == expected["top1"]


@pytest.mark.long
def test_a_damaged_reference_is_computed_again(finished, tmp_path, capsys):
    output, _ = finished
    store = Store(shutil.copytree(output, tmp_path / "results"))
    baseline = run_experiments.sweep(TINY, store, progress=False)[1]
    before = store.artifact(baseline).read_bytes()
    store.artifact(baseline).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.warns(UserWarning, match="damaged"):
        run_experiments.sweep(TINY, store, progress=False)
    assert "8 cells: 7 already in" in capsys.readouterr().out
    assert store.artifact(baseline).read_bytes() == before


@pytest.mark.long
def test_layer_errors_are_stored_and_drawn(compared, tmp_path):
    store, plan, _ = compared
    cells = [cell for cell in plan if cell.task == "layers"]
    results = [store.get(cell) for cell in cells]
    kinds = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "hidden"]
    for result in results:
        assert result["compared"] == ["int4", "fake", "int4 - fake"]
        places = [(error["layer"], error["kind"]) for error in result["errors"]]
        assert places == [(layer, kind) for layer in range(4) for kind in kinds]
        for error in result["errors"]:
            int4, fake, pair = (error["decibels"][name] for name in result["compared"])
            assert 5 < int4 < pair
            assert error["kind"] == "hidden" or int4 == pytest.approx(fake, abs=0.01)
    rtn, best = (
        sum(e["decibels"]["int4"] for e in r["errors"]) / len(r["errors"]) for r in results
    )
    assert best > rtn + 1

    _, paths = report.write(store, plan, "tiny-opt", tmp_path, "command")
    picture = tmp_path / "tiny-opt_layers_best_g64_p5_sortrms.png"
    assert picture in paths and picture.read_bytes().startswith(b"\x89PNG")
    lines = list(csv.reader(picture.with_suffix(".csv").open()))
    assert lines[0] == ["layer", "kind", "int4", "fake", "int4 - fake"] and len(lines) == 29
    assert float(lines[1][2]) == results[1]["errors"][0]["decibels"]["int4"]
    page = (tmp_path / "tiny-opt_results.md").read_text()
    assert "Signal-to-error ratio in dB, best g=64 p=5% sort=rms, int4, 1 window of 128" in page
    assert "Calibration for rtn: " in page and "Calibration for best, per-token-rtn, " in page
    assert "simulated in floating point" in page


@pytest.mark.long
def test_fused_experts_are_refused_before_any_work(tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(runner, "run_cell", None)
    make_model("mixtral", vocab_size=2048).save_pretrained(tmp_path / "moe")
    load_bundled("tiny-opt")[1].save_pretrained(tmp_path / "moe")
    preset = dataclasses.replace(
        RECIPES, model=str(tmp_path / "moe"), seqlen=32, calibration_block_size=32
    )
    with pytest.raises(
        ValueError, match="only mixedquant can quantize fused experts: model.layers.0.mlp.experts"
    ):
        run_experiments.sweep(preset, Store(tmp_path / "results"), progress=False)


def test_results_are_complete(finished):
    output, _ = finished
    records = [json.loads(path.read_text()) for path in output.glob("*.json")]
    assert len(records) == 8
    for record in records:
        result = record["result"]
        run = json.loads((output / "runs" / f"{record['key']}.json").read_text())
        assert run["chip"] and run["isa"] and run["threads"] >= 1
        if record["spec"]["task"] == "calibration":
            continue
        assert result["tokens"] == TINY.windows * (TINY.seqlen - 1)
        assert result["perplexity"] == pytest.approx(torch.tensor(result["nll"]).exp().item())
        if record["spec"]["task"] == "quantized" and record["spec"]["config"]["backend"] == "int4":
            assert result["file_payload_bytes"] == result["model_bytes"] > 0
            assert 4 < result["bits_per_weight"] < 16


def test_int4_and_simulation_agree(finished):
    output, _ = finished
    perplexity = {}
    for path in output.glob("*.json"):
        record = json.loads(path.read_text())
        config = record["spec"]["config"] or {}
        if (config.get("group_size"), config.get("salient_prop"), config.get("sort")) == (
            64, 0.05, "rms",
        ):  # fmt: skip
            perplexity[config["backend"]] = record["result"]["perplexity"]
    assert perplexity["int4"] == pytest.approx(perplexity["fake"], rel=0.03)


def test_a_simulation_uses_the_packed_codes_if_they_support_its_settings():
    fields = MixedQuantConfig(backend="fake", recipe="best", group_size=16).to_dict()
    assert runner._packable(fields).backend == "int4"
    assert runner._packable({**fields, "num_bits": 6}).backend == "fake"


def test_a_second_run_computes_nothing(finished, tmp_path, capsys, monkeypatch):
    output, _ = finished

    def forbidden(*_, **__):
        raise AssertionError("a finished cell was computed, or its model loaded")

    monkeypatch.setattr(runner, "run_cell", forbidden)
    monkeypatch.setattr(runner, "load_model", forbidden)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    arguments = ["--preset", "tiny", "--output", str(output), "--figures", str(tmp_path)]
    assert main(arguments) == 0
    assert "All 8 cells are in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


@pytest.mark.long
def test_more_cells_reuse_calibration_and_baseline(finished, tmp_path, capsys):
    output, _ = finished
    store = shutil.copytree(output, tmp_path / "results")
    preset = grid.override(TINY, {"group_sizes": (32,), "salient_props": (0.1,)})
    run_experiments.sweep(preset, Store(store), progress=False)
    assert "5 cells: 2 already in" in capsys.readouterr().out


@pytest.mark.long
def test_published_cells_are_imported(finished, tmp_path, capsys):
    output, figures = finished
    published = figures / "tiny-opt_cells.jsonl"
    arguments = ["--preset", "tiny", "--output", str(tmp_path / "results")]
    arguments += ["--cells", str(published), "--figures", str(tmp_path / "figures")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    # only cells that store tensors are computed again
    assert "Imported 6 cells from" in printed and "8 cells: 6 already in" in printed
    assert results_in(tmp_path / "results") == results_in(output)
    assert (tmp_path / "figures" / published.name).read_bytes() == published.read_bytes()
    assert Store(tmp_path / "results").adopt(published) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda line: line[:-5], "line 2 of .*not a record"),
        (lambda line: line.replace('"perplexity": ', '"perplexity": 1'), "checksum"),
        (lambda line: line.replace('"quantized"', '"calibration"'), "line 2 of .*not a record"),
        (lambda line: "[]", "line 2 of .*not a record"),
    ],
)
def test_invalid_published_cells_are_refused(finished, tmp_path, change, message, capsys):
    lines = (finished[1] / "tiny-opt_cells.jsonl").read_text().splitlines()
    lines[1] = change(lines[1])
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join(lines))
    arguments = ["--preset", "tiny", "--output", str(tmp_path / "results"), "--cells", str(path)]
    assert main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list((tmp_path / "results").iterdir()) == []
    with pytest.raises(ValueError, match="cells: cannot read .*nothing"):
        Store(tmp_path / "results").adopt(tmp_path / "nothing")


def test_damaged_statistics_are_collected_again(finished, tmp_path, capsys):
    output, _ = finished
    store = Store(shutil.copytree(output, tmp_path / "results"))
    (calibration,) = (c for c in run_experiments.sweep(TINY, store) if c.task == "calibration")
    statistics = store.artifact(calibration)
    before = load_stats(statistics)
    contents = statistics.read_bytes()
    statistics.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.warns(UserWarning, match="damaged"):
        run_experiments.sweep(TINY, store, progress=False)
    assert "8 cells: 7 already in" in capsys.readouterr().out
    after = load_stats(statistics)
    assert all(torch.equal(after[name].sq_sum, before[name].sq_sum) for name in before)


@pytest.mark.long
def test_a_cell_does_not_change_the_float_model(tmp_path):
    store = Store(tmp_path)
    bench = runner.Bench("tiny-opt", "float32", store, progress=False)
    model, _ = bench.loaded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    preset = grid.override(TINY, {"group_sizes": (64,), "salient_props": (0.05,)})
    for cell in grid.cells(
        preset,
        model=bench.identity(),
        versions=runner.package_versions(),
        calibration_data=runner.wikitext_identity("validation"),
        evaluation_data=runner.wikitext_identity("test"),
    ):
        store.put(cell, runner.run_cell(cell, bench))
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.long
def test_killed_sweeps_resume_to_the_same_results(finished, tmp_path):
    output, _ = finished
    store = tmp_path / "results"
    command = [sys.executable, "-m", "run_experiments", "--preset", "tiny"]
    command += ["--output", str(store), "--figures", str(tmp_path / "figures"), "--threads", "1"]
    generator = random.Random(0)
    kills, cells_at_kill = 0, []
    for wanted in (1, 2, 4, 7):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Kill it shortly after the wanted number of cells, in the middle of some work or a write.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if store.is_dir() and len(list(store.glob("*.json"))) >= wanted:
                time.sleep(generator.uniform(0, 0.02))
                break
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        cells_at_kill.append(len(list(store.glob("*.json"))))
        for path in store.glob("*.json"):
            json.loads(path.read_text())
    assert kills >= 2, cells_at_kill
    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert results_in(store) == results_in(output)
    assert not list(store.glob("*.damaged"))


def test_an_interrupt_says_how_to_resume(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_cell", interrupted)
    assert main(["--preset", "tiny", "--output", str(tmp_path / "r")]) == 130
    message = capsys.readouterr().err
    assert "continue with" in message and "--preset tiny" in message


# ---- bad arguments ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group-sizes", "0"], "--group-sizes.*0"),
        (["--salient-props", "1.5"], "--salient-props.*1.5"),
        (["--sorts", "size"], "--sorts.*size"),
        (["--backends", "int5"], "--backends.*int5"),
        (["--recipes", "good"], "--recipes.*good"),
        (["--methods", "magic"], "--methods must be one of mixedquant, per-token-rtn.*magic"),
        (["--methods", "atom-style", "--group-sizes", "0"], "--group-sizes.*0"),
        (["--set", "act_clip=2"], "act_clip.*2"),
        (["--set", "clip=0.9"], "unknown MixedQuantConfig field.*clip"),
        (["--gptq-blocks", "0"], "--gptq-blocks.*0"),
        (["--calibration-blocks", "0"], "--calibration-blocks.*0"),
        (["--layers", "-1"], "--layers.*-1"),
        (["--layers", "100000"], "--layers.*100000"),
        (["--windows", "0"], "--windows.*0"),
        (["--windows", "100000"], "--windows.*100000"),
        (["--seqlen", "1"], "--seqlen.*1"),
        (["--seqlen", "1000000"], "--seqlen"),
        (["--model", "no/such folder"], "no/such folder"),
        (["--executor", "cloud"], "^error: --executor must be one of local.*cloud"),
        (["--executor", "dask://host"], "^error: --executor must be one of"),
        (["--jobs", "0"], "^error: --jobs.*0"),
        (["--slurm", "timeout_min=5"], "^error: --slurm: .*local"),
    ],
)
def test_invalid_values_are_named_before_any_work(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(runner, "run_cell", None)
    output = tmp_path / "results"
    assert main(["--preset", "tiny", "--output", str(output), *arguments]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.search(message, line)
    assert not list(output.glob("*.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "huge"],
        ["--windows", "some"],
        ["--threads", "0"],
        ["--group-sizes", "x"],
        ["--set", "act_clip"],
    ],
)
def test_invalid_flags_exit_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# ---- report ----


def fake_row(group_size, salient_prop, perplexity, **config):
    fields = {"num_bits": 4, "sort": "rms", "backend": "int4", "recipe": "rtn"} | config
    run = {"chip": "c", "isa": "scalar", "threads": 1, "date": "2026-01-01", "tokens_per_s": 1.0}
    result = {"perplexity": perplexity, "windows": 2, "seqlen": 128, "run": run}
    result |= {"model_bytes": 2**20, "bits_per_weight": 4.5}
    config = fields | {"group_size": group_size, "salient_prop": salient_prop}
    return Row(config, result)


def test_figures_and_their_data(finished):
    _, figures = finished
    names = sorted(path.name for path in figures.iterdir())
    plots = ("kl_vs_bits", "pareto", "ppl_vs_bits", "ppl_vs_group_size", "size_vs_group_size")
    assert names == sorted(
        [f"tiny-opt_{plot}.{kind}" for plot in plots for kind in ("png", "svg", "csv")]
        + ["tiny-opt_results.md"]
        + [f"tiny-opt_cells.{kind}" for kind in ("csv", "jsonl", "parquet")]
    )
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with open(figures / "tiny-opt_ppl_vs_group_size.csv") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["series", "Group size", "Perplexity", "point"]
    assert [line[0] for line in lines[1:]] == ["0 % salient"] * 2 + ["5 % salient"] * 2 + [
        "16-bit model"
    ]
    page = (figures / "tiny-opt_results.md").read_text()
    for part in ("python -m run_experiments --preset tiny", "Chip:", "Threads:", "Date:", "int4"):
        assert part in page


def test_the_store_is_one_table(finished):
    output, figures = finished
    table = pyarrow.parquet.read_table(figures / "tiny-opt_cells.parquet").to_pylist()
    with open(figures / "tiny-opt_cells.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(table) == len(lines) == 8
    for row, line in zip(table, lines, strict=True):
        record = json.loads((output / f"{row['key']}.json").read_text())
        assert row["result.perplexity"] == record["result"].get("perplexity")
        assert row["config.group_size"] == (record["spec"]["config"] or {}).get("group_size")
        assert row["run.threads"] >= 1 and row["versions.torch"] == torch.__version__
        assert {k: str("" if v is None else v) for k, v in row.items()} == line


@pytest.mark.long
def test_figures_are_drawn_from_the_store_alone(finished, tmp_path):
    """A process that can import neither torch nor smoothquant draws the same files."""
    output, figures = finished
    script = """
import importlib.util, json, pathlib, sys, types
sys.modules["torch"] = sys.modules["smoothquant"] = None
package = types.ModuleType("run_experiments")
package.__path__ = [sys.argv[1] + "/run_experiments"]
sys.modules["run_experiments"] = package
from run_experiments import report
from run_experiments.grid import Cell
from run_experiments.store import Store
store = Store(sys.argv[2])
records = [json.loads(p.read_text()) for p in sorted(store.folder.glob("*.json"))]
cells = [Cell(**record["spec"]) for record in records]
report.write(store, cells, "tiny-opt", sys.argv[3], "command")
"""
    subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(output), str(tmp_path)], check=True
    )
    for name in ("tiny-opt_ppl_vs_group_size.csv", "tiny-opt_size_vs_group_size.csv"):
        assert (tmp_path / name).read_text() == (figures / name).read_text()
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_the_table_marks_a_perplexity_that_is_not_finite():
    text = tables.table([fake_row(8, 0.0, None), fake_row(16, 0.05, 12.5)])
    assert "not finite" in text and "12.50" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_the_table_shows_kl_top1_and_the_bits_of_other_methods():
    row = fake_row(16, 0.05, 12.5)
    row.result.update(kl=0.12345, top1=0.6789)
    other = fake_row(128, 0.0, 20.0)
    other = Row({"method": "atom-style", "group_size": 128}, other.result)
    text = tables.table([row, other, fake_row(8, 0.05, 13.0, backend="fake")])
    lines = [[field.strip() for field in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0][:1] + lines[0][-5:-1] == ["method", "PPL", "vs 16-bit", "KL", "top-1"]
    fields = dict(zip(lines[0], lines[2], strict=True))
    assert fields["method"] == "rtn" and fields["KL"] == "0.1235" and fields["top-1"] == "67.9 %"
    assert lines[3][:7] == ["atom-style", "128", "-", "-", "fake", "4.500", "-"]
    assert lines[4][:7] == ["rtn", "8", "5 %", "rms", "fake", "-", "-"]


def test_figures_have_a_line_per_recipe_share_and_other_method():
    rows = [
        fake_row(g, p, 10.0 + g, recipe=recipe)
        for recipe in ("rtn", "fast", "best")
        for p in (0.05, 0.1)
        for g in (32, 128)
    ]
    other = Row({"method": "atom-style", "group_size": 128}, rows[0].result)
    plots = plots_of([*rows, other, fake_row(8, 0.05, None)], "m", "float32")
    labels = [f"{r}, {p} % salient" for r in ("rtn", "fast", "best") for p in (5, 10)]
    assert [line.label for line in plots["ppl_vs_group_size"].series] == labels
    assert [line.label for line in plots["ppl_vs_bits"].series] == [*labels, "atom-style"]
    assert [line.label for line in plots["size_vs_group_size"].series] == [
        "5 % salient",
        "10 % salient",
    ]
    styles = drawing.styles(plots["ppl_vs_bits"].series)
    assert len(set(styles)) == 7
    assert len({colour for colour, _, _ in styles}) == 4
    assert "kl_vs_bits" not in plots  # no KL was measured
    assert plots_of([other], "m", "float32") == {}


def test_the_sort_figure_has_a_line_per_key_at_the_share_with_most_cells():
    rows = [
        fake_row(g, p, 10.0 + g, sort=sort)
        for sort in ("none", "rms")
        for p in (0.05, 0.1)
        for g in (128, 32)
    ]
    rows += [fake_row(32, 0.05, 9.0, sort=sort, backend="fake") for sort in ("max", "argmax")]
    plot = plots_of(rows, "m", "float32")["ppl_by_sort"]
    assert [line.label for line in plot.series] == ["unsorted", "rms"]
    assert plot.series[0].points == ((32, 42.0), (128, 138.0))
    assert "rtn, 10 % salient" in plot.about
    assert "ppl_by_sort" not in plots_of(rows[:4], "m", "float32")


def test_layer_table_and_colours_of_missing_values():
    errors = [
        {"layer": layer, "kind": kind, "decibels": {"int4": value}}
        for layer, kind, value in [(None, "head", 3.0), (0, "fc1", None), (0, "fc2", 20.04)]
    ]
    lines = tables.layer_table(errors).splitlines()
    assert [field.strip() for field in lines[2].split("|")[1:-1]] == ["-", "3.0", "-", "-"]
    assert [field.strip() for field in lines[3].split("|")[1:-1]] == ["0", "-", "-", "20.0"]
    values = [[float(i) for i in range(100)], [None, 1e6]]
    low, high = drawing.colour_range(values)
    assert low == 5 and high == 95
    assert drawing.colour_range([[None]]) == (0, 0)


def test_spread_keeps_order_and_distance():
    generator = random.Random(0)
    for _ in range(200):
        wanted = sorted(generator.uniform(0, 1) for _ in range(generator.randint(1, 8)))
        placed = drawing.spread(wanted, 0.05, 0.0, 1.0)
        gaps = [b - a for a, b in zip(placed, placed[1:], strict=False)]
        assert all(gap >= 0.05 - 1e-9 for gap in gaps)
        assert placed[0] >= 0 and placed[-1] <= 1 + 1e-9
    assert drawing.spread([0.2, 0.5], 0.1, 0.0, 1.0) == [0.2, 0.5]
    # a cluster that the lower end pushes up pushes up the next one
    placed = drawing.spread([*[0.0] * 5, 0.17], 0.05, 0.0, 1.0)
    assert placed == pytest.approx([0.05 * i for i in range(6)])


def test_the_page_works_offline(compared, tmp_path):
    store, plan, _ = compared
    path = page.write(store, plan, "some/tiny-opt", tmp_path, "command <with> &")
    text = path.read_text()
    assert path.name == "tiny-opt_report.html" and "command &lt;with&gt; &amp;" in text
    assert "<!-- " not in text.replace(plotly.offline.get_plotlyjs(), "")
    # nothing is fetched: the page has no external reference
    own_text = text.replace(plotly.offline.get_plotlyjs(), "")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']|@import|url\(""", own_text)
    for name in ("ppl_vs_bits", "kl_vs_bits", "layers"):
        assert f'id="chart-{name}"' in own_text
    assert "vs_group_size" not in own_text  # there is only one group size
    (models,) = re.findall(r'<script id="models" type="application/json">(.*?)</script>', own_text)
    models = {model["key"]: model for model in json.loads(models)}
    evaluated = [cell for cell in plan if cell.task in ("baseline", "quantized")]
    assert list(models) == [cell.key for cell in evaluated]
    for cell in evaluated:
        model, result = models[cell.key], store.get(cell)
        assert model["perplexity"] == result["perplexity"]
        assert model["spec"] == json.loads(cell.to_json()) and model["run"] == result["run"]
    # every point in a chart is a model in the table
    keys = re.findall(r'"customdata":\[("[0-9a-f]{64}"(?:,"[0-9a-f]{64}")*)\]', own_text)
    assert len(keys) >= 3
    assert {key for line in keys for key in json.loads(f"[{line}]")} <= set(models)
    before = path.read_bytes()
    assert page.write(store, plan, "tiny-opt", tmp_path, "command <with> &").read_bytes() == before


def test_the_best_model_is_kept_and_writes_a_sentence(finished, tmp_path, capsys):
    output, _ = finished
    folder = output.parent / "best"
    cells = [json.loads(path.read_text()) for path in output.glob("*.json")]
    packed = [c for c in cells if (c["spec"]["config"] or {}).get("backend") == "int4"]
    best = min(packed, key=lambda cell: cell["result"]["perplexity"])
    assert json.loads((folder / "cell.json").read_text()) == best["spec"]
    assert get_model_size(load_quantized(folder)) // Byte == best["result"]["model_bytes"]
    assert f"{best['result']['perplexity']:.5g}" in (folder / "README.md").read_text()

    written = (folder / "model.safetensors").read_bytes()
    words = ["--preset", "tiny", "--output", output, "--keep", folder]
    assert main(list(map(str, words))) == 0
    assert (output / "figures" / "tiny-opt_results.md").is_file()  # by default beside the results
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("Most accurate: rtn g=") and "16-bit model: " in lines[-4]
    assert lines[-3].startswith("It writes: The capital of France is")
    assert lines[-2] == f"Model: {folder}"
    assert lines[-1].startswith("Next: ") and f" generate {folder} " in lines[-1]
    assert any(line.startswith("| rtn ") for line in lines[-9:])

    # without the kept model, it is made again from the stored statistics, with the same bytes
    run_experiments.sweep(TINY, Store(output), keep=tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="folder already exists: .*taken"):
        run_experiments.sweep(TINY, Store(output), keep=tmp_path / "taken", progress=False)


@pytest.mark.long
def test_a_sweep_shows_no_bars_in_a_log(tmp_path):
    words = ["--preset", "tiny", "--group-sizes", "64", "--keep", "kept"]
    run = subprocess.run(
        [sys.executable, "-m", "run_experiments", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "\r" not in run.stderr + run.stdout and "%|" not in run.stderr + run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "results"]


def test_the_report_command_computes_nothing(finished, tmp_path, monkeypatch, capsys):
    output, figures = finished
    monkeypatch.setattr(runner, "run_cell", None)
    arguments = ["--preset", "tiny", "--output", str(output), "--figures", str(tmp_path)]
    assert main(["report", *arguments]) == 0
    pictures = {path.name: path.read_bytes() for path in figures.glob("*.svg")}
    assert len(pictures) == 5
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == pictures
    assert "tiny-opt_report.html" in capsys.readouterr().out


def test_without_plotly_the_page_names_the_extra(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    arguments = ["--preset", "tiny", "--output", str(finished[0]), "--figures", str(tmp_path)]
    assert main(["report", *arguments]) == 1
    assert re.search(r"error: .*mixedquant\[experiments\]", capsys.readouterr().err)


# ---- published names ----


def test_published_run_experiments(tmp_path):
    arguments = {"group_sizes": [64, 128], "salient_props": [0, 0.05], "preset": "tiny"}
    results, group_sizes = run_experiments.run_experiments("tiny-opt", **arguments, output=tmp_path)
    assert group_sizes == [64, 128]
    assert set(results) == {"perplexity", "model_size"}
    for values in results.values():
        assert list(values) == [0, 0.05]
        assert all(len(line) == 2 and min(line) > 0 for line in values.values())
    assert results["perplexity"][0.05][0] < results["perplexity"][0][0]
    assert run_experiments.run_experiments("tiny-opt", **arguments, output=tmp_path)[0] == results


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cuda"}, "device.*cuda"),
        ({"group_sizes": [0]}, "group_size.*0"),
        ({"salient_props": [-1]}, "salient_prop.*-1"),
        ({"preset": "none"}, "preset.*none"),
        ({"model_name": "a b"}, "a b"),
    ],
)
def test_published_run_experiments_names_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_experiments.run_experiments(
            **({"model_name": "tiny-opt", "output": tmp_path} | arguments)
        )


def test_published_plot_results(tmp_path):
    results = {
        "perplexity": {0: [9.0, 10.0], 0.05: [7.0, None]},
        "model_size": {0: [3.0, 2.0], 0.05: [4.0, 3.0]},
    }
    paths = run_experiments.plot_results(results, [4, 1024], "some/Model-7b", tmp_path)
    assert [path.name for path in paths] == [
        "Model-7b_ppl_vs_group_size.png",
        "Model-7b_size_vs_group_size.png",
    ]
    assert all(path.is_file() and path.with_suffix(".csv").is_file() for path in paths)
    with pytest.raises(ValueError, match="model_size"):
        run_experiments.plot_results({"perplexity": {}}, [4], "m", tmp_path)
    with pytest.raises(ValueError, match="2 values.*got 1"):
        run_experiments.plot_results({"perplexity": {0: [1.0]}}, [4, 8], "m", tmp_path)


@pytest.mark.long
def test_published_calibration_and_evaluator(capsys):
    model, tokenizer = load_bundled("tiny-opt")
    blocks = run_experiments.get_calib_dataset(tokenizer, n_samples=16, block_size=64)
    assert len(blocks) > 1 and all(block.shape == (1, 64) for block in blocks)
    assert f"Split into {len(blocks)} blocks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="tokenizer"):
        run_experiments.get_calib_dataset()
    with pytest.raises(ValueError, match="block_size.*0"):
        run_experiments.get_calib_dataset(tokenizer, block_size=0)

    features = run_experiments.get_calib_feat(model, tokenizer)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(features) == set(linears)
    entry = features["model.decoder.layers.0.fc1"]
    assert isinstance(entry, list) and entry[0].shape == (model.config.hidden_size,)

    evaluator = run_experiments.Evaluator(
        {"text": wikitext("test")}, tokenizer, "cpu", n_samples=2, batch_size=128
    )
    assert 1 < evaluator.evaluate(model).item() < 1000


@pytest.mark.parametrize(
    "start", [["-m", "run_experiments"], [str(ROOT / "run_experiments" / "run_experiments.py")]]
)
def test_both_ways_to_start(start, tmp_path):
    elsewhere = ROOT if start[0] == "-m" else tmp_path
    shown = subprocess.run(
        [sys.executable, *start, "--help"], cwd=elsewhere, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "--group-sizes" in shown.stdout and "paper" in shown.stdout


# ---- run.sh ----


def test_run_sh_help_needs_nothing(tmp_path):
    shown = subprocess.run(
        ["bash", str(ROOT / "run.sh"), "--help"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "./run.sh test" in shown.stdout
    # it also explains every option of a sweep
    options = subprocess.run(
        [sys.executable, "-m", "run_experiments", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for word in set(options.replace(",", " ").split()):
        if word.startswith("--") and word != "--help":
            assert word in shown.stdout, word


def test_run_sh_says_what_is_missing(tmp_path):
    shown = subprocess.run(
        ["bash", str(ROOT / "run.sh"), "--preset", "tiny"],
        env=os.environ | {"MIXEDQUANT_PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 1
    assert "MIXEDQUANT_PYTHON=/bin/false cannot import smoothquant" in shown.stderr
