"""Text of users in every file that a sweep writes: shown as it is, never read as markup or code."""

import csv
import errno
import json
import os
import pickle
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import plotly.offline
import pyarrow.parquet
import pytest
from length import at_length
from safetensors import SafetensorError

from run_experiments import drawing, grid, page, report
from run_experiments.escaping import (
    encodable,
    file_stem,
    for_csv,
    for_html,
    for_markdown,
    for_script,
    for_shell,
    short_name,
    visible,
)
from run_experiments.executors import _Process
from run_experiments.grid import PRESETS
from run_experiments.plots import Plot, Series
from run_experiments.store import Store
from run_experiments.worker import Job, pickled_error
from smoothquant import CheckpointError

HOSTILE = [
    r"$\frac{$ costs $5",
    "<!-- SECTIONS --><!--<script>",
    "</script><img src=x onerror=alert(1)>",
    "\"quoted\" 'name' & co; &lt;b&gt;",
    "a | b || `c` **d** _e_ [f](g) ~h~ \\",
    "line\nbreak\r\tand\x00control\x1b[31m\u2028",
    "100 % ^2 {x} %{y} %s",
    "Ünïcödé 模型 \U0001f600 \u202egnp.exe",
    "not UTF-8: \udcff",
    *(start + 'HYPERLINK("http://x","y")' for start in "=+-@"),
]


