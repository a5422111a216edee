"""FP8 weights in a model's files are dequantized in every way in; other methods are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ways_in import by_layer, stored, while_loading
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from smoothquant import CheckpointError, MixedQuantConfig, quantize, save_quantized
from smoothquant.cli.commands import app
from smoothquant.core.tensor_files import CONFIG, TENSORS
from smoothquant.models.float8 import dequantized
from smoothquant.models.loading import load_pretrained

BLOCK = (32, 20)  # divides no size of the tiny models
SMALLER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 2}
METHOD = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def by_hand(weight, scales, block):
    """Block by block."""
    rows, columns = block
    out = torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            out[at] = weight[at].float() * scales[i, j]
    return out.bfloat16()


def float8(weight, block):
    """A weight in FP8, and its scales."""
    n, k = weight.shape
    scales = torch.rand(-(-n // block[0]), -(-k // block[1])) * 0.01 + 0.001
    spread = scales.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    return (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scales


@pytest.fixture
def folders(make_model, tmp_path):
    """Folders with FP8 weights, and with the weights that they stand for."""

    def save(architecture, block=BLOCK):
        make_model(architecture, **SMALLER).bfloat16().save_pretrained(tmp_path / "float")
        shutil.copytree(tmp_path / "float", tmp_path / "fp8")
        plain = load_file(tmp_path / "float" / TENSORS)
        packed = dict(plain)
        for name, weight in plain.items():
            if "_proj" in name and weight.dim() == 2:
                codes, scales = float8(weight, block or weight.shape)
                packed[name], packed[f"{name}_scale_inv"] = codes, scales
                plain[name] = by_hand(codes, scales, block or weight.shape)
                if block is None:
                    packed[f"{name}_scale_inv"] = scales.view(())
                    packed[name.replace("weight", "activation_scale")] = torch.ones(())
        save_file(plain, tmp_path / "float" / TENSORS, {"format": "pt"})
        save_file(packed, tmp_path / "fp8" / TENSORS, {"format": "pt"})
        method = {**METHOD, "weight_block_size": block}
        with_config(tmp_path / "fp8", method)
        return tmp_path / "float", tmp_path / "fp8"

    return save


def with_config(folder, method):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))


def in_memory(source, target, config):
    model = load_pretrained(source)
    records = quantize(model, config, progress=False)
    save_quantized(model, target)
    return records


def assert_every_way_in_dequantizes(plain, packed, config, weights, tmp_path, caplog):
    """The folders `plain` and `packed` become the same, and one line tells of the `weights`."""
    want = in_memory(plain, tmp_path / "want", config), stored(tmp_path / "want")
    for way in (in_memory, by_layer, while_loading):
        caplog.clear()
        got = way(packed, tmp_path / way.__name__, config), stored(tmp_path / way.__name__)
        assert got == want, way
        told = [r.message for r in caplog.records if weights in r.message]
        assert len(told) == 1 and told[0].endswith("dequantized to bfloat16 on reading")


@pytest.mark.parametrize("architecture, block", [("deepseek_v3", BLOCK), ("llama-bias", None)])
def test_every_way_in_dequantizes_them(architecture, block, folders, tmp_path, caplog):
    config = MixedQuantConfig(group_size=16, calibration="weights")
    plain, packed = folders(architecture, block)
    assert_every_way_in_dequantizes(plain, packed, config, "FP8", tmp_path, caplog)


def test_the_command_dequantizes_them_in_memory_and_by_layer(folders, tmp_path):
    plain, packed = folders("llama-bias")
    options = ["--no-calibration", "--set", "group_size=16"]
    command(["quantize", str(plain), str(tmp_path / "want"), *options])
    command(["quantize", str(packed), str(tmp_path / "q"), *options])
    command(["quantize", str(packed), str(tmp_path / "layers"), "--by-layer", *options])
    want = stored(tmp_path / "want")
    assert stored(tmp_path / "q") == want == stored(tmp_path / "layers")
    for way in ([], ["--by-layer"]):
        dry = ["--dry-run", *way, *options]
        sizes = [command(["quantize", str(f), str(tmp_path / "x"), *dry]) for f in (plain, packed)]
        assert sizes[0] == sizes[1]


def command(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_config_may_be_a_dict(folders):
    _, packed = folders("llama-bias")
    fields = {"quant_method": "mixedquant", "group_size": 16, "calibration": "weights"}
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=fields)
    assert model.mixedquant_config == MixedQuantConfig(group_size=16, calibration="weights")


def test_a_float_model_is_saved_as_one(folders, tmp_path):
    plain, packed = folders("deepseek_v3")
    model = load_pretrained(packed)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    want, got = (load_file(folder / TENSORS) for folder in (plain, tmp_path / "again"))
    assert want.keys() == got.keys()
    assert all(torch.equal(tensor.float(), got[name].float()) for name, tensor in want.items())


@pytest.mark.parametrize("shape, block", [((7, 5), (4, 3)), ((8, 6), (4, 3)), ((3, 9, 7), (4, 4))])
def test_blocks_may_end_early(shape, block):
    *outer, n, k = shape
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(*outer, -(-n // block[0]), -(-k // block[1]))
    got = dequantized(weight, scales, block, torch.bfloat16)
    matrices = zip(weight.flatten(0, -3), scales.flatten(0, -3), strict=True) if outer else ()
    want = [by_hand(*pair, block) for pair in matrices] or [by_hand(weight, scales, block)]
    assert torch.equal(got, torch.stack(want).view(shape))


@pytest.mark.parametrize(
    "method, message",
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' .quantize the float model that it was made"),
        ({"quant_method": "compressed-tensors"}, "CompressedTensorsConfig.run_compressed=False"),
        ({**METHOD, "weight_block_size": [0, 128]}, "weight_block_size of .* must be two positive"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_other_methods_are_refused_by_name(method, message, make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "float")
    with_config(tmp_path / "float", method)
    config = MixedQuantConfig(group_size=16)
    for way in (by_layer, while_loading):
        with pytest.raises(ValueError, match=message):
            way(tmp_path / "float", tmp_path / "q", config)
        assert [path.name for path in tmp_path.iterdir()] == ["float"]


def without(tensors, name):
    del tensors[name]


def cut(tensors, name):
    tensors[name] = tensors[name][:, :1].clone()


def as_bytes(tensors, name):
    tensors[name] = torch.ones(tensors[name].shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without, "has no model.layers.0.mlp.down_proj.weight_scale_inv"),
        (cut, "must have shape"),
        (as_bytes, "must be float32.*got uint8"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit(spoil, message, folders, tmp_path):
    _, packed = folders("llama-bias")
    tensors = load_file(packed / TENSORS)
    spoil(tensors, "model.layers.0.mlp.down_proj.weight_scale_inv")
    save_file(tensors, packed / TENSORS, {"format": "pt"})
    for way in (in_memory, by_layer, while_loading):
        with pytest.raises(CheckpointError, match=f"layers.0.mlp.down_proj.weight.* {message}"):
            way(packed, tmp_path / "q", MixedQuantConfig(group_size=16))


def test_a_model_whose_layers_stayed_fp8_is_refused(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj has FP8 .*dequantize=True"):
        quantize(model, MixedQuantConfig(), progress=False)
