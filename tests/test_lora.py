"""Adapters on quantized linears, and the gradient that trains them."""

import pytest
import torch
from torch import nn

from smoothquant import (
    MixedQuantConfig,
    W4A4Linear,
    load_quantized,
    quantize,
    save_quantized,
)
from smoothquant.layers.linear import FakeW4A4Linear


@pytest.mark.parametrize("backend", ["int4", "fake"])
@pytest.mark.parametrize("rotation", [0, 8])
def test_the_gradient_goes_straight_through(backend, rotation):
    config = MixedQuantConfig(group_size=16, salient_prop=0.1, backend=backend, rotation=rotation)
    model = nn.Sequential(nn.Linear(72, 48))
    with pytest.warns(UserWarning, match="model type None is unknown"):
        quantize(model, config, progress=False)
    layer = model[0]
    assert type(layer) is (W4A4Linear if backend == "int4" else FakeW4A4Linear)
    x = torch.randn(3, 5, 72)
    grad = torch.randn(3, 5, 48)
    with torch.no_grad():
        want = layer(x)
    for run in (layer, torch.compile(layer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y += 1  # autograd lets nobody change a view in place
        y.backward(grad)
        assert torch.equal(y.detach(), want + 1)
        assert torch.allclose(leaf.grad, grad @ layer.weight, atol=1e-5)
    assert not list(layer.parameters()) and not layer(x).requires_grad


def test_in_16_bits():
    layer = W4A4Linear.from_float(nn.Linear(40, 24).bfloat16(), salient_prop=0.1)
    x = torch.randn(4, 40, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    want = torch.ones(4, 24, dtype=torch.bfloat16) @ layer.weight.bfloat16()
    assert x.grad.dtype == torch.bfloat16 and torch.equal(x.grad, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_adapters_train_and_come_back(architecture, make_model, token_ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft, of the test extra, is not installed")
    from smoothquant.lora import on_quantized

    def quantized():
        model = make_model(architecture)
        quantize(model, MixedQuantConfig(group_size=20, salient_prop=0.1), progress=False)
        return model

    plain = quantized()
    before = plain(token_ids).logits.detach()
    targets = ["q_proj", "v_proj", "down_proj"]
    config = on_quantized(peft.LoraConfig(r=4, target_modules=targets))
    model = peft.get_peft_model(plain, config)
    assert torch.equal(model(token_ids).logits, before)  # an adapter begins as nothing
    packed = {n: b.clone() for n, b in model.named_buffers() if n.endswith("qweight")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    buffers = dict(model.named_buffers())
    assert packed and all(torch.equal(buffers[name], b) for name, b in packed.items())

    model.save_pretrained(tmp_path / "adapter")
    config = on_quantized(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter", config=config)
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_is_not_saved_or_quantized(make_model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft, of the test extra, is not installed")
    from smoothquant.lora import on_quantized

    config = MixedQuantConfig(group_size=20)
    targets = {"r": 2, "target_modules": ["q_proj"]}
    floats = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**targets))
    inside = floats.get_base_model()
    for model in (floats, inside):
        with pytest.raises(ValueError, match="model must have no adapter of PEFT"):
            quantize(model, config, progress=False)
    quantized = make_model("llama")
    quantize(quantized, config, progress=False)
    model = peft.get_peft_model(quantized, on_quantized(peft.LoraConfig(**targets)))
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="model.save_pretrained.*model.unload()"):
            save_quantized(adapted, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    save_quantized(model.unload(), tmp_path / "q")
    load_quantized(tmp_path / "q")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["int4", "fake"])
def test_all_linear_includes_the_quantized(backend, make_model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft, of the test extra, is not installed")
    from smoothquant.lora import on_quantized

    def adapted(model):
        found = (name.removesuffix(".base_layer") for name, _ in model.named_modules())
        return {name for name in found if hasattr(model.get_submodule(name), "lora_A")}

    def config():
        return peft.LoraConfig(r=2, target_modules="all-linear")

    want = adapted(peft.get_peft_model(make_model("llama"), config()))
    model = make_model("llama")
    quantize(model, MixedQuantConfig(group_size=20, backend=backend), progress=False)
    found = peft.get_peft_model(model, on_quantized(config()))
    assert want and adapted(found) == want
    found.save_pretrained(tmp_path)
    saved = on_quantized(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(found.unload(), tmp_path, config=saved)
    assert adapted(again) == want
