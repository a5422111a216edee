"""The transformers plug-in: quantized while loading, saved, loaded again, and refused if broken."""

import copy
import json
import logging
import shutil

import pytest
import torch
from length import at_length
from safetensors.torch import load_file, save_file
from spoil import LAYER, edit, edit_manifest, put, set_tensor, without_checksums
from transformers import AutoModel, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.quantizers.base import HfQuantizer

from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    load_quantized,
    quantization_report,
    quantize,
    save_quantized,
)
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.checkpoints.hf import MixedQuantManifest, MixedQuantQuantizer
from smoothquant.core.tensor_files import INDEX
from smoothquant.layers.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("linears_alone")

CONFIG = MixedQuantConfig(group_size=20, salient_prop=0.1, calibration="weights")


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def from_pretrained(folder, config=None, **fields):
    if config is not None:  # None would take the folder's own away
        fields["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **fields)


@pytest.fixture
def float_folder(make_model, tmp_path):
    """Saves a tiny model as published: float_folder(architecture) -> (model, path)."""

    def save(architecture, dtype=torch.float32, **fields):
        model, folder = make_model(architecture).to(dtype), tmp_path / "float"
        model.save_pretrained(folder, **fields)
        return model, folder

    return save


# ---- Quantized while loading


def test_every_family_loads_quantized_and_comes_back(
    architecture, float_folder, token_ids, tmp_path
):
    model, folder = float_folder(architecture)
    parameters = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
    loaded = from_pretrained(folder, CONFIG)
    records = quantize(model, CONFIG, progress=False)
    want = logits(model, token_ids)
    assert torch.equal(logits(loaded, token_ids), want)
    assert not loaded.training and loaded.is_quantized
    assert quantization_report(loaded) == records

    # every parameter is there, the experts' matrix by matrix
    listed = {record.name for record in records}
    for name in parameters:
        block, _, part = name.rpartition(".")
        if block.endswith(".experts"):
            assert f"{block}.0.{part.replace('_bias', '.bias')}" in listed
        else:
            assert name in listed
    assert all(record.reason for record in records)

    for save, name in ((loaded.save_pretrained, "a"), (model.save_pretrained, "b")):
        save(tmp_path / name)
        again = from_pretrained(tmp_path / name)
        assert torch.equal(logits(again, token_ids), want)
        assert torch.equal(logits(load_quantized(tmp_path / name), token_ids), want)
    again.save_pretrained(tmp_path / "c")
    save_quantized(again, tmp_path / "d")
    for name in "bcd":
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    kept = {r.name: r.reason for r in quantization_report(again) if r.action == "kept"}
    assert kept == {r.name: r.reason for r in records if r.action == "kept"}


def test_transformers_does_not_initialize_what_was_loaded(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    model = SiglipVisionModel(config)
    for parameter in model.parameters():
        parameter.data.uniform_(0.4, 0.6)
    model.save_pretrained(tmp_path)
    float_model = SiglipVisionModel.from_pretrained(tmp_path)
    loaded = SiglipVisionModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    quantize(float_model, CONFIG)
    want = float_model.state_dict()
    loaded.save_pretrained(tmp_path / "q")
    for found in (loaded, SiglipVisionModel.from_pretrained(tmp_path / "q")):
        assert found.state_dict().keys() == want.keys()
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, want[name]), name


def test_one_input_at_a_time_is_in_memory(float_folder, monkeypatch):
    from smoothquant.checkpoints import hf

    model, folder = float_folder("mixtral")
    largest, held = 0, []
    take = hf.QuantizeLoadedWeights._take

    def watched(self, model, name, tensor):
        take(self, model, name, tensor)
        waiting = [n for n in self.item_of if model_has(model, n)]
        held.append({self.item_of[n].name for n in waiting})

    def model_has(model, name):
        try:
            return model.get_parameter(name).device.type != "meta"
        except AttributeError:
            return False

    monkeypatch.setattr(hf.QuantizeLoadedWeights, "_take", watched)
    from_pretrained(folder, CONFIG)
    largest = max(map(len, held))
    # the experts' weights come between those of attention
    assert largest <= 2 and len(held) == 2 * 6 and held[-1] == set()


def test_weights_alone_choose_and_a_log_line_says_so(float_folder, caplog):
    _, folder = float_folder("llama")
    with caplog.at_level(logging.WARNING, "smoothquant"):
        from_pretrained(folder, CONFIG)
    assert (
        "no calibration statistics: salience and order come from the weights alone" in caplog.text
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_that_of_what_is_quantized(dtype, float_folder, token_ids, tmp_path):
    model, folder = float_folder("llama-bias")
    loaded = from_pretrained(folder, CONFIG, dtype=dtype)
    quantize(model.to(dtype), CONFIG, progress=False)
    model.model.rotary_emb = copy.deepcopy(loaded.model.rotary_emb)  # loading leaves it in float32
    assert loaded.dtype == dtype
    assert loaded.model.layers[0].mlp.down_proj.salient_weight.dtype == dtype
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    loaded.save_pretrained(tmp_path / "q")
    for again in (from_pretrained(tmp_path / "q"), load_quantized(tmp_path / "q")):
        assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    other = from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert other.lm_head.weight.dtype == torch.float32
    assert other.model.layers[0].mlp.down_proj.salient_weight.dtype == dtype


def test_a_cast_model_comes_back_with_its_buffers(make_model, token_ids, tmp_path):
    model = make_model("llama")
    quantize(model, CONFIG, progress=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "q")
    for again in (from_pretrained(tmp_path / "q"), load_quantized(tmp_path / "q")):
        assert again.model.rotary_emb.inv_freq.dtype == torch.bfloat16
        assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_calibration_texts_in_the_config(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    model.save_pretrained(tmp_path / "float")
    config = MixedQuantConfig(
        recipe="fast", group_size=64, calibration=wikitext("validation")[:300],
        calibration_tokens=2048,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="config.calibration needs a tokenizer, but the tokenizer of"
    ):
        from_pretrained(tmp_path / "float", config)
    tokenizer.save_pretrained(tmp_path / "float")
    loaded = from_pretrained(tmp_path / "float", config)
    quantize(model, config, tokenizer=tokenizer, progress=False)
    ids = tokenizer("some words of a text", return_tensors="pt").input_ids
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert {r.reason for r in quantization_report(loaded) if r.action == "quantized"} == {
        "calibration"
    }
    loaded.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(from_pretrained(tmp_path / "q"), ids), logits(model, ids))


def test_what_cannot_be_done_while_loading_is_refused(float_folder):
    model, folder = float_folder("opt")
    with pytest.raises(
        ValueError, match="weight_rounding='gptq' needs calibration tokens, but the tokenizer"
    ):
        from_pretrained(folder, MixedQuantConfig(recipe="best"))
    with pytest.raises(ValueError, match="smooth_alpha needs statistics"):
        from_pretrained(folder, MixedQuantConfig(smooth_alpha=0.5))
    with pytest.raises(ValueError, match="must not use the disk"):
        from_pretrained(folder, CONFIG, device_map={"model": "cpu", "lm_head": "disk"})
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.1.fc2.weight"
    spoiled = dict(tensors, **{name: tensors[name].clone().fill_(float("nan"))})
    save_file(spoiled, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weight of model.decoder.layers.1.fc2 holds NaN"):
        from_pretrained(folder, CONFIG)
    spoiled = dict(tensors, **{name: tensors[name][:-1].clone()})
    save_file(spoiled, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"fc2.weight must have shape \(48, 88\); got \(47, 88\)"):
        from_pretrained(folder, CONFIG)
    del spoiled[name]
    save_file(spoiled, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}"):
        from_pretrained(folder, CONFIG)


# ---- The folder


def test_tied_embeddings_stay_tied(float_folder, tmp_path):
    _, folder = float_folder("llama")
    loaded = from_pretrained(folder, CONFIG)
    loaded.save_pretrained(tmp_path / "q")
    again = from_pretrained(tmp_path / "q")
    for model in (loaded, again):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "q" / "model.safetensors")


def test_config_json_says_it_all(make_model, tmp_path):
    model = make_model("mixtral")
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "q")
    fields = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "mixedquant" and fields["format_version"] == 3
    assert MixedQuantConfig.from_dict(fields["config"]) == CONFIG
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert fields["linears"] == {n: {"num_salient": m.num_salient} for n, m in layers.items()}


def test_shards(make_model, token_ids, tmp_path):
    model = make_model("qwen2")
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    for again in (from_pretrained(tmp_path / "q"), load_quantized(tmp_path / "q")):
        assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map, float_folder, token_ids, tmp_path):
    model, folder = float_folder("qwen3")
    loaded = from_pretrained(folder, CONFIG, device_map=device_map)
    loaded.save_pretrained(tmp_path / "q")
    again = from_pretrained(tmp_path / "q", device_map=device_map)
    assert torch.equal(logits(again, token_ids), logits(loaded, token_ids))


