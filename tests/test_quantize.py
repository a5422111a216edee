"""The walk over a model: families, shared plans, memory, reports, refusals."""

import dataclasses
import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from smoothquant import collect_stats, quantize
from smoothquant.channels.sorting import choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.experts import W4A4Experts
from smoothquant.layers.linear import FakeW4A4Linear, QuantizedLinear, W4A4Linear
from smoothquant.model_size import get_model_size
from smoothquant.models.families import layer_inputs
from smoothquant.models.kept import output_heads
from smoothquant.models.modules import module_places, replace_module
from smoothquant.models.routing import GATED, expert_names, routed_inputs
from smoothquant.quantization.engine import Plan

pytestmark = pytest.mark.usefixtures("linears_alone")

CONFIG = MixedQuantConfig(group_size=20, salient_prop=0.1)


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def matrix_groups(model):
    """Names of the matrices that must share a plan."""
    for item in layer_inputs(model):
        if item.linears:
            yield item.linears
        if item.experts:
            experts = model.get_submodule(item.experts)
            for name in expert_names(item.experts, experts):
                yield (name,)


@pytest.mark.parametrize("backend", ["int4", "fake"])
@pytest.mark.filterwarnings("ignore:no token was routed")
def test_every_family(architecture, backend, make_model, token_ids):
    model = make_model(architecture)
    groups = list(matrix_groups(model))
    stats = collect_stats(model, [token_ids], progress=False)
    float_logits, float_size = logits(model, token_ids), get_model_size(model)
    config = MixedQuantConfig(group_size=20, salient_prop=0.1, backend=backend)
    report = quantize(model, config, stats, progress=False)

    layers = quantized_layers(model)
    assert sorted(layers) == sorted(name for group in groups for name in group)
    for group in groups:
        plan = choose_channels(stats[group[0]], salient_prop=0.1)
        for name in group:
            if stats[name].count:  # else an expert that no token was routed to
                assert torch.equal(layers[name].perm, plan.perm)
            assert layers[name].num_salient == plan.num_salient > 0
    assert 0 < relative(logits(model, token_ids), float_logits) < 0.5
    assert (get_model_size(model) < float_size) == (backend == "int4")
    assert [r.name for r in report if r.action == "quantized"] == [n for g in groups for n in g]
    kept = {r.name: r.reason for r in report if r.action == "kept"}
    (head,) = output_heads(model)
    assert kept[head] == "output head" and "embedding" in kept.values()


def test_backends_agree(make_model, token_ids):
    models = {backend: make_model("opt") for backend in ("int4", "fake")}
    before = logits(models["int4"], token_ids)
    stats = collect_stats(models["int4"], [token_ids], progress=False)
    for backend, model in models.items():
        config = MixedQuantConfig(group_size=20, salient_prop=0.1, backend=backend)
        quantize(model, config, stats, progress=False)
    one, other = (logits(model, token_ids) for model in models.values())
    # they differ in the rounding of salient weights, which later layers turn into other codes
    assert relative(one, other) < 0.5 * relative(one, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models(dtype, make_model, token_ids):
    model = make_model("llama").to(dtype)
    before = logits(model, token_ids)
    quantize(model, CONFIG, collect_stats(model, [token_ids], progress=False), progress=False)
    after = logits(model, token_ids)
    assert after.dtype == dtype and relative(after.float(), before.float()) < 0.5
    layer = model.model.layers[0].mlp.down_proj
    assert layer.salient_weight.dtype == dtype and layer.scales.dtype == torch.bfloat16


def test_no_float_copy_of_the_int4_part_remains(make_model, token_ids):
    model = make_model("llama-bias")
    old = [
        weakref.ref(model.get_submodule(n).weight) for i in layer_inputs(model) for n in i.linears
    ]
    quantize(model, CONFIG, progress=False)
    gc.collect()
    assert not any(ref() is not None for ref in old)
    for layer in quantized_layers(model).values():
        held = sum(tensor.nbytes for tensor in layer.buffers())
        exact = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert held == exact and not list(layer.parameters())


def test_each_float_weight_is_freed_before_the_next_is_packed(make_model, monkeypatch):
    model = make_model("llama")
    alive = {}
    for item in layer_inputs(model):
        alive |= {name: weakref.ref(model.get_submodule(name).weight) for name in item.linears}
    done, packed = [], W4A4Linear.from_weight.__func__

    def from_weight(cls, weight, *args, **kwargs):
        assert [name for name in done if alive[name]() is not None] == []
        layer = packed(cls, weight, *args, **kwargs)
        done.append(next(name for name, ref in alive.items() if ref() is weight))
        return layer

    monkeypatch.setattr(W4A4Linear, "from_weight", classmethod(from_weight))
    quantize(model, CONFIG, progress=False)
    assert done == list(alive)


def test_sort_by_weight_uses_all_weights_fed_by_the_input(make_model, token_ids):
    model, untouched = make_model("llama"), make_model("llama")
    stats = collect_stats(model, [token_ids], progress=False)
    config = MixedQuantConfig(group_size=20, salient_prop=0.1, sort="max", sort_by="weight")
    quantize(model, config, stats, progress=False)
    block = untouched.model.layers[1].self_attn
    rows = torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight])
    of_weights = ChannelStats.empty(48)
    of_weights.update(rows)
    name = "model.layers.1.self_attn.v_proj"
    plan = choose_channels(stats[name], salient_prop=0.1, sort="max", sort_stats=of_weights)
    assert torch.equal(model.get_submodule(name).perm, plan.perm)
    activation = choose_channels(stats[name], salient_prop=0.1, sort="max")
    assert not torch.equal(plan.perm, activation.perm)


