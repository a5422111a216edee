"""Models are loaded as what they are: class, weights and accompanying files; code never runs."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from length import at_length
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from typer.testing import CliRunner

from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    convert,
    load_quantized,
    quantize,
    save_quantized,
)
from smoothquant.bundled import DATA, load_model
from smoothquant.cli.commands import app
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.models.loading import Companions, load_config, load_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 2048,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 2048}
VIT = SIZES | {"image_size": 16, "patch_size": 8}
NAMED = {"llama-classifier": (AutoModelForSequenceClassification, "llama", SIZES)}
LLAVA = {
    "vision_config": VIT | {"model_type": "clip_vision_model"},
    "text_config": SIZES | {"model_type": "llama"},
    "image_token_index": 5,
}
CLIP = {"vision_config": VIT, "text_config": SIZES | {"max_position_embeddings": 16}}
NAMED |= {
    "llava": (AutoModelForImageTextToText, "llava", LLAVA),
    "clip": (AutoModel, "clip", CLIP),
    "llama-base": (AutoModel, "llama", SIZES),
    "bert-masked-lm": (AutoModelForMaskedLM, "bert", SIZES),
    "bert-classifier": (AutoModelForSequenceClassification, "bert", SIZES),
    "t5": (AutoModelForSeq2SeqLM, "t5", T5),
    "vit": (AutoModelForImageClassification, "vit", VIT),
}


def saved(kind, folder, tokenizer=True):
    """A tiny model, saved in a folder."""
    auto, model_type, fields = NAMED[kind]
    model = auto.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    model.save_pretrained(folder)
    if tokenizer:
        Companions(DATA / "tiny-opt").save_pretrained(folder)
    return model


def smoothquant(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


# ---- The class


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", at_length(list(NAMED), ["llama-classifier", "t5", "vit", "llava"]))
def test_the_class_is_that_of_the_folder(kind, tmp_path):
    model = saved(kind, tmp_path / "f", tokenizer=kind != "vit")
    loaded, tokenizer = load_model(tmp_path / "f")
    assert type(loaded) is type(model) and (tokenizer is None) == (kind == "vit")
    for (name, got), want in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name
    flags = ["--no-calibration", "--group-size", 16]
    code, output = smoothquant("quantize", tmp_path / "f", tmp_path / "q", *flags)
    assert code == 0, output
    assert type(load_quantized(tmp_path / "q")) is type(model)
    assert smoothquant("verify", tmp_path / "q")[0] == 0
    assert smoothquant("inspect", tmp_path / "q")[0] == 0
    assert smoothquant("dequantize", tmp_path / "q", tmp_path / "d")[0] == 0
    assert type(load_model(tmp_path / "d")[0]) is type(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, command",
    at_length(
        list(itertools.product(NAMED, ("eval", "generate", "bench"))),
        [("llama-classifier", "eval"), ("bert-masked-lm", "generate"), ("vit", "bench")],
    ),
)
def test_commands_refuse_a_class_that_they_cannot_run(kind, command, tmp_path):
    saved(kind, tmp_path / "f", tokenizer=kind != "vit")
    smoothquant("quantize", tmp_path / "f", tmp_path / "q", "--no-calibration")
    if (kind == "t5" and command != "eval") or kind == "llava":
        return  # it does
    arguments = {"eval": ["--windows", 1, "--seq-len", 16], "generate": ["Once"], "bench": []}
    code, output = smoothquant(command, tmp_path / "q", *arguments[command])
    assert code == 1 and len(output.strip().splitlines()) == 1, output


def test_a_class_and_a_config_that_do_not_belong_together(tmp_path):
    saved("llama-base", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("BertModel", "PreTrainedModel"):
        fields["architectures"] = [name]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(CheckpointError, match="cannot have the model type 'llama'"):
            load_model(tmp_path)


HEADS = [
    ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    ("BertForMaskedLM", "BertModel"),
    ("LlamaForCausalLM", "LlamaForTokenClassification"),
    ("LlamaForCausalLM", "LlamaModel"),
    ("LlamaModel", "LlamaForCausalLM"),
    ("LlamaModel", "LlamaForSequenceClassification"),
    ("BertForMaskedLM", "BertForQuestionAnswering"),
    ("BertForSequenceClassification", "BertForMaskedLM"),
    ("BertModel", "BertForTokenClassification"),
    ("T5ForConditionalGeneration", "T5EncoderModel"),
    ("T5ForConditionalGeneration", "T5ForTokenClassification"),
    ("MixtralForCausalLM", "MixtralForSequenceClassification"),
    ("MixtralForCausalLM", "MixtralModel"),
    ("ViTModel", "ViTForImageClassification"),
    ("SiglipModel", "SiglipForImageClassification"),
]


def class_of(name, **fields):
    """A transformers class and a small config of it."""
    cls = getattr(transformers, name)
    sizes = T5 if name.startswith("T5") else VIT
    if name.startswith("Siglip"):
        parts = {"vision_config": VIT, "text_config": SIZES | {"max_position_embeddings": 16}}
        return cls, transformers.SiglipConfig(**parts, **fields)
    return cls, cls.config_class(**sizes, **fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored, loaded", at_length(HEADS, HEADS[:2] + HEADS[9:10] + HEADS[-1:]))
def test_another_head_on_a_quantized_model(stored, loaded, tmp_path):
    cls, config = class_of(stored)
    torch.manual_seed(1)
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "f")
    # Another head with a bias cannot be tied to packed embeddings, and would be a new one.
    fields = {"head": "16bit", "embeddings": "16bit"}
    quantize(model, MixedQuantConfig(group_size=16, **fields), progress=False)
    save_quantized(model, tmp_path / "q")
    other = getattr(transformers, loaded)
    want, info = other.from_pretrained(tmp_path / "f", output_loading_info=True)
    got, got_info = other.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert got_info["missing_keys"] == info["missing_keys"]
    floats, found = want.state_dict(), got.state_dict()
    stored_tensors = load_file(tmp_path / "q" / "model.safetensors")
    kept = set(found) & set(floats)
    for name in kept - info["missing_keys"]:
        assert torch.equal(found[name], floats[name]), name
    layers = {n: m for n, m in got.named_modules() if isinstance(m, QuantizedLinear)}
    linears = [n for n, m in want.named_modules() if isinstance(m, torch.nn.Linear)]
    fresh = {name.rpartition(".")[0] for name in info["missing_keys"]}
    assert layers and {n for n in linears if "encoder.layer" in n} - fresh <= set(layers)
    for name, layer in layers.items():
        own = next(n for n in quantized_names(model) if n.endswith(name) or name.endswith(n))
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, stored_tensors[f"{own}.{key}"]), (name, key)
    with pytest.raises(CheckpointError, match="no quantized layer is part of"):
        transformers.GPT2Model.from_pretrained(tmp_path / "q")


def quantized_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.filterwarnings("ignore")
def test_a_processor_goes_along(tmp_path):
    saved("llava", tmp_path / "f")
    (tmp_path / "f" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "f" / "own_code.py").write_text("")
    flags = ["--no-calibration", "--group-size", 16]
    assert smoothquant("quantize", tmp_path / "f", tmp_path / "q", *flags)[0] == 0
    assert smoothquant("dequantize", tmp_path / "q", tmp_path / "d")[0] == 0
    for folder in (tmp_path / "q", tmp_path / "d"):
        names = {path.name for path in folder.iterdir()}
        assert {"preprocessor_config.json", "tokenizer.json"} <= names
        assert "own_code.py" not in names
    code, output = smoothquant("eval", tmp_path / "q", "--windows", 1, "--seq-len", 16)
    assert code == 0, output


class Own(transformers.LlamaForCausalLM):
    """A class that transformers does not have."""


def test_a_class_of_ones_own_is_refused_by_save_quantized(tmp_path):
    model = Own(transformers.LlamaConfig(**SIZES))
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    with pytest.raises(ValueError, match="must have a class of transformers.*got Own"):
        save_quantized(model, tmp_path / "q")
    model.save_pretrained(tmp_path / "q")
    again = Own.from_pretrained(tmp_path / "q")
    assert quantized_names(again) == quantized_names(model)


# ---- The weights

LAYER = "model.decoder.layers.1"


def drop(name):
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def add(name, shape):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


SPOILT = {
    "a weight": (drop(f"{LAYER}.fc1.weight"), f"{LAYER}.fc1.weight"),
    "a bias": (drop(f"{LAYER}.fc1.bias"), f"{LAYER}.fc1.bias"),
    "a norm": (drop(f"{LAYER}.final_layer_norm.weight"), f"{LAYER}.final_layer_norm.weight"),
    "an embedding": (
        drop("model.decoder.embed_positions.weight"),
        "model.decoder.embed_positions.weight",
    ),
    "renamed": (rename(f"{LAYER}.fc1.weight", f"{LAYER}.up.weight"), f"{LAYER}.fc1.weight"),
}


@pytest.fixture(params=at_length(list(SPOILT), ["a norm", "renamed"]))
def incomplete(request, tmp_path):
    spoil, name = SPOILT[request.param]
    folder = shutil.copytree(DATA / "tiny-opt", tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, name


def in_memory(folder, target):
    code, output = smoothquant("quantize", folder, target, "--no-calibration")
    if code:
        raise CheckpointError(output)


def by_layer(folder, target):
    convert(folder, target, MixedQuantConfig(), progress=False)


def on_load(folder, target, **fields):
    config = MixedQuantConfig(**fields)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(target)


def after_load(folder, target):
    texts = ["Some words to calibrate on. " * 40]
    on_load(folder, target, calibration=texts, calibration_tokens=64)


WAYS = [in_memory, by_layer, on_load, after_load]


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_weight_is_an_error_in_every_way_in(way, incomplete, tmp_path):
    folder, name = incomplete
    with pytest.raises(CheckpointError, match=f"lacks tensor {name} of a OPTForCausalLM"):
        way(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_bias_that_would_be_dropped_is_an_error(way, tmp_path):
    saved("llama-base", tmp_path / "f")
    fields = json.loads((tmp_path / "f" / "config.json").read_text())
    fields["architectures"] = ["LlamaForCausalLM"]
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = torch.ones(2048, 32)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(64)
    save_file(tensors, tmp_path / "f" / "model.safetensors", {"format": "pt"})
    (tmp_path / "f" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="no place for: model.layers.0.mlp.up_proj.bias"):
        way(tmp_path / "f", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_quantizing_random_weights_in_memory_warns(tmp_path):
    folder = shutil.copytree(DATA / "tiny-opt", tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match=f"no weights for 1 linears, such as {LAYER}.fc1"):
        quantize(model, MixedQuantConfig(calibration="weights"), progress=False)


# ---- Code of a repository

CODE = """
open({path!r}, "w")
from transformers import OPTConfig
class Config(OPTConfig):
    model_type = "custom"
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A folder with code for its config, model and tokenizer; the code creates a file."""
    folder = shutil.copytree(DATA / "tiny-opt", tmp_path / "f")
    (folder / "code.py").write_text(CODE.format(path=str(tmp_path / "RAN")))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config"}
    for file, fields in (
        ("config.json", {"model_type": "custom", "auto_map": names}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Config", None]}},
        ),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | fields))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    return folder


@pytest.mark.parametrize(
    "load",
    [load_model, load_config, load_tokenizer, lambda f: by_layer(f, f.parent / "q")],
    ids=["load_model", "load_config", "load_tokenizer", "convert"],
)
def test_code_of_a_folder_does_not_run(load, with_code, tmp_path):
    with pytest.raises((ValueError, CheckpointError)):
        load(with_code)
    assert not (tmp_path / "RAN").exists()
