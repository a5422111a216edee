"""MXFP4 weights in a model's files (GPT-OSS) are dequantized in every way in."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_float8 import assert_every_way_in_dequantizes, command, in_memory, with_config
from test_ways_in import by_layer, stored, while_loading
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from smoothquant import CheckpointError, MixedQuantConfig
from smoothquant.core.tensor_files import TENSORS
from smoothquant.models.loading import load_pretrained
from smoothquant.models.packed_weights import dequantized_mxfp4

METHOD = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
}
CONFIG = MixedQuantConfig(group_size=16, calibration="weights")
WAYS = (in_memory, by_layer, while_loading)


@pytest.fixture
def folders(make_model, tmp_path):
    """A folder with MXFP4 experts, and one with the weights that they stand for."""
    model = make_model("gpt_oss", hidden_size=64, head_dim=16, num_hidden_layers=1).bfloat16()
    for name in ("float", "mxfp4"):
        model.save_pretrained(tmp_path / name)
    plain = load_file(tmp_path / "float" / TENSORS)
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = packed.pop(name).shape
        codes = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 123, (experts, n, k // 32), dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = codes, scales
        plain[name] = convert_moe_packed_tensors(codes, scales)
    save_file(plain, tmp_path / "float" / TENSORS, {"format": "pt"})
    save_file(packed, tmp_path / "mxfp4" / TENSORS, {"format": "pt"})
    with_config(tmp_path / "mxfp4", METHOD)
    return tmp_path / "float", tmp_path / "mxfp4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_values_are_those_of_transformers(dtype):
    codes = torch.arange(256).repeat(2, 3).view(2, 48, 1, 16).to(torch.uint8)
    scales = torch.randint(120, 134, (2, 48, 1), dtype=torch.uint8)
    want = convert_moe_packed_tensors(codes, scales, dtype=dtype)
    got = dequantized_mxfp4(codes, scales, dtype)
    assert got.shape == (2, 32, 48) and torch.equal(got, want)


def test_every_way_in_dequantizes_them(folders, tmp_path, caplog):
    assert_every_way_in_dequantizes(*folders, CONFIG, "MXFP4 weights", tmp_path, caplog)


def test_the_command_dequantizes_them_by_layer(folders, tmp_path):
    plain, packed = folders
    options = ["--by-layer", "--no-calibration", "--set", "group_size=16"]
    command(["quantize", str(plain), str(tmp_path / "want"), *options])
    command(["quantize", str(packed), str(tmp_path / "q"), *options])
    assert stored(tmp_path / "q") == stored(tmp_path / "want")
    dry = ["--dry-run", *options]
    sizes = [command(["quantize", str(f), str(tmp_path / "x"), *dry]) for f in folders]
    assert sizes[0] == sizes[1]


def test_a_float_model_is_saved_as_one(folders, tmp_path):
    plain, packed = folders
    model = load_pretrained(packed)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    want, got = (load_file(folder / TENSORS) for folder in (plain, tmp_path / "again"))
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)


DOWN = "model.layers.0.mlp.experts.down_proj"


def without_scales(tensors):
    del tensors[f"{DOWN}_scales"]


def without_blocks(tensors):
    del tensors[f"{DOWN}_blocks"]


def cut(tensors):
    tensors[f"{DOWN}_scales"] = tensors[f"{DOWN}_scales"][:, 1:].contiguous()


def as_floats(tensors):
    tensors[f"{DOWN}_scales"] = tensors[f"{DOWN}_scales"].float()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_scales, "weight .* has no .*down_proj_scales"),
        (without_blocks, "weight .* has no .*down_proj_blocks"),
        (cut, "must have the shape of .*down_proj_scales"),
        (as_floats, "must be uint8; got float32"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit(spoil, message, folders, tmp_path):
    _, packed = folders
    tensors = load_file(packed / TENSORS)
    spoil(tensors)
    save_file(tensors, packed / TENSORS, {"format": "pt"})
    for way in WAYS:
        with pytest.raises(CheckpointError, match=message):
            way(packed, tmp_path / "q", CONFIG)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "mxfp4"]