def test_without_statistics_the_weights_choose(make_model, caplog):
    model = make_model("llama")
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    report = quantize(model, CONFIG, progress=False)
    of_weight = ChannelStats.empty(88)
    of_weight.update(weight)
    plan = choose_channels(of_weight, salient_prop=0.1)
    assert torch.equal(model.model.layers[0].mlp.down_proj.perm, plan.perm)
    assert caplog.text.count("the weights alone") == 1
    assert {r.reason for r in report if r.action == "quantized"} == {"weights"}


@pytest.mark.parametrize("salient_format", ["16bit", "int8"])
def test_report_adds_up_to_the_model(salient_format, make_model, token_ids):
    model = make_model("mixtral")
    config = dataclasses.replace(CONFIG, salient_format=salient_format)
    report = quantize(model, config, progress=False)
    counted = sum(r.bits_per_weight * torch.Size(r.shape).numel() for r in report)
    names = {r.name for r in report}
    rest = sum(
        t.nbytes * 8 for n, t in model.state_dict().items() if n.rpartition(".")[0] not in names
    )
    assert counted + rest == pytest.approx(get_model_size(model))
    assert {r.name: r.reason for r in report}["model.layers.0.mlp.gate"] == "router"


# ---- Mixture of experts


def test_experts_keep_the_forward_contract(make_model):
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(9, 48)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    linears = {}
    for expert in range(4):
        for part in GATED:
            matrix = getattr(experts, part)[expert]
            linears[expert, part] = nn.Linear(*reversed(matrix.shape), bias=False)
            linears[expert, part].weight.data = matrix.data
    replacement = W4A4Experts(linears, experts)
    with torch.no_grad():
        want = experts(x, index, weights)
        torch.testing.assert_close(replacement(x, index, weights), want)
        assert replacement(x[:0], index[:0], weights[:0]).shape == (0, 48)
        seen = {expert: (a, b) for expert, a, b in routed_inputs(experts, x, index)}
        rebuilt = torch.zeros_like(x)
        for expert, (_, h) in seen.items():
            token, slot = torch.where(index == expert)
            rebuilt[token] += (h @ experts.down_proj[expert].T) * weights[token, slot, None]
        torch.testing.assert_close(rebuilt, want)


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_an_expert_without_tokens_falls_back_to_its_weights_and_the_report_says_so(
    make_model, token_ids, caplog
):
    model = make_model("mixtral")
    stats = collect_stats(model, [token_ids], progress=False)
    name = "model.layers.0.mlp.experts.2.down_proj"
    of_weight = ChannelStats.empty(88)
    of_weight.update(model.model.layers[0].mlp.experts.down_proj[2])
    stats[name] = ChannelStats.empty(88)
    del stats["model.layers.0.mlp.experts.3.gate_up_proj"]
    report = {r.name: r for r in quantize(model, CONFIG, stats, progress=False)}
    perm = model.get_submodule(name).perm
    assert torch.equal(perm, choose_channels(of_weight, salient_prop=0.1).perm)
    idle = [n for n, r in report.items() if "statistics for this expert" in r.reason]
    assert [n for n in idle if ".0.mlp" in n] == [
        name,
        "model.layers.0.mlp.experts.3.gate_up_proj",
    ]
    assert f"no statistics for {len(idle)} expert matrices (first: {name})" in caplog.text


