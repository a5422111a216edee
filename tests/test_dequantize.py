"""Back to a plain model: the codes' values as float weights, in modules of the original classes."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from smoothquant import MixedQuantConfig, collect_stats, dequantize, fold_permutations, quantize
from smoothquant.layers.linear import QuantizedLinear, W4A4Linear
from smoothquant.models.linears import linear_weight
from smoothquant.models.modules import module_copy
from smoothquant.models.routing import expert_matrix

pytestmark = pytest.mark.usefixtures("linears_alone")

CONFIG = MixedQuantConfig(group_size=20, salient_prop=0.1, recipe="fast")


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def weights(model):
    """Of each quantized linear, as its codes say."""
    return {
        name: module.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def plain_weight(model, name):
    """A dequantized linear's weight, or that of one expert's matrix."""
    try:
        return linear_weight(model.get_submodule(name))
    except AttributeError:
        block, expert, part = name.rsplit(".", 2)
        return expert_matrix(model.get_submodule(block), int(expert), part)[0]


@pytest.mark.parametrize("backend", ["int4", "fake"])
def test_every_architecture_comes_back(architecture, backend, make_model, token_ids, tmp_path):
    model = make_model(architecture)
    shapes = {name: (type(t), t.shape, t.dtype) for name, t in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    quantize(model, MixedQuantConfig(group_size=20, backend=backend), progress=False)
    want = weights(model)
    dequantize(model)
    assert {n: (type(t), t.shape, t.dtype) for n, t in model.state_dict().items()} == shapes
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(torch.equal(plain_weight(model, name), want[name]) for name in want)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    for left in ("mixedquant_config", "mixedquant_report", "hf_quantizer"):
        assert getattr(model, left, None) is None
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_the_weights_are_those_that_the_integers_compute_with(make_model, token_ids):
    model = make_model("llama")
    quantize(model, MixedQuantConfig(salient_prop=1.0), progress=False)  # no activation is rounded
    plain = module_copy(model)
    dequantize(plain)
    assert torch.allclose(logits(plain, token_ids), logits(model, token_ids), atol=1e-4)
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())  # the copy's own


def test_smoothing_and_folding_stay(make_model, token_ids):
    model = make_model("llama-bias")
    float_logits = logits(model, token_ids)
    stats = collect_stats(model, [token_ids], progress=False)
    config = MixedQuantConfig(
        salient_prop=1.0, smooth_alpha=0.5, sort_within_heads=True, group_size=4
    )
    quantize(model, config, stats, progress=False)
    fold_permutations(model)
    dequantize(model, torch.float32)
    gap = (logits(model, token_ids) - float_logits).abs().max() / float_logits.abs().max()
    assert gap < 0.05  # weights rounded to bfloat16 only


def test_dtypes(make_model):
    model = make_model("opt").to(torch.bfloat16)
    quantize(model, CONFIG, progress=False)
    want = weights(model)
    other = module_copy(model)
    dequantize(model)
    dequantize(other, torch.float32)
    for name, weight in want.items():
        assert torch.equal(other.get_submodule(name).weight, weight)
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16())
        assert model.get_submodule(name).bias.dtype == torch.bfloat16


def test_transformers_own_method_does_it(make_model, token_ids, tmp_path):
    model = make_model("mixtral")
    quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.dequantize()
    dequantize(model)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert not hasattr(loaded.config, "quantization_config")


def test_modules_that_are_no_transformers_models():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    model.append(model[0])  # one linear under two names
    quantize(model, MixedQuantConfig(group_size=4), progress=False)
    want = model[0].dequantize()
    dequantize(model)
    assert type(model[0]) is nn.Linear and model[0] is model[3]
    assert torch.equal(model[0].weight, want) and model[2].bias is None


def test_what_cannot_be_dequantized(make_model):
    with pytest.raises(ValueError, match="model must be quantized; got OPT"):
        dequantize(make_model("opt"))
    model = make_model("opt")
    model.model.decoder.layers[0].fc1.weight.data.mul_(1e6)
    quantize(model, CONFIG, progress=False)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
        dequantize(model, torch.float64)
    with pytest.raises(ValueError, match="fc1 is beyond the range of torch.float16"):
        dequantize(model, torch.float16)
    linears = [m for n, m in model.named_modules() if n.endswith(("proj", "fc1", "fc2"))]
    assert len(linears) == 12 and all(isinstance(layer, W4A4Linear) for layer in linears)
