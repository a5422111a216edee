"""The card of a saved model: numbers that are counted or given, and nothing of this machine."""

import math

import pytest
import torch
from huggingface_hub import ModelCard

from smoothquant import MixedQuantConfig, convert, quantize, save_quantized
from smoothquant.bundled import load_bundled
from smoothquant.checkpoints.manifest import PLUGIN
from smoothquant.checkpoints.model_card import model_card
from smoothquant.core.tensor_files import read_json
from smoothquant.model_size import Byte, get_model_size


def rows(card, title=""):
    """The table under a title: {first cell: second}."""
    part = card.partition(f"## {title}")[2] if title else card
    lines = part.partition("\n## ")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {cell[0]: cell[-1] for cell in cells}


def test_its_numbers_are_the_models(make_model, token_ids, tmp_path):
    model = make_model("llama")
    config = MixedQuantConfig(group_size=20, salient_prop=0.1, calibration=["a"] * 3, act_clip=0.9)
    records = quantize(model, config, batches=[token_ids], progress=False)
    measured = {"accuracy of a|b": 0.512345678, "perplexity": float("nan")}
    save_quantized(model, tmp_path / "m", evaluation=measured)
    card = (tmp_path / "m" / "README.md").read_text()
    quantized = [record for record in records if record.action == "quantized"]
    weights = sum(math.prod(record.shape) for record in quantized)
    bits = sum(r.bits_per_weight * math.prod(r.shape) for r in quantized) / weights
    found = rows(card)
    assert found["bits per quantized weight"].startswith(f"{bits:.3f},")
    assert found["quantized layers"] == f"{len(quantized)} with {weights:,} weights"
    assert found["size"] == f"{get_model_size(model) // Byte:,} bytes"
    kinds = rows(card, "Size")
    del kinds["kind"], kinds["---"]
    assert sum(int(n.replace(",", "")) for n in kinds.values()) == get_model_size(model) // Byte
    choices = rows(card, "Quantization config")
    assert choices["act_clip"] == "0.9" and choices["calibration"].startswith("sha256:")
    assert "weight_rounding" not in choices
    assert found["written by"].startswith("mixedquant ") and "\npip install mixedquant\n" in card
    assert "only after `import smoothquant`" in card
    config = read_json(tmp_path / "m" / "config.json")
    assert config["quantization_config"]["plugin"] == PLUGIN
    assert rows(card, "Evaluation")["accuracy of a\\|b"] == "0.51235"
    assert rows(card, "Evaluation")["perplexity"] == "nan"
    results = ModelCard(card).data.eval_results
    assert [result.metric_type for result in results] == list(measured)
    assert results[0].metric_value == 0.512345678 and math.isnan(results[1].metric_value)


@pytest.mark.long
def test_it_tells_the_hubs_name_but_no_folder(tmp_path):
    model, _ = load_bundled("tiny-opt")
    quantize(model, MixedQuantConfig(group_size=32, salient_format="int8"), progress=False)
    assert model.name_or_path.startswith("/") and model.name_or_path not in model_card(model)
    assert "base_model" not in model_card(model) and "8-bit integers" in model_card(model)
    assert "## Evaluation" not in model_card(model)
    model.name_or_path = "facebook/opt-1.3b"
    assert "\nbase_model: facebook/opt-1.3b\n" in model_card(model)


def test_simulations_say_so(make_model):
    model = make_model("opt")
    quantize(model, MixedQuantConfig(backend="fake", num_bits=8), progress=False)
    assert "Simulated by MixedQuant" in model_card(model) and "8-bit" in model_card(model)


def test_conversions_have_the_same(make_model, tmp_path):
    model, config = make_model("llama-bias"), MixedQuantConfig(group_size=16)
    model.save_pretrained(tmp_path / "float")
    quantize(model, config, progress=False)
    convert(tmp_path / "float", tmp_path / "converted", config, progress=False)
    assert (tmp_path / "converted" / "README.md").read_text() == model_card(model)


def test_what_is_no_number_is_refused_before_anything_is_written(make_model, tmp_path):
    model = make_model("opt")
    with pytest.raises(ValueError, match="model must be quantized"):
        model_card(model)
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    with pytest.raises(ValueError, match="evaluation of 'loss' must be a number; got '3'"):
        save_quantized(model, tmp_path / "m", evaluation={"loss": "3"})
    with pytest.raises(ValueError, match="evaluation of 'loss' must be a number"):
        save_quantized(model, tmp_path / "m", evaluation={"loss": torch.ones(1)})
    assert not list(tmp_path.iterdir())