def test_a_layer_under_two_names_is_replaced_under_both(make_model, token_ids):
    model = make_model("llama")
    model.also = model.model.layers[0].mlp.down_proj
    model.model.layers[1].mlp.down_proj = model.also
    once = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    report = quantize(model, CONFIG, progress=False)
    assert isinstance(model.also, W4A4Linear)
    assert model.also is model.model.layers[0].mlp.down_proj
    assert model.also is model.model.layers[1].mlp.down_proj
    assert relative(model.also.weight, once) < 0.2
    assert [r.action for r in report if r.shape == (48, 88)] == ["quantized"]
    model(token_ids)


# ---- Refusals: nothing is changed


def drop(model, stats):
    for part in ("gate_proj", "up_proj"):
        del stats[f"model.layers.1.mlp.{part}"]


def narrow(model, stats):
    stats["model.layers.1.mlp.down_proj"] = ChannelStats.from_mean(torch.ones(7))


def tensor_entry(model, stats):
    stats["model.layers.1.mlp.down_proj"] = torch.ones(88)


def nan_weight(model, stats):
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")


def huge_weight(model, stats):
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = 3.4e38


def nan_bias(model, stats):
    bias = torch.zeros(48).index_fill_(0, torch.tensor([5]), float("nan"))
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(bias)


def wide_weight(model, stats):
    model.model.layers[1].mlp.down_proj.double()


def foreign_module(model, stats):
    model.model.layers[1].mlp.down_proj = nn.ReLU()


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (drop, ValueError, "no entry for model.layers.1.mlp.gate_proj or .* entries: model"),
        (narrow, ValueError, "down_proj must have 88 channels; got 7"),
        (tensor_entry, TypeError, "down_proj must be ChannelStats; got Tensor"),
        (nan_weight, ValueError, "weight of model.layers.1.mlp.down_proj holds NaN"),
        (huge_weight, ValueError, "down_proj holds values beyond the range of torch.bfloat16"),
        (nan_bias, ValueError, "bias of model.layers.1.mlp.down_proj holds NaN"),
        (wide_weight, TypeError, "down_proj must be float32, .*got torch.float64"),
        (foreign_module, TypeError, "down_proj must be an nn.Linear; got ReLU"),
    ],
)
def test_everything_is_checked_before_the_first_layer_changes(
    spoil, error, message, make_model, token_ids
):
    model = make_model("llama")
    stats = collect_stats(model, [token_ids], progress=False)
    spoil(model, stats)
    with pytest.raises(error, match=message):
        quantize(model, CONFIG, stats, progress=False)
    assert not quantized_layers(model)


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_a_fused_block_without_any_statistics_is_refused(make_model, token_ids):
    model = make_model("mixtral")
    stats = collect_stats(model, [token_ids], progress=False)
    stats = {name: entry for name, entry in stats.items() if "layers.1.mlp" not in name}
    with pytest.raises(ValueError, match="no entry for model.layers.1.mlp.experts.0.gate_up_proj"):
        quantize(model, CONFIG, stats, progress=False)


