"""Fused experts: every layout that transformers' decorator describes is quantized, others stay."""

import copy
import importlib
import pickle

import pytest
import torch
from length import at_length
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from smoothquant import MixedQuantConfig, quantization_report, quantize
from smoothquant.channels.sorting import choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.checkpoints.folder import load_quantized, save_quantized
from smoothquant.layers.experts import W4A4Experts
from smoothquant.layers.linear import W4A4Linear
from smoothquant.models.families import LayerInput
from smoothquant.models.kept import kept_modules
from smoothquant.models.routing import (
    expert_arguments,
    expert_matrix,
    expert_names,
    routed_inputs,
    set_expert_matrices,
    without_weights,
)
from smoothquant.quantization.folding import _fold
from smoothquant.quantization.undo import dequantize

pytestmark = pytest.mark.filterwarnings("ignore:model type .* is unknown", "ignore:no token was")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "shared_expert_intermediate_size": 32,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
JAMBA = {
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
USUAL = {
    "olmoe": {},
    "granitemoe": {},
    "qwen3_next": LINEAR_ATTENTION,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v2": DEEPSEEK,
    "jamba": JAMBA,
    "dots1": {**DEEPSEEK, "n_shared_experts": 1},
    "glm4_moe": {**DEEPSEEK, "n_shared_experts": 1},
    "flex_olmo": {},
    "minimax": {"head_dim": 16},
    "phimoe": {},
}


# Experts that are stored or combined in other ways.
LAYOUTS = {
    "gpt_oss": {"head_dim": 16, "layer_types": ["full_attention"]},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 64, "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 1},
    "nemotron_h": {"layers_block_type": ["moe", "attention"], "num_hidden_layers": 2,
                   "head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                   "moe_shared_expert_intermediate_size": 32, "moe_latent_size": None},
    "deepseek_v4": {},
}  # fmt: skip


def build(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "model_type",
    at_length([*USUAL, *LAYOUTS], ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"]),
)
@torch.no_grad()
def test_fused_experts_are_quantized(model_type, tmp_path):
    model = build(model_type, **(USUAL | LAYOUTS)[model_type])
    for parameter in model.parameters():  # biases are zero, and would hide faults
        parameter.add_(torch.randn_like(parameter) * 0.02)
    ids = torch.randint(3, 64, (2, 24))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = model(ids, use_cache=False).logits
    config = MixedQuantConfig(group_size=16, backend="fake", num_bits=8)
    records = quantize(model, config, batches=[ids], progress=False)
    experts = {r.name for r in records if r.action == "quantized" and ".experts." in r.name}
    layers = sum(isinstance(module, W4A4Experts) for module in model.modules())
    assert len(experts) == 2 * 4 * layers > 0
    after = model(ids, use_cache=False).logits
    assert (after - before).norm() < 0.05 * before.norm()
    quantized = {r.name.rpartition(".")[2] for r in records if r.action == "quantized"}
    assert not quantized & {"gate", "router", "shared_expert_gate"}
    save_quantized(model, tmp_path / "q")
    assert torch.equal(load_quantized(tmp_path / "q")(ids, use_cache=False).logits, after)
    dequantize(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    restored = model(ids, use_cache=False).logits
    assert (restored - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize(
    "model_type", at_length(["olmoe", *LAYOUTS], ["olmoe", "nemotron_h", "gpt_oss"])
)
def test_they_are_quantized_while_loading(model_type, tmp_path):
    model = build(model_type, **LAYOUTS.get(model_type, {}))
    model.save_pretrained(tmp_path / "float")
    config = MixedQuantConfig(group_size=16, calibration="weights")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert any(isinstance(module, W4A4Experts) for module in loaded.modules())
    records = quantize(model, config, progress=False)
    assert quantization_report(loaded) == records
    states = [m.state_dict() for m in (loaded, model)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def experts_of(model_type, class_name, **fields):
    """A float fused experts module with random parameters."""
    torch.manual_seed(0)
    folder = f"transformers.models.{model_type}.modeling_{model_type}"
    kind = getattr(importlib.import_module(folder), class_name)
    config = {"llama4": "llama4_text", "aria": "aria_text", "minimax_m3_vl": "minimax_m3_vl_text"}
    config = AutoConfig.for_model(config.get(model_type, model_type), **{**SIZES, **fields})
    config._experts_implementation = "eager"
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def float_linears(experts):
    """W4A4Experts with the float module's own weights, in float linears."""
    linears = {}
    for expert, part in expert_names("", experts).values():
        weight, bias = expert_matrix(experts, expert, part)
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        linear.weight.data = weight.data
        if bias is not None:
            linear.bias.data = bias.data
        linears[expert, part] = linear
    return W4A4Experts(linears, experts)


CLASSES = {
    "OlmoeExperts": ("olmoe", {}),
    "GptOssExperts": ("gpt_oss", {}),  # transposed, biases, gate and up alternate
    "OpenAIPrivacyFilterExperts": ("openai_privacy_filter", {}),  # transposed, biases
    "AriaExperts": ("aria", {"moe_num_experts": 4}),  # transposed
    "NemotronHExperts": ("nemotron_h", {"n_routed_experts": 4}),  # no gate
    "DeepseekV4Experts": ("deepseek_v4", {}),  # a gate of its own
    "MiniMaxM3VLExperts": ("minimax_m3_vl", {}),
}
CALLS = {
    "by position": lambda x, index, weights: ((x, index, weights), {}),
    "by name": lambda x, index, weights: (
        (),
        {"hidden_states": x, "top_k_index": index, "top_k_weights": weights},
    ),
    "GPT-OSS's names": lambda x, index, weights: (
        (x,),
        {"routing_weights": weights, "router_indices": index},
    ),
}


@pytest.mark.parametrize("class_name", CLASSES)
@torch.no_grad()
def test_experts_compute_what_the_float_module_computes(class_name):
    model_type, fields = CLASSES[class_name]
    experts = experts_of(model_type, class_name, **fields)
    assert kept_modules(nn.ModuleDict({"experts": experts})) == {}
    x, weights = torch.randn(9, 32), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    want, packed = experts(x, index, weights), float_linears(experts)
    for call in CALLS.values():
        args, kwargs = call(x, index, weights)
        torch.testing.assert_close(packed(*args, **kwargs), want)
    # an expert on another device
    index[3:6, 1], weights[3:6, 1] = 4, 0
    got = packed(x, index, weights)
    torch.testing.assert_close(got, experts(x, index.clamp(max=3), weights))
    restored = dequantized(packed)
    assert list(restored.state_dict()) == list(experts.state_dict())
    torch.testing.assert_close(restored(x, index.clamp(max=3), weights), got)


def dequantized(packed):
    """The float module of W4A4Experts with float linears."""
    experts = without_weights(packed.float_experts)
    for part in packed.parts:
        linears = [packed.get_submodule(f"{e}.{part}") for e in range(packed.num_experts)]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        set_expert_matrices(experts, part, [linear.weight for linear in linears], biases)
    return experts


@torch.no_grad()
def test_batched_experts_compute_what_the_float_module_computes():
    experts = experts_of("llama4", "Llama4TextExperts")
    assert kept_modules(nn.ModuleDict({"experts": experts})) == {}
    x = torch.randn(4 * 5, 32) * (torch.rand(4 * 5, 1) < 0.4)
    packed = float_linears(experts)
    torch.testing.assert_close(packed(x), experts(x))
    x, index, _ = expert_arguments(4, (x,), {})
    seen = {expert: a for expert, a, _ in routed_inputs(experts, x, index)}
    routed = [x[5 * e : 5 * e + 5] for e in range(4)]
    for expert, rows in enumerate(routed):
        rows = rows[rows.any(-1)]
        assert torch.equal(seen.get(expert, rows[:0]), rows)


@pytest.mark.parametrize("class_name", ["GptOssExperts", "NemotronHExperts", "AriaExperts"])
@torch.no_grad()
def test_permutations_fold_into_the_rows_that_make_a_channel(class_name):
    model_type, fields = CLASSES[class_name]
    experts = experts_of(model_type, class_name, **fields)
    rows = expert_names("", experts)
    config = MixedQuantConfig(recipe="rtn", group_size=16, calibration="weights")
    linears = {}
    for expert, part in rows.values():
        weight, bias = expert_matrix(experts, expert, part)
        plan = choose_channels(stats_of(weight), num_salient=2)
        linears[expert, part] = W4A4Linear.from_weight(weight, bias, config, plan)
    packed = W4A4Experts(linears, experts)
    x, index = torch.randn(9, 32), torch.randint(0, 4, (9, 1))
    before = packed(x, index, torch.ones(9, 1))
    item = LayerInput("experts", None, (), experts="experts")
    modules = dict(nn.ModuleDict({"experts": packed}).named_modules())
    for expert in range(4):
        names = [item.expert_linear(expert, part) for part in packed.parts]
        second = LayerInput(names[1], None, (names[1],), "experts", made_by=(names[0],))
        assert _fold(second, modules)
        assert torch.equal(modules[names[1]].perm.long(), torch.arange(len(modules[names[1]].perm)))
    torch.testing.assert_close(packed(x, index, torch.ones(9, 1)), before)


def stats_of(weight):
    stats = ChannelStats.empty(weight.shape[1])
    stats.update(weight)
    return stats


class Late(GptOssExperts):
    """A subclass whose forward the decorator has not seen."""

    def forward(self, hidden_states, *routing):
        return hidden_states


def extra_bias(experts):
    experts.down_proj_bias = nn.Parameter(torch.zeros(4, 32))


def own_forward(experts):
    experts.forward = lambda *args: args[0]


def undecorated(experts):
    experts.__class__ = type("Other", (nn.Module,), {"forward": lambda self, x: x})


def flag(name, value):
    return lambda experts: setattr(experts, name, value)


@pytest.mark.parametrize(
    "change, reason",
    [
        (undecorated, "Other has a forward of its own"),
        (own_forward, "OlmoeExperts has a forward of its own"),
        (flag("has_post_expert_norm", True), "OlmoeExperts has a norm after each expert"),
        (extra_bias, "OlmoeExperts has other tensors"),
        (flag("has_bias", True), "OlmoeExperts has other tensors"),
        (flag("has_gate", False), "OlmoeExperts has other tensors"),
        (flag("is_transposed", True), "OlmoeExperts has other tensors"),
        (flag("down_proj", nn.Parameter(torch.zeros(4, 16, 32))), "OlmoeExperts has other tensors"),
        (lambda experts: experts.register_buffer("scale", torch.ones(1)), "other tensors"),
    ],
)
def test_what_w4a4_experts_do_not_compute_stays(change, reason):
    model = nn.ModuleDict({"experts": experts_of("olmoe", "OlmoeExperts")})
    assert kept_modules(model) == {}
    change(model["experts"])
    kept = kept_modules(model)["experts"]
    assert kept.startswith("fused experts of another kind: ") and kept.endswith(reason)


def test_a_subclass_with_a_forward_of_its_own_stays():
    config = AutoConfig.for_model("gpt_oss", **SIZES)
    kept = kept_modules(nn.ModuleDict({"experts": Late(config)}))
    assert kept["experts"].endswith("Late has a forward of its own")


def test_a_model_of_other_experts_warns_of_the_small_share(caplog):
    model = build("olmoe")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    quantize(model, MixedQuantConfig(group_size=16, calibration="weights"), progress=False)
    assert "only " in caplog.text and "OlmoeExperts has a norm after each expert" in caplog.text


def test_routers_of_other_experts_stay():
    with torch.device("meta"):
        model = build("jetmoe", kv_channels=16)
    assert kept_modules(model)["model.layers.0.mlp.router.layer"] == "router"


def test_experts_of_any_model_are_copied_pickled_and_dequantized():
    model = nn.ModuleDict({"experts": experts_of("gpt_oss", "GptOssExperts")})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    quantize(model, MixedQuantConfig(group_size=16, calibration="weights"), progress=False)
    x, index, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    want = model["experts"](x, index, weights)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied["experts"](x, index, weights), want)
        assert sum(tensor.numel() for tensor in copied["experts"].parameters()) == 0
    dequantize(model)
    assert type(model["experts"]) is GptOssExperts
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
