"""transformers' Conv1D layers are quantized like the nn.Linear layers that compute the same."""

import copy

import pytest
import torch
from length import at_length
from test_ways_in import WAYS, stored
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from smoothquant import (
    MixedQuantConfig,
    collect_stats,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
from smoothquant.checkpoints.export import export_compressed_tensors
from smoothquant.layers.linear import QuantizedLinear, W4A4Linear
from smoothquant.models.kept import kept_modules
from smoothquant.models.linears import is_conv1d
from smoothquant.quantization.smoothing import smooth_ln_fcs

CONFIG = MixedQuantConfig(group_size=16)


def as_linear(layer):
    linear = nn.Linear(layer.nx, layer.nf)
    linear.weight = nn.Parameter(layer.weight.T.contiguous())
    linear.bias = layer.bias
    return linear


def with_linears(model):
    """A copy of a model with an nn.Linear for each Conv1D."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if is_conv1d(module):
            block, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(block), leaf, as_linear(module))
    return model


RECIPES = [
    {"sort_within_heads": True, "salient_metric": "output", "salient_allocation": "output"},
    {},
    {"recipe": "best", "smooth_alpha": 0.5},
    {"smooth_alpha": "search", "act_clip": "search"},
    {"backend": "fake"},
]


@pytest.mark.parametrize(
    "fields", at_length(RECIPES, RECIPES[:1]), ids=lambda fields: " ".join(fields) or "fast"
)
def test_the_bits_are_those_of_linears(fields, make_model, token_ids):
    model = make_model("gpt2")
    other = with_linears(model)
    config = MixedQuantConfig(group_size=16, salient_prop=0.1, **fields)
    reports = []
    for each in (model, other):
        stats = collect_stats(each, [token_ids], progress=False)
        reports.append(quantize(each, config, stats, [token_ids], progress=False))
    assert reports[0] == reports[1]
    assert not any(map(is_conv1d, model.modules()))
    got, want = model.state_dict(), other.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_they_are_saved_loaded_and_restored(make_model, token_ids, tmp_path):
    model = make_model("gpt2")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    quantize(model, CONFIG, progress=False)
    save_quantized(model, tmp_path / "q")
    want = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    loaded = load_quantized(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    dequantize(loaded)
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == shapes
    restored = {n: m for n, m in loaded.named_modules() if is_conv1d(m)}
    assert len(restored) == 8
    assert all(torch.equal(module.weight.T, want[name]) for name, module in restored.items())
    loaded.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, loaded(token_ids).logits)


@pytest.mark.parametrize(
    "dtype", at_length([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str
)
def test_every_way_in_gives_the_same_bytes(dtype, make_model, tmp_path):
    make_model("gpt2").to(dtype).save_pretrained(tmp_path / "float")
    results = [
        (way(tmp_path / "float", tmp_path / way.__name__, CONFIG), stored(tmp_path / way.__name__))
        for way in WAYS
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("cross_attention", [False, True])
def test_a_model_with_cross_attention_has_no_other_inputs(cross_attention, make_model):
    model = make_model("gpt2", add_cross_attention=cross_attention, is_decoder=cross_attention)
    stats = collect_stats(model, [torch.tensor([[5, 6, 7]])], progress=False)
    report = quantize(model, CONFIG, stats, progress=False)
    names = {record.name for record in report if "crossattention" in record.name}
    kept = {record.name for record in report if "no calibration token" in record.reason}
    assert len(kept) == 2 * 3 * cross_attention and kept <= names


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_stays():
    model = nn.Sequential(Conv1D(32, 32), Doubled(32, 32))
    assert kept_modules(model) == {"1": "Doubled has a forward of its own"}


def test_single_layers(make_model):
    layer, x = Conv1D(24, 32), torch.randn(5, 32)
    quantized = [W4A4Linear.from_float(each, group_size=8) for each in (layer, as_linear(layer))]
    assert torch.equal(quantized[0](x), quantized[1](x))
    norm, linear = nn.LayerNorm(32), as_linear(layer)
    other = copy.deepcopy(norm)
    smooth_ln_fcs(norm, layer, x.abs().amax(0))
    smooth_ln_fcs(other, linear, x.abs().amax(0))
    assert torch.equal(layer.weight.T, linear.weight) and torch.equal(norm.weight, other.weight)


def test_compressed_tensors_cannot_hold_them(make_model, tmp_path):
    model = make_model("gpt2")
    config = MixedQuantConfig(recipe="rtn", salient_prop=0.0, sort="none", group_size=8)
    quantize(model, config, progress=False)
    with pytest.raises(ValueError, match="h.0.attn.c_attn: the format has no Conv1D"):
        export_compressed_tensors(model, tmp_path / "ct")