def test_the_rest_on_disk(make_model, token_ids, tmp_path):
    model = make_model("llama-bias")
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "q")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    again = from_pretrained(tmp_path / "q", device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.filterwarnings("ignore")
def test_generate_and_compile(float_folder, token_ids):
    _, folder = float_folder("llama")
    loaded = from_pretrained(folder, CONFIG)
    prompt = token_ids[:1, :5]
    first = loaded.generate(prompt, max_new_tokens=8, do_sample=False)
    again = loaded.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(first, again) and first.shape[1] > prompt.shape[1]
    layer = loaded.model.layers[0].mlp
    x = torch.randn(2, 3, 48)
    with torch.no_grad():
        want = layer.down_proj(torch.randn(1, 88)).shape
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5) and want == (1, 48)


def test_the_base_model_of_a_whole_one_and_back(make_model, token_ids, tmp_path):
    model = make_model("llama")
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        want = model.model(token_ids).last_hidden_state
        assert torch.equal(base(token_ids).last_hidden_state, want)
        base.save_pretrained(tmp_path / "base")
        again = from_pretrained(tmp_path / "base")  # with a head of the tied embedding
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)


# ---- Registration


IMPORTS = {
    "first": "import smoothquant, sys; assert 'transformers' not in sys.modules;"
    " import transformers",
    "last": "import transformers.quantizers.auto, smoothquant",
    "twice": "import smoothquant; from smoothquant.registration import register; register();"
    "import transformers, importlib; register(); import smoothquant.checkpoints.hf; register()",
}


