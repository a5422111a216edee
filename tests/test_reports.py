"""What a prompt and a notebook show: configs and reports in a few lines."""

import math
import sys

import pytest

from smoothquant import (
    MixedQuantConfig,
    load_quantized,
    quantization_report,
    quantize,
    save_quantized,
)
from smoothquant.quantization.records import SHOWN_ROWS, LinearRecord, QuantizationReport

pytestmark = pytest.mark.usefixtures("linears_alone")


@pytest.mark.parametrize(
    "shown",
    [
        "recipe='fast'",
        "recipe='best'",
        "recipe='fast', group_size=32, sort='max'",
        "recipe='rtn', rotation=64",
        "recipe='fast', bits=4.8",
        "recipe='fast', act_bits=8, ignore=('fc1',)",
        "recipe='fast', num_bits=8, backend='fake'",
    ],
)
def test_a_config_shows_what_its_recipe_does_not_imply(shown):
    shown = f"MixedQuantConfig({shown})"
    config = eval(shown)
    assert repr(config) == shown


def test_a_config_with_texts_fits_a_screen():
    config = MixedQuantConfig(calibration=["some text " * 1000] * 3, ignore=["a.b"] * 500)
    digest = config.to_dict()["calibration"]
    assert f"calibration=<3 texts, {digest[:15]}>" in repr(config)
    assert "ignore=<500 patterns>" in repr(config) and len(repr(config)) < 300
    other = MixedQuantConfig(calibration=["another"])
    assert "<1 text, sha256:" in repr(other) and repr(other) != repr(config)


def test_a_report_is_a_list_with_a_summary_and_a_table(make_model, tmp_path):
    model = make_model("llama")
    config = MixedQuantConfig(group_size=16, calibration="weights")
    report = quantize(model, config, progress=False)
    assert isinstance(report, QuantizationReport) and isinstance(report, list)
    assert report == quantization_report(model) == list(report) and report[0].action == "quantized"
    assert type(report[:2]) is list
    weights = sum(math.prod(record.shape) for record in report.quantized)
    bits = f"{report.bits_per_weight:.3f}"
    assert f"{len(report.quantized)} matrices with {weights:,} weights at {bits} bits" in str(
        report
    )
    assert len(str(report).splitlines()) == 3 and "embedding (1)" in repr(report)
    table = report._repr_html_()
    assert table.count("<tr>") == 1 + len(report) and f"<td>{report[0].name}</td>" in table
    save_quantized(model, tmp_path / "m")
    again = quantization_report(load_quantized(tmp_path / "m"))
    assert repr(again) == repr(report)


def test_a_table_is_short_and_shows_text_as_text():
    record = LinearRecord("<b>&", (2, 3), 0, 16.0, "kept", "<script>")
    report = QuantizationReport([record] * (SHOWN_ROWS + 5))
    table = report._repr_html_()
    assert "&lt;b&gt;&amp;" in table and "<script>" not in table and "and 5 more" in table
    assert "0 matrices" in repr(report) and "nan" not in repr(report)
    assert "kept: 0: nothing" in repr(QuantizationReport())


def test_a_report_as_a_data_frame(monkeypatch):
    pandas = pytest.importorskip("pandas")
    report = QuantizationReport([LinearRecord("a", (2, 3), 1, 4.5, "quantized", "weights")])
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.loc[0, "bits_per_weight"] == 4.5
    assert frame.loc[0, "shape"] == (2, 3)
    assert list(QuantizationReport().to_pandas().columns) == list(frame.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mixedquant\[experiments\]'"):
        report.to_pandas()
