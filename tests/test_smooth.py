"""Smoothing: the published formula, and the same function before and after, for every family."""

import pytest
import torch
from conftest import ARCHITECTURES
from torch import nn

from smoothquant import MixedQuantConfig
from smoothquant.channels.statistics import ChannelStats
from smoothquant.models.families import layer_inputs
from smoothquant.models.linears import linear_weight
from smoothquant.models.routing import expert_parts
from smoothquant.quantization.engine import Plan
from smoothquant.quantization.smoothing import smooth_lm, smooth_ln_fcs, smooth_ln_fcs_llama_like

POST_NORM = ("opt-post-norm", "bloom-post-norm")


def random_scales(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for item in layer_inputs(model):
        if item.norm is None:
            continue
        name = item.router or item.linears[0]
        k = linear_weight(model.get_submodule(name)).shape[1]
        scales[name] = torch.rand(k, generator=generator) * 4 + 0.05
    return scales


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in POST_NORM])
def test_function_is_preserved(architecture, make_model, token_ids):
    model = make_model(architecture).double()
    model.config._experts_implementation = "eager"  # the fused one knows no float64
    before, weights = logits(model, token_ids), state(model)
    smooth_lm(model, random_scales(model), alpha=0.6)
    changed = [
        name for name, tensor in model.state_dict().items() if not tensor.equal(weights[name])
    ]
    for item in layer_inputs(model):
        assert (f"{item.norm}.weight" in changed) == (item.norm is not None)
        for name in item.linears:
            assert (f"{name}.weight" in changed) == (item.norm is not None), name
        if item.experts:
            first, _ = expert_parts(model.get_submodule(item.experts))
            readers = [f"{item.router}.weight"] if item.router else []
            for name in (f"{item.experts}.{first}", *readers):
                assert (name in changed) == (item.norm is not None), name
    torch.testing.assert_close(logits(model, token_ids), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", POST_NORM)
def test_model_without_a_norm_to_smooth_is_refused(architecture, make_model):
    model = make_model(architecture)
    with pytest.raises(ValueError, match="has no norm that feeds only linears"):
        smooth_lm(model, random_scales(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_published_formula(dtype, alpha):
    torch.manual_seed(0)
    ln, fcs = nn.LayerNorm(6), [nn.Linear(6, 5), nn.Linear(6, 3)]
    with torch.no_grad():
        ln.weight.uniform_(0.5, 2)
        ln.bias.uniform_(-1, 1)
        fcs[0].weight[:, 2] = 0
        fcs[1].weight[:, 2] = 0
    for module in (ln, *fcs):
        module.to(dtype)
    act = torch.rand(6) * 5
    act[1] = 0
    largest = torch.cat([fc.weight.abs().max(dim=0, keepdim=True)[0] for fc in fcs])
    largest = largest.max(dim=0)[0].clamp(min=1e-5)
    scales = (act.to(dtype).pow(alpha) / largest.pow(1 - alpha)).clamp(min=1e-5)
    expected = [ln.weight / scales, ln.bias / scales, *[fc.weight * scales for fc in fcs]]
    if not all(torch.isfinite(t).all() for t in (scales, *expected)):
        with pytest.raises(ValueError, match="leave the range of torch.float16"):
            smooth_ln_fcs(ln, fcs, act, alpha)
        return
    smooth_ln_fcs(ln, fcs, act, alpha)
    for got, want in zip([ln.weight, ln.bias, *[fc.weight for fc in fcs]], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ln, fc: ln.bias.fill_(60000),  # divided by less than 1
        lambda ln, fc: fc.weight[:, 1].fill_(60000),  # multiplied by more than 1
        lambda ln, fc: ln.weight.fill_(60000),
    ],
)
@torch.no_grad()
def test_results_out_of_range_change_nothing(spoil):
    ln, fc = nn.LayerNorm(4).half(), nn.Linear(4, 3).half()
    spoil(ln, fc)
    before = [t.clone() for t in (ln.weight, ln.bias, fc.weight)]
    with pytest.raises(ValueError, match="leave the range of torch.float16"):
        smooth_ln_fcs(ln, fc, torch.tensor([0.5, 2.0, 0.5, 0.5]), 1.0)
    for got, want in zip((ln.weight, ln.bias, fc.weight), before, strict=True):
        assert torch.equal(got, want)


def test_argument_types(make_model):
    with pytest.raises(TypeError, match="model must be an nn.Module; got NoneType"):
        smooth_lm(None, {})
    with pytest.raises(TypeError, match="scales must map module names; got NoneType"):
        smooth_lm(make_model("opt"), None)


def test_rms_norm_form_takes_one_linear_and_refuses_a_bias():
    norm, fc = nn.RMSNorm(4), nn.Linear(4, 3)
    smooth_ln_fcs_llama_like(norm, fc, torch.full((4,), 9.0), 1.0)
    assert torch.allclose(norm.weight, torch.full((4,), 1 / 9))
    with pytest.raises(ValueError, match="ln must have no bias; got LayerNorm"):
        smooth_ln_fcs_llama_like(nn.LayerNorm(4), fc, torch.ones(4))


def test_experts_entries_serve_for_the_router(make_model):
    one, other = make_model("mixtral"), make_model("mixtral")
    scales = random_scales(one)
    by_expert = dict(scales)
    for item in layer_inputs(one):
        if item.experts:
            whole = by_expert.pop(item.router)
            by_expert[item.expert_linear(0, "gate_up_proj")] = whole.clone().mul_(0.5)
            by_expert[item.expert_linear(2, "gate_up_proj")] = whole
    smooth_lm(one, scales)
    smooth_lm(other, by_expert)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_published_scales_name_experts_as_transformers_4_did(make_model):
    one, other = make_model("mixtral"), make_model("mixtral")
    scales = random_scales(one)
    published = {}
    for name, scale in scales.items():
        published[name.replace(".mlp.", ".block_sparse_moe.")] = scale
    for layer in range(2):
        for expert in range(4):
            for part, size in (("w1", 48), ("w2", 88), ("w3", 48)):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                published[name] = torch.rand(size)
    smooth_lm(one, scales)
    smooth_lm(other, published)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    stats = {name: ChannelStats.from_max(scale) for name, scale in published.items()}
    for item in layer_inputs(one):
        if item.num_heads:  # attention outputs, which random_scales leaves out
            stats[item.name] = ChannelStats.from_max(torch.rand(48))
    plan = Plan(one, MixedQuantConfig(), stats)
    used = {group.name: group.stats for group in plan.groups if group.expert}
    down = published["model.layers.1.block_sparse_moe.experts.3.w2"]
    assert torch.equal(used["model.layers.1.mlp.experts.3.down_proj"].abs_max, down)


def tied_attention(model):
    for part in ("q_proj", "k_proj", "v_proj"):
        one, two = (getattr(layer.self_attn, part) for layer in model.model.layers)
        two.weight = one.weight


def tied_storage(model):
    one, two = (layer.mlp for layer in model.model.layers)
    two.up_proj.weight = nn.Parameter(one.up_proj.weight.data)


def tied_siblings(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight


def tied_gains(model):
    one, two = model.model.layers
    two.input_layernorm.weight = one.post_attention_layernorm.weight = one.input_layernorm.weight


def one_norm(model):
    one, two = model.model.layers
    two.input_layernorm = one.input_layernorm


def one_linear(model):
    one, two = model.model.layers
    two.mlp.gate_proj = one.mlp.gate_proj


def one_layer(model):
    model.model.layers[1] = model.model.layers[0]


def one_attention(model):
    model.model.layers[1].self_attn = model.model.layers[0].self_attn


@pytest.mark.parametrize(
    "tie",
    [
        one_attention,
        tied_attention,
        tied_storage,
        tied_siblings,
        tied_gains,
        one_norm,
        one_linear,
        one_layer,
    ],
)
@torch.no_grad()
def test_what_layers_share_is_smoothed_once(tie, make_model, token_ids):
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight[5] = 30
    tie(model)
    before = model(token_ids).logits
    smooth_lm(model, random_scales(model))
    torch.testing.assert_close(model(token_ids).logits, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_one_weight_of_two_linears_is_multiplied_once():
    ln, one, two, x = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    two.weight = one.weight
    before = [one(ln(x)), two(ln(x))]
    smooth_ln_fcs(ln, [one, two], torch.rand(4) * 9)
    torch.testing.assert_close([one(ln(x)), two(ln(x))], before)


def drop_last(scales):
    del scales["model.layers.1.mlp.gate_proj"]


def shorten(scales):
    scales["model.layers.1.mlp.gate_proj"] = torch.ones(5)


def poison(scales):
    scales["model.layers.1.mlp.gate_proj"][3] = float("nan")


def negate(scales):
    scales["model.layers.1.mlp.gate_proj"].neg_()


def listed(scales):
    scales["model.layers.1.mlp.gate_proj"] = [1.0]


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (drop_last, ValueError, "no entry for model.layers.1.mlp.gate_proj or .*up_proj"),
        (shorten, ValueError, "layers.1.mlp.gate_proj: the norm has 48 channels"),
        (poison, ValueError, "gate_proj must be finite"),
        (negate, ValueError, "gate_proj must be finite and not negative"),
        (listed, TypeError, "gate_proj must be a tensor; got list"),
    ],
)
def test_bad_scales_change_nothing(spoil, error, message, make_model):
    model = make_model("llama")
    before, scales = state(model), random_scales(model)
    spoil(scales)
    with pytest.raises(error, match=message):
        smooth_lm(model, scales)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_checked(alpha, make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match="alpha must be in"):
        smooth_lm(model, random_scales(model), alpha)