@pytest.mark.parametrize("order", at_length(list(IMPORTS), ["twice"]))
def test_both_imports_in_any_order_register_once(order, run_python):
    run_python(
        IMPORTS[order] + "\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as c\n"
        "assert m['mixedquant'].__name__ == 'MixedQuantQuantizer'\n"
        "assert c['mixedquant'].__qualname__ == 'MixedQuantManifest'\n"
        "import sys; assert not any(type(f).__module__ == 'smoothquant.registration' "
        "for f in sys.meta_path)"
    )


@pytest.mark.parametrize("model", [(), ("a model",)])
def test_weight_conversions_where_transformers_passes_the_model_on_or_not(model, monkeypatch):
    name = "update_weight_conversions"
    monkeypatch.setattr(HfQuantizer, name, lambda self, *given: [*given], raising=False)
    for pre_quantized, expected in ((True, []), (False, [["of transformers"], *model])):
        quantizer = MixedQuantQuantizer(MixedQuantManifest(CONFIG), pre_quantized=pre_quantized)
        assert quantizer.update_weight_conversions(["of transformers"], *model) == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"grup_size": 16}, "quantization_config: unknown .* grup_size"),
        ({"group_size": 0}, "quantization_config: group_size must be"),
        ({"group_size": 16, "salient_prop": 0.1, "calibration": "weights"}, None),
    ],
)
def test_a_config_given_as_a_dict(fields, message, float_folder):
    model, folder = float_folder("llama")
    given = {"quant_method": "mixedquant", **fields}
    if message:
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder, given)
    else:
        loaded = from_pretrained(folder, given)
        assert loaded.mixedquant_config == MixedQuantConfig(**fields)
        assert given == {"quant_method": "mixedquant", **fields}
        loaded.save_pretrained(folder / "q")
        assert from_pretrained(folder / "q").mixedquant_config == loaded.mixedquant_config


@pytest.mark.parametrize("config", [CONFIG, MixedQuantConfig(group_size=12)])
def test_a_config_given_with_a_quantized_model_is_not_used(config, pristine):
    with pytest.warns(UserWarning, match="quantization_config.* from the model will be used"):
        loaded = from_pretrained(pristine, config)
    assert loaded.mixedquant_config == CONFIG


def test_a_stored_config_needs_all_fields(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "q")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mixedquant", "group_size": 16}
    (folder / "config.json").write_text(json.dumps(fields))
    for load in BOTH:
        with pytest.raises(CheckpointError, match="config.json: quantization_config"):
            load(folder)


