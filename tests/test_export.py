"""compressed-tensors: its own package reads what is written, and the weights are the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smoothquant import MixedQuantConfig, dequantize, fold_permutations, quantize
from smoothquant.checkpoints.export import export_compressed_tensors, pack_int32
from smoothquant.models.modules import module_copy

pytestmark = pytest.mark.usefixtures("linears_alone")

IN_ORDER = {"recipe": "rtn", "salient_prop": 0.0, "sort": "none"}
# architecture, dtype, choices
EXPRESSIBLE = {
    "groups": ("llama-bias", torch.float32, {"group_size": 8}),
    "bfloat16": ("opt", torch.bfloat16, {"group_size": 4}),
    "one group": ("opt", torch.float16, {"group_size": 1024}),
    "tied": ("llama", torch.float32, {"group_size": 8, "weight_scale": "mse"}),
    "per token": ("qwen3", torch.float32, {"group_size": 8, "act_quant": "per_token"}),
    "zero-points": ("llama", torch.float32, {"group_size": 8, "act_format": "zero_point"}),
    "channels in any order": (
        "llama",
        torch.float32,
        {"sort": "rms", "weight_quant": "per_channel", "act_quant": "per_token"},
    ),
    "channels, activations by group": (
        "llama",
        torch.float32,
        {"weight_quant": "per_channel", "group_size": 8},
    ),
}


def quantized(model, **choices):
    quantize(model, MixedQuantConfig(**IN_ORDER | choices), progress=False)
    return model


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_its_own_loader_reads_the_same_weights(case, make_model, token_ids, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    architecture, dtype, choices = EXPRESSIBLE[case]
    model = quantized(make_model(architecture).to(dtype), **choices)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_compressed_tensors(model, tmp_path / "ct")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.quantization_config.quant_method == "mixedquant"
    plain = module_copy(model)
    dequantize(plain)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    with torch.no_grad():
        found, want = packed(token_ids).logits, plain(token_ids).logits  # unpacks the weights
        assert not torch.equal(found, want)  # its activations are quantized
        # those of the dense one, too, in older transformers
        assert any(torch.equal(dense(token_ids).logits, either) for either in (want, found))
    for name, tensor in plain.state_dict().items():
        for loaded in (packed, dense):
            other = loaded.state_dict()[name]
            assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name


def test_activations_with_a_zero_point_are_the_same_numbers(make_model, token_ids, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(
        make_model("llama"), group_size=8, act_format="zero_point", act_quant="per_token"
    )
    export_compressed_tensors(model, tmp_path / "ct")
    with torch.no_grad():
        want = model(token_ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")(token_ids).logits
    assert (found - want).abs().max() < 1e-4 * want.abs().max()


def test_what_the_files_say(make_model, tmp_path):
    model = quantized(make_model("llama-bias"), group_size=48)  # of fc-sized inputs, 88: refused
    with pytest.raises(ValueError, match="mlp.down_proj: its 88 channels are not a multiple of"):
        export_compressed_tensors(model, tmp_path / "ct")
    assert not any(tmp_path.iterdir())
    model = quantized(make_model("llama-bias"), group_size=44)
    layer = model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match="q_proj: its 48 channels are not a multiple"):
        export_compressed_tensors(model, tmp_path / "ct")
    model = quantized(make_model("llama-bias"), group_size=8)
    layer = model.model.layers[0].mlp.down_proj
    export_compressed_tensors(model, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == "pack-quantized" and config["ignore"] == ["lm_head"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == group["input_activations"]["group_size"] == 8
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    words, scales = tensors[prefix + "weight_packed"], tensors[prefix + "weight_scale"]
    codes = (words[:, :, None].long() >> (4 * torch.arange(8)) & 15).flatten(1) - 8
    assert torch.equal(codes * scales.repeat_interleave(8, 1), layer.dequantize())
    assert tensors[prefix + "weight_shape"].tolist() == [48, 88]
    assert torch.equal(tensors[prefix + "bias"], layer.bias)


def test_layers_that_differ_are_groups_of_their_own(make_model, tmp_path):
    model = quantized(make_model("opt"), group_size=44)  # one group of 44 and one of 4 in 48
    with pytest.raises(ValueError, match="48 channels are not a multiple"):
        export_compressed_tensors(model, tmp_path / "ct")
    model = quantized(make_model("opt", ffn_dim=96), group_size=48)
    export_compressed_tensors(model, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    whole, halves = config["config_groups"].values()
    assert whole["weights"]["strategy"] == "channel" and halves["weights"]["group_size"] == 48
    assert halves["targets"] == [f"model.decoder.layers.{i}.fc2" for i in (0, 1)]


def test_folded_permutations_are_expressible(make_model, tmp_path):
    model = quantized(make_model("llama"), sort="rms", group_size=8)
    with pytest.raises(ValueError, match="its groups are not neighbouring channels"):
        export_compressed_tensors(model, tmp_path / "ct")
    fold_permutations(model)
    down = model.model.layers[0].mlp.down_proj
    assert torch.equal(down.perm, torch.arange(88, dtype=torch.int32))
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("_proj") and not name.endswith("down_proj"):
            model.set_submodule(name, torch.nn.Linear(1, 1))  # not to be looked at
    export_compressed_tensors(model, tmp_path / "ct")
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    assert "model.layers.1.mlp.down_proj.weight_packed" in tensors


@pytest.mark.parametrize(
    "choices, reason",
    [
        ({"salient_prop": 0.1}, "of its channels are salient"),
        ({"sort": "rms"}, "its groups are not neighbouring channels"),
        ({"rotation": 8}, r"rotated \(rotation=8\)"),
        ({"act_clip": 0.9}, r"clipped \(act_clip=0.9\)"),
        ({"act_format": "unsigned"}, "unsigned codes"),
        ({"num_bits": 3}, "it has 3 bits"),
        ({"backend": "fake"}, "it is a simulation"),
        ({"quantize_output": True}, "its outputs are quantized"),
    ],
)
def test_what_it_cannot_express_is_refused_by_name(choices, reason, make_model, tmp_path):
    model = quantized(make_model("opt"), **{"group_size": 8} | choices)
    with pytest.raises(
        ValueError, match=rf"cannot express model\.decoder\.layers\.0.*: .*{reason}"
    ):
        export_compressed_tensors(model, tmp_path / "ct")
    assert not any(tmp_path.iterdir())


def test_other_models_are_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="experts: the format has no fused experts"):
        export_compressed_tensors(quantized(make_model("mixtral"), group_size=8), tmp_path / "a")
    with pytest.raises(ValueError, match="model must be quantized"):
        export_compressed_tensors(make_model("opt"), tmp_path / "a")
    with pytest.raises(ValueError, match="model must be a transformers model; got Linear"):
        export_compressed_tensors(torch.nn.Linear(2, 2), tmp_path / "a")
    model = make_model("opt").half()
    model.model.decoder.layers[0].fc1.weight.data.fill_(1e-6)  # a scale below fp16's precision
    with pytest.raises(ValueError, match="its scales do not fit in"):
        export_compressed_tensors(quantized(model, group_size=8), tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_codes_in_int32():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)[:, :11]
    words = pack_int32(codes)
    assert words.dtype == torch.int32 and words.shape == (2, 2)
    assert words[0].tolist() == [0x76543210, 0x00000A98]
    assert pack_int32(torch.full((1, 8), 7, dtype=torch.int8)).tolist() == [[-1]]
    assert pack_int32(torch.empty(0, 5, dtype=torch.int8)).shape == (0, 1)