class Outline(HTMLParser):
    """The tags, attributes and scripts of a page, and its texts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = Counter(), set(), []
        self.scripts = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes |= {(tag, *pair) for pair in attributes}
        if tag == "script":
            self.scripts.append("")

    def handle_comment(self, data):
        self.tags["<!--"] += 1

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts[-1] == "":
            self.scripts[-1] = data
        else:
            self.texts.append(data)


@pytest.fixture
def sweep_of(tmp_path):
    """Stores invented results whose every text is `text`; returns (store, cells)."""

    def build(text):
        cells = grid.cells(
            PRESETS["tiny"],
            model={"name": text, "files": {text: "00"}, "dtype": text},
            versions={text: text},
            calibration_data={"data": text, "split": text, "sha256": "01"},
            evaluation_data={"data": text, "split": text, "sha256": "02"},
        )
        cells = [cell for cell in cells if cell.task in ("baseline", "quantized")]
        config = {"num_bits": 4, "sort": text, "backend": "int4", "recipe": text}
        for group_size in (32, 64):
            for share in (0.0, 0.1):
                sizes = {"group_size": group_size, "salient_prop": share, "calibration": text}
                cells.append(grid.replace(cells[-1], config=config | sizes))
        cells.append(grid.replace(cells[-1], config={"method": text, "group_size": 32}))
        cells.append(grid.replace(cells[-2], task="layers"))
        store = Store(tmp_path / "store")
        run = {"chip": text, "isa": text, "threads": 1, "date": text, "error": text}
        for number, cell in enumerate(cells):
            numbers = {"perplexity": 30.0 - number, "kl": 0.1, "top1": 0.5, "bits_per_weight": 4.5}
            sizes = {"model_bytes": 1e6 + number, "model_bytes_16_bit": 4e6, "windows": 1}
            decibels = {"int4": 30.0, f"int4 - {text}": None}
            layers = {"compared": list(decibels), "errors": []}
            layers["errors"] = [{"layer": 0, "kind": text, "decibels": decibels}]
            results = layers if cell.task == "layers" else numbers
            store.put(cell, {**results, **sizes, "seqlen": 8, "run": run})
        return store, cells

    return build


def strings_in(value):
    """Every string in a JSON value."""
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, str):
        return [value]
    elif not isinstance(value, list):
        return []
    return [text for part in value for text in strings_in(part)]


def test_a_page_holds_text_as_text_alone(sweep_of, tmp_path, monkeypatch):
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "plotly()")

    def outline(name):
        store, cells = sweep_of(name)
        command = for_shell(["plot", "--set", f"calibration={name}"])
        path = page.write(store, cells, name, tmp_path, command)
        return Outline(path.read_text(encoding="utf-8")), command

    plain, _ = outline("plain")
    for name in ["".join(HOSTILE), *HOSTILE[1:3]]:
        found, command = outline(name)
        assert (found.tags, found.attributes) == (plain.tags, plain.attributes), name
        assert len(found.scripts) == len(plain.scripts)
        assert f"{visible(short_name(name))}: perplexity and size" in found.texts
        assert command in found.texts
        (models,) = [s for s in found.scripts if s.startswith("[{")]
        assert "<" not in models
        models = json.loads(models)
        assert {model["spec"]["model"]["name"] for model in models} == {name}
        assert {model["run"]["chip"] for model in models} == {name}
        # plotly reads its labels as HTML
        charts = [s.partition("Plotly.newPlot(")[2] for s in found.scripts if "newPlot" in s]
        labels = set()
        for chart in charts:
            data, _ = json.JSONDecoder().raw_decode(chart[chart.index("[{") :])
            labels.update(strings_in(data))
        own = [text for text in labels if "%{" in text and "<br>" in text or "<extra>" in text]
        assert len(own) == 2 and not [text for text in labels - {*own} if "<" in text]
        assert {for_html(name), for_html(f"{name}, 10 % salient")} & labels


@pytest.mark.parametrize("name", at_length(HOSTILE, ["".join(HOSTILE), *HOSTILE[-5:-3]]))
def test_figures_tables_and_files_show_the_name(name, sweep_of, tmp_path, monkeypatch):
    store, cells = sweep_of(name)
    figures = tmp_path / "figures"
    drawn = []
    monkeypatch.setattr(report, "draw", lambda plot, path: drawn.append(path) or path)
    monkeypatch.setattr(report, "draw_layers", lambda result, model, settings, folder: folder)
    command = for_shell(["plot", "--model", name])
    text, _ = report.write(store, cells, name, figures, command)
    stem = file_stem(name)
    assert drawn and all(path.name.startswith(f"{stem}_") for path in drawn)
    # Markdown: as many cells in every row
    rows = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in text.splitlines()]
    assert set(rows) == {13}
    results = (figures / f"{stem}_results.md").read_text(encoding="utf-8")
    lines = results.split("\n")
    assert lines[0] == f"# {for_markdown(name)}: perplexity and size"
    assert lines[2] == f"    {command}"
    assert f"- Chip: {for_markdown(name)}" in lines
    # CSV: no field is a formula, and every text is there
    with open(figures / f"{stem}_cells.csv", newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert {len(row) for row in table} == {len(table[0])} and len(table) == len(cells) + 1
    fields = [field for row in table for field in row if field and not is_number(field)]
    assert not [field for field in fields if field[0] in "=+-@\t\r"]
    assert table[1][table[0].index("model.name")] == for_csv(name)
    columns = pyarrow.parquet.read_table(figures / f"{stem}_cells.parquet").to_pydict()
    assert columns["run.chip"] == [encodable(name)] * len(cells)
    # JSON: exactly as given
    published = (figures / f"{stem}_cells.jsonl").read_text().splitlines()
    assert {json.loads(line)["spec"]["model"]["name"] for line in published} == {name}


def is_number(field):
    try:
        float(field)
    except ValueError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_figures_draw_any_text(tmp_path):
    name = "".join(HOSTILE)
    points = ((1.0, 30.0), (2.0, 20.0))
    series = (Series(name, points, (name, name)),)
    plot = Plot(name, name, name, name, "log", "log", series, (name, 10.0))
    picture = drawing.draw(plot, tmp_path / file_stem(name))
    errors = [{"layer": 0, "kind": name, "decibels": {name: 1.0}}]
    result = {"compared": [name], "errors": errors}
    heat_map = drawing.draw_layers(result, name, name, tmp_path)
    for path in (picture, heat_map):
        assert path.is_file()
        ElementTree.parse(path.with_suffix(".svg"))
    with open(picture.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [for_csv(name), "1.0", "30.0", for_csv(name)]


@pytest.mark.parametrize(
    "name, stem",
    [
        ("tiny-opt", "tiny-opt"),
        ("org/model_1.5", "model_1.5"),
        ("./model/", "model"),
        ("/", "model"),
        *(
            (name, None)
            for name in ["a" * 5000, "模" * 200, "aux", "NUL.txt", "a\\b:c", ".x", "-rf"]
        ),
        *((name, None) for name in HOSTILE),
    ],
)
def test_file_names_are_safe(name, stem, tmp_path):
    found = file_stem(name)
    assert stem is None or found == stem
    assert (found == short_name(name)) == (stem is not None) or name in HOSTILE
    assert len(found.encode()) <= 140 and found[0] not in "-. " and found == visible(found)
    assert not set(found) & set('<>:"/\\|?*')
    assert found.partition(".")[0].upper() not in ("AUX", "NUL")
    (tmp_path / f"{found}_size_vs_group_size.png").touch()


def test_distinct_names_have_distinct_files():
    names = ["a:b", "a|b", "a*b", "a_b", "a" * 200, "a" * 201]
    assert len({file_stem(name) for name in names}) == len(names)


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_stem(".") == short_name(".") == tmp_path.name


def test_commands_can_be_pasted():
    words = [*(name.replace("\x00", "") for name in HOSTILE), "a b", "", "it's\n\\"]
    command = for_shell(words)
    assert command == visible(command)
    script = f"printf '%s\\0' {command}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert list(map(os.fsdecode, found.split(b"\0")[:-1])) == words


def test_a_script_element_can_hold_any_json():
    for name in HOSTILE:
        text = for_script({name: [name]})
        assert "<" not in text and json.loads(text) == {name: [name]}


class Unlike(Exception):
    """An error that cannot be pickled: it takes other arguments than it keeps."""

    def __init__(self, code, *, reason):
        super().__init__(f"{code}: {reason}")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(HOSTILE[2]), TypeError("m"), KeyError("a"), RuntimeError(), MemoryError("m"),
        OSError(errno.ENOSPC, "No space left on device", "x"), FileNotFoundError(2, "m"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "m"), CheckpointError("m"), SafetensorError("m"),
        subprocess.CalledProcessError(1, "x"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_errors_of_workers_come_back_as_they_were(error):
    again = pickle.loads(pickled_error(error))
    assert (type(again), str(again)) == (type(error), str(error))
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_errors_that_cannot_be_pickled_are_named():
    again = pickle.loads(pickled_error(Unlike(5, reason="<full>")))
    assert type(again) is RuntimeError and str(again) == "Unlike: 5: <full>"


def test_an_error_passes_through_the_pipe(tmp_path):
    job = Job(cells=['{"task": "quantized"}'], source="x", output=str(tmp_path))
    worker = _Process(job.to_json())
    error = worker.exception()
    assert type(error) is TypeError and "missing 2 required positional arguments" in str(error)
    assert Path(tmp_path).is_dir()
