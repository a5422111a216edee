"""Three ways in, one sequence of steps: a model, a folder, weights as transformers loads them.

The same situation gives the same records, bytes and errors, whichever way it comes.
"""

import json
import shutil

import pytest
import torch
from length import at_length
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import smoothquant.calibration.collect
from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    convert,
    quantization_report,
    quantize,
    save_quantized,
)
from smoothquant.bundled import DATA, wikitext
from smoothquant.core.tensor_files import CONFIG, TENSORS

TEXTS = tuple(wikitext("validation")[:60])


def in_memory(source, target, config):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source) if config.calibration else None
    records = quantize(model, config, tokenizer=tokenizer)
    save_quantized(model, target)
    return records


def by_layer(source, target, config):
    return convert(source, target, config, progress=False)


def while_loading(source, target, config):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    save_quantized(model, target)
    return quantization_report(model)


WAYS = (in_memory, by_layer, while_loading)


def stored(folder):
    """All tensors of a folder, as bytes, and what its config.json says of the quantization."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[name] = tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist()
    return tensors, json.loads((folder / CONFIG).read_text())["quantization_config"]


GOOD = {
    "plain": ("llama", {"group_size": 16}),
    "tied head": ("gemma", {"group_size": 20, "salient_prop": 0.1}),
    "biases and post-norms": ("opt-post-norm", {"group_size": 16, "salient_format": "int8"}),
    "fused experts": ("mixtral", {"group_size": 16, "sort": "max"}),
    "experts beside linears": ("qwen2_moe", {"group_size": 16}),
    "transposed experts with biases": ("gpt_oss", {"group_size": 16, "salient_prop": 0.1}),
    "one input for attention and MLP": ("falcon-parallel", {"group_size": 16, "rotation": 16}),
    "simulated": ("qwen3", {"group_size": 16, "backend": "fake", "num_bits": 8}),
    "output quantized": ("opt", {"group_size": 16, "quantize_output": True}),
    "modules left out": (
        "mixtral",
        {"group_size": 16, "ignore": ["k_proj", "model.layers.0.mlp.experts", "re:.*1.*o_proj"]},
    ),
    "blocks": ("mistral", {"group_size": 8, "tp_blocks": 2}),
    "unsigned": ("phi", {"group_size": 16, "act_format": "zero_point"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("situation", GOOD)
def test_every_way_in_gives_the_same_records_and_bytes(situation, dtype, make_model, tmp_path):
    architecture, fields = GOOD[situation]
    make_model(architecture).to(dtype).save_pretrained(tmp_path / "float")
    config = MixedQuantConfig(**fields)
    results = [
        (way(tmp_path / "float", tmp_path / way.__name__, config), stored(tmp_path / way.__name__))
        for way in WAYS
    ]
    assert results[0] == results[1] == results[2]
    assert any(record.action == "quantized" for record in results[0][0])


CALIBRATED = [
    {"recipe": "best", "smooth_alpha": 0.5},
    {"recipe": "fast"},
    {"smooth_alpha": "search", "act_clip": "search"},
    {"salient_allocation": "output", "bits": 4.9, "salient_prop": None},
]


@pytest.mark.parametrize(
    "fields",
    at_length(CALIBRATED, CALIBRATED[:1]),
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_way_in_calibrates_alike(fields, tmp_path):
    config = MixedQuantConfig(group_size=32, calibration=TEXTS, calibration_tokens=512, **fields)
    results = [
        (way(DATA / "tiny-opt", tmp_path / way.__name__, config), stored(tmp_path / way.__name__))
        for way in WAYS
    ]
    assert results[0] == results[1] == results[2]


def spoiled(name, value):
    def spoil(tensors):
        tensors[name].view(-1)[3] = value

    return spoil


NAN, INF = float("nan"), float("inf")
QUERY = "model.layers.0.self_attn.q_proj"
BAD = {
    "NaN in a weight": ({}, spoiled(f"{QUERY}.weight", NAN), f"weight of {QUERY} holds NaN or Inf"),
    "Inf in a bias": ({}, spoiled(f"{QUERY}.bias", INF), f"bias of {QUERY} holds NaN or Inf"),
    "NaN in a norm": (
        {},
        spoiled("model.norm.weight", NAN),
        "parameter model.norm.weight holds NaN or Inf",
    ),
    "Inf in the head": (
        {},
        spoiled("lm_head.weight", INF),
        "parameter lm_head.weight holds NaN or Inf",
    ),
    "too many blocks": ({"tp_blocks": 5}, None, "tp_blocks must"),
    "blocks across heads": (
        {"tp_blocks": 8, "sort_within_heads": True},
        None,
        "tp_blocks must divide the 4 heads",
    ),
    "smoothing without statistics": ({"smooth_alpha": 0.5}, None, "smooth_alpha needs statistics"),
    "shares without statistics": (
        {"salient_allocation": "output"},
        None,
        "salient_allocation='output' needs statistics",
    ),
    "GPTQ without tokens": (
        {"weight_rounding": "gptq"},
        None,
        "weight_rounding='gptq' needs calibration tokens, but the tokenizer of",
    ),
    "a search without tokens": (
        {"act_clip": "search"},
        None,
        "act_clip='search' needs calibration tokens, but the tokenizer of",
    ),
    "texts without a tokenizer": ({"calibration": TEXTS}, None, "tokenizer"),
}


@pytest.mark.parametrize("situation", BAD)
def test_every_way_in_refuses_in_the_same_words(situation, make_model, tmp_path):
    fields, spoil, message = BAD[situation]
    source = tmp_path / "float"
    make_model("llama-bias").save_pretrained(source)
    if spoil:
        tensors = load_file(source / TENSORS)
        spoil(tensors)
        save_file(tensors, source / TENSORS, {"format": "pt"})
    config = MixedQuantConfig(group_size=16, **fields)
    errors = []
    for way in WAYS:
        with pytest.raises((ValueError, TypeError)) as caught:
            way(source, tmp_path / "q", config)
        errors.append((type(caught.value), str(caught.value)))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]
    assert message in errors[0][1]
    if situation != "texts without a tokenizer":  # in memory it was to be given
        assert errors[0] == errors[1] == errors[2]


def test_weights_that_never_come_are_named_by_every_way_that_reads_files(make_model, tmp_path):
    source = tmp_path / "float"
    make_model("llama-bias").save_pretrained(source)
    tensors = load_file(source / TENSORS)
    del tensors[f"{QUERY}.weight"]
    save_file(tensors, source / TENSORS, {"format": "pt"})
    for way in (by_layer, while_loading):
        with pytest.raises(CheckpointError, match=rf"float: lacks tensor {QUERY}.weight of"):
            way(source, tmp_path / "q", MixedQuantConfig(group_size=16))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_no_way_in_quantizes_a_quantized_model(make_model, tmp_path):
    make_model("llama-bias").save_pretrained(tmp_path / "float")
    config = MixedQuantConfig(group_size=16)
    in_memory(tmp_path / "float", tmp_path / "q", config)
    shutil.rmtree(tmp_path / "float")
    for way in (in_memory, by_layer):
        with pytest.raises(ValueError, match="quantized"):
            way(tmp_path / "q", tmp_path / "again", config)
        assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_layer_is_named_before_calibration(way, tmp_path, monkeypatch):
    source = tmp_path / "float"
    shutil.copytree(DATA / "tiny-opt", source)
    tensors, name = load_file(source / TENSORS), "model.decoder.layers.1.fc2"
    spoiled(f"{name}.weight", NAN)(tensors)
    save_file(tensors, source / TENSORS, {"format": "pt"})
    monkeypatch.setattr(smoothquant.calibration.collect, "hooked", None)  # no token may run
    config = MixedQuantConfig(group_size=16, calibration=TEXTS, calibration_tokens=64)
    with pytest.raises(ValueError, match=f"weight of {name} holds NaN or Inf"):
        way(source, tmp_path / "q", config)