@pytest.mark.parametrize(
    "where",
    at_length(["local", "beside", "root", "revision"], ["local", "revision"]),
)
def test_the_tokenizer_is_that_of_the_weights(where, tmp_path, monkeypatch):
    """In a subfolder or a revision, of a folder or of a repository in the cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = MixedQuantConfig(calibration=["Some words. " * 200], calibration_tokens=64)
    commit, wrong = "0123456789abcdef" * 2 + "01234567", "f" * 40
    hub = tmp_path / "models--a--b"
    root = tmp_path / "f" if where == "local" else hub / "snapshots" / commit
    folder = root if where == "revision" else root / "inner"
    model, tokenizer = load_bundled("tiny-opt")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(root if where == "root" else folder)
    fields = {} if where == "revision" else {"subfolder": "inner"}
    if where == "local":
        AutoModelForCausalLM.from_pretrained(root, quantization_config=config, **fields)
        return
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(wrong)
    (hub / "refs" / "v1").write_text(commit)
    (hub / "snapshots" / wrong).mkdir()
    fields |= {"revision": "v1", "cache_dir": str(tmp_path), "local_files_only": True}
    AutoModelForCausalLM.from_pretrained("a/b", quantization_config=config, **fields)


# ---- Hostile folders


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    from conftest import build_model

    model, folder = build_model("llama-bias"), tmp_path_factory.mktemp("pristine") / "q"
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def phantom(folder):
    index = folder / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["phantom"] = content["weight_map"][f"{LAYER}.perm"]
    index.write_text(json.dumps(content))


def cut(folder):
    largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size - 7)


BOTH = (lambda folder: AutoModelForCausalLM.from_pretrained(folder), load_quantized)


@pytest.mark.parametrize("load", BOTH, ids=["from_pretrained", "load_quantized"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (set_tensor(f"{LAYER}.perm", put(3, 4)), f"tensor {LAYER}.perm is not a permutation"),
        (set_tensor(f"{LAYER}.scales", put(0, float("nan"))), f"{LAYER}.scales holds NaN"),
        (set_tensor("lm_head.weight", put(7, float("nan"))), "tensor lm_head.weight holds NaN"),
        (set_tensor(f"{LAYER}.scales", put(0, -1.0)), f"{LAYER}.scales must be .* not negative"),
        (set_tensor(f"{LAYER}.qweight", put(9, 0x80)), f"{LAYER}.qweight holds the code -8"),
        (set_tensor(f"{LAYER}.qweight", lambda t: t.flatten()), "qweight must have shape"),
        (set_tensor(f"{LAYER}.scales", lambda t: t.half()), "scales must not be float16"),
        (set_tensor(f"{LAYER}.bias", lambda t: t.half()), "bias must not be float16"),
        (set_tensor("lm_head.weight", lambda t: t[:5].contiguous()), "lm_head.weight must have"),
        (cut, "model-0000.*safetensors: "),
        (edit_manifest("format_version", value=99), "format_version 99 is not 3"),
        (edit_manifest("linears", value={}), "linears is empty"),
        (
            edit_manifest("linears", LAYER, value={"num_salient": 89}),
            f"linear {LAYER}: num_salient",
        ),
        (edit_manifest("linears", LAYER, value={"num_salient": 1}), f"tensor {LAYER}"),
        (edit_manifest("linears", "../x", value={"num_salient": 1}), "has no linear ../x"),
        (edit_manifest("config", "group_size", value=0), "group_size must be in"),
        (edit_manifest("config", "surprise", value=0), "unknown MixedQuantConfig field"),
        (edit_manifest("dtypes", "extra", value="float16"), "dtypes must not name extra"),
    ],
)
def test_broken_folders_are_refused_by_both_ways_in(load, spoil, message, pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "q")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_what_a_cast_cannot_have_made_is_refused(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "q")
    set_tensor("lm_head.weight", put(7, 1e30))(folder)
    without_checksums(folder)
    assert torch.isinf(from_pretrained(folder, dtype=torch.float16).lm_head.weight).any()
    set_tensor("lm_head.weight", put(7, float("nan")))(folder)
    with pytest.raises(CheckpointError, match="tensor lm_head.weight holds NaN$"):
        from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            edit(INDEX, "weight_map", f"{LAYER}.perm", value="../x.safetensors"),
            "is in '../x.safetensors', which does not name a safetensors file in this folder",
        ),
        (
            edit(INDEX, "weight_map", f"{LAYER}.perm", value="absent.safetensors"),
            "absent.safetensors",
        ),
        (
            edit(INDEX, "weight_map", value={}),
            "weight_map must name a file",
        ),
        (
            phantom,
            "tensor phantom is not in",
        ),
        (set_tensor(f"{LAYER}.perm", lambda tensor: None), f"tensor {LAYER}.perm is not in"),
    ],
)  # fmt: skip
def test_broken_indices_are_refused(spoil, message, pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "q")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder)


def test_tensors_outside_of_the_folder_are_refused(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "q")
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(tmp_path / "x.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: "../x.safetensors" if file == first.name else file
        for name, file in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    for load in BOTH:
        with pytest.raises(CheckpointError):
            load(folder)
