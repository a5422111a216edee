"""Fused experts of models without a row in the table of families: transformers' usual experts are
quantized, others stay."""

import importlib

import pytest
import torch
from length import at_length
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from smoothquant import MixedQuantConfig, quantize
from smoothquant.checkpoints.folder import load_quantized, save_quantized
from smoothquant.layers.experts import W4A4Experts
from smoothquant.models.kept import kept_modules

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


def build(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", at_length(list(USUAL), list(USUAL)[:4]))
@torch.no_grad()
def test_usual_experts_are_quantized(model_type, tmp_path):
    model, ids = build(model_type, **USUAL[model_type]), torch.randint(3, 64, (2, 24))
    before = model(ids, use_cache=False).logits
    config = MixedQuantConfig(group_size=16, backend="fake", num_bits=8)
    records = quantize(model, config, batches=[ids], progress=False)
    experts = {r.name for r in records if r.action == "quantized" and ".experts." in r.name}
    assert len(experts) == 2 * 4 * model.config.num_hidden_layers
    after = model(ids, use_cache=False).logits
    assert (after - before).norm() < 0.05 * before.norm()
    quantized = {r.name.rpartition(".")[2] for r in records if r.action == "quantized"}
    assert not quantized & {"gate", "router", "shared_expert_gate"}
    save_quantized(model, tmp_path / "q")
    assert torch.equal(load_quantized(tmp_path / "q")(ids, use_cache=False).logits, after)


def test_they_are_quantized_while_loading(tmp_path):
    model = build("olmoe")
    model.save_pretrained(tmp_path / "float")
    ids, config = torch.randint(3, 64, (2, 24)), MixedQuantConfig(group_size=16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(loaded.model.layers[0].mlp.experts, W4A4Experts)
    quantize(model, config, progress=False)
    assert torch.equal(loaded(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "model_type, class_name, usual",
    [
        ("olmoe", "OlmoeExperts", True),
        ("granitemoe", "GraniteMoeExperts", True),
        ("gpt_oss", "GptOssExperts", False),  # biases, transposed, interleaved
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", False),  # biases, transposed
        ("llama4", "Llama4TextExperts", False),  # transposed, without the decorator
    ],
)
def test_other_experts_stay(model_type, class_name, usual):
    config = {"llama4": "llama4_text"}.get(model_type, model_type)
    folder = f"transformers.models.{model_type}.modeling_{model_type}"
    kind = getattr(importlib.import_module(folder), class_name)
    model = nn.ModuleDict({"experts": kind(AutoConfig.for_model(config, **SIZES))})
    expected = {} if usual else {"experts": f"fused experts of another kind: {class_name}"}
    assert kept_modules(model) == expected


def changed_gate(experts):
    experts.__class__ = type("Other", (type(experts),), {"_apply_gate": lambda self, x: x})


def extra_bias(experts):
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 64))


def flag(name, value):
    return lambda experts: setattr(experts, name, value)


@pytest.mark.parametrize(
    "change",
    [
        changed_gate,
        extra_bias,
        flag("has_bias", True),
        flag("has_gate", False),
        flag("is_transposed", True),
        flag("is_concatenated", False),
        flag("has_post_expert_norm", True),
        flag("down_proj", nn.Parameter(torch.zeros(4, 16, 32))),
    ],
)
def test_every_difference_counts(change):
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    model = nn.ModuleDict({"experts": OlmoeExperts(AutoConfig.for_model("olmoe", **SIZES))})
    assert kept_modules(model) == {}
    change(model["experts"])
    assert "fused experts of another kind" in kept_modules(model)["experts"]


def test_a_model_of_other_experts_warns_of_the_small_share(caplog):
    model = build("gpt_oss", head_dim=16)
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    assert "only " in caplog.text and "fused experts of another kind: GptOss" in caplog.text


def test_routers_of_other_experts_stay():
    with torch.device("meta"):
        model = build("jetmoe", kv_channels=16)
    assert kept_modules(model)["model.layers.0.mlp.router.layer"] == "router"