def test_a_quantized_model_is_refused(make_model):
    for backend, kind in (("int4", W4A4Linear), ("fake", FakeW4A4Linear)):
        model = make_model("opt")
        quantize(model, MixedQuantConfig(backend=backend), progress=False)
        assert isinstance(model.model.decoder.layers[0].fc1, kind)
        with pytest.raises(ValueError, match="model is quantized already: OPTForCausalLM"):
            quantize(model, CONFIG, progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("model", CONFIG), "model must be an nn.Module; got str"),
        ((nn.Linear(2, 2), {"group_size": 2}), "config must be a MixedQuantConfig; got dict"),
        (
            (nn.Linear(2, 2), CONFIG, [1]),
            "stats must be a mapping of module names or None; got list",
        ),
    ],
)
def test_argument_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        quantize(*arguments)


def test_a_single_linear_is_refused():
    with pytest.raises(ValueError, match="not be one; use W4A4Linear.from_float"):
        quantize(nn.Linear(2, 2), CONFIG)


def test_unknown_models_are_quantized_with_a_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    x = torch.randn(64, 20)
    before = model(x)
    with pytest.warns(UserWarning, match="model type None is unknown: assuming"):
        quantize(model, MixedQuantConfig(group_size=8), progress=False)
    assert isinstance(model[0], W4A4Linear) and isinstance(model[2], W4A4Linear)
    assert relative(model(x), before) < 0.3


def test_a_progress_bar_is_shown_in_a_terminal_alone(make_model, capsys, monkeypatch):
    quantize(make_model("opt"), CONFIG)
    assert "quantizing" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    quantize(make_model("opt"), CONFIG, progress=False)
    assert "quantizing" not in capsys.readouterr().err
    quantize(make_model("opt"), CONFIG)
    assert "quantizing: 100%" in capsys.readouterr().err


def test_a_module_of_two_names_is_replaced_under_both():
    model, shared = torch.nn.Module(), torch.nn.Linear(3, 3)
    model.first, model.rest = shared, torch.nn.Sequential(torch.nn.ReLU(), shared, shared)
    places = module_places(model)
    new = torch.nn.Linear(3, 3)
    replace_module(model, "rest.1", new, places)
    assert model.first is model.rest[1] is model.rest[2] is new
    assert shared not in places  # nothing keeps its weight


def test_what_a_replaced_module_holds_may_stand_elsewhere_too():
    model, shared = nn.Module(), nn.Linear(3, 3)
    model.block, model.alone = nn.Sequential(nn.ReLU(), shared), shared
    places = module_places(model)
    old = weakref.ref(model.block)
    replace_module(model, "block", nn.Identity(), places)
    gc.collect()
    assert old() is None and places[shared] == [(model, "alone")]
    replace_module(model, "alone", new := nn.Linear(3, 3), places)
    assert model.alone is new


def test_fused_weights_are_freed_block_by_block(make_model):
    model = make_model("mixtral")
    fused = {n: weakref.ref(p) for n, p in model.named_parameters() if n.endswith(GATED)}
    assert len(fused) == 4
    for record in Plan(model, CONFIG).pack():
        if record.name == "model.layers.1.self_attn.o_proj":
            gc.collect()
            alive = {name for name, parameter in fused.items() if parameter() is not None}
            assert alive == {name for name in fused if "layers.1" in name}


def test_nan_in_what_is_kept_is_refused(make_model):
    model = make_model("llama")
    model.model.norm.weight.data[2] = float("inf")
    with pytest.raises(ValueError, match="parameter model.norm.weight holds NaN or Inf"):
        quantize(model, CONFIG, progress=False)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_nan_in_what_is_kept_is_named_before_a_token_is_run(make_model, token_ids):
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match="parameter model.layers.0.input_layernorm.weight holds"):
        quantize(model, CONFIG, batches=[token_ids], progress=False)


@pytest.mark.parametrize("kind", ["meta", torch.float8_e4m3fn, torch.float64])
def test_what_is_kept_may_be_without_memory_or_of_an_odd_dtype(kind, make_model):
    model = make_model("llama-bias")
    head = model.lm_head.weight.detach().to(kind)
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    quantize(model, CONFIG, progress=False)
    assert isinstance(model.model.layers[1].mlp.down_proj, W4A4Linear)
    assert model.lm_head.weight.data_ptr() == head.data_ptr()
