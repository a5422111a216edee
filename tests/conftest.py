"""Tiny randomly initialized models of the real transformers classes, one per architecture."""

import os
import subprocess
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # which share the processors; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import length
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smoothquant.models import tables


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every test, and each in full")


def pytest_configure(config):
    if config.getoption("--all"):
        os.environ[length.VARIABLE] = "1"


def pytest_collection_modifyitems(config, items):
    """Without --all, tests marked `long` are left out; pytest counts them as deselected."""
    if not length.in_full():
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="module")
def linears_alone():
    """The output head and the embeddings stay as they are, unless a config names a format: for
    tests whose records, bytes or sizes are those of the linears."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "DEFAULT_FORMAT", "16bit")
        yield


# Hidden and intermediate sizes are no multiples of the group sizes used, nor powers of two.
_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_DIM = dict(_LLAMA, head_dim=12)
# Of experts in rows of their own: multiples of 32, so that torch treats all columns alike.
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DEEPSEEK = dict(
    _LLAMA,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
)
_FALCON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 88,
    "bias": True,
    "alibi": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_BLOOM = {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4}
_NEMOTRON_H = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 88,
    "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 80,
}

ARCHITECTURES = {
    "opt": ("opt", _OPT),
    "opt-post-norm": ("opt", dict(_OPT, do_layer_norm_before=False, word_embed_proj_dim=40)),
    "llama": ("llama", dict(_LLAMA, tie_word_embeddings=True)),
    "llama-bias": ("llama", dict(_LLAMA, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", _LLAMA),
    "mixtral": ("mixtral", dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(_LLAMA, **_MOE, shared_expert_intermediate_size=96, mlp_only_layers=[1]),
    ),
    "qwen3_moe": ("qwen3_moe", dict(_HEAD_DIM, **_MOE)),
    "gpt_oss": (
        "gpt_oss",
        dict(_HEAD_DIM, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2),
    ),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "llama4_text": (
        "llama4_text",
        dict(
            _HEAD_DIM,
            intermediate_size=64,
            intermediate_size_mlp=88,
            num_local_experts=4,
            num_experts_per_tok=1,
            moe_layers=[1],
        ),
    ),
    "aria_text": ("aria_text", dict(_HEAD_DIM, intermediate_size=64, moe_num_experts=4)),
    "nemotron_h": ("nemotron_h", _NEMOTRON_H),
    "nemotron_h-latent": ("nemotron_h", dict(_NEMOTRON_H, moe_latent_size=32)),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 88}),
    "falcon-parallel": ("falcon", dict(_FALCON, parallel_attn=True)),
    "falcon-sequential": ("falcon", dict(_FALCON, parallel_attn=False, multi_query=False)),
    "falcon-new": ("falcon", dict(_FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-new-one-norm": (
        "falcon",
        dict(_FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    ),
    "bloom": ("bloom", _BLOOM),
    "bloom-post-norm": ("bloom", dict(_BLOOM, apply_residual_connection_post_layernorm=True)),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _HEAD_DIM),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "gemma": ("gemma", dict(_HEAD_DIM, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(_HEAD_DIM, query_pre_attn_scalar=12)),
    "gpt_neox": ("gpt_neox", dict(_LLAMA, use_parallel_residual=True)),
    "gpt_neox-sequential": ("gpt_neox", dict(_LLAMA, use_parallel_residual=False)),
}


def build_model(architecture: str, seed: int = 0, **changes):
    """A float32 causal LM in eval mode with random weights, biases and norm gains; changes are
    fields of its configuration."""
    model_type, fields = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **fields | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Default initializations hide faults: zero biases, unit gains, tiny logits.
            spread = 0.3 if parameter.dim() == 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@pytest.fixture(scope="session")
def token_ids():
    """int64 [2, 24]: two rows of random tokens for the tiny models."""
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(7))


# Of the architectures with experts beside linears, one is enough for the short form.
LONG = {"deepseek_v3", "llama4_text", "aria_text", "nemotron_h", "nemotron_h-latent"}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
        for name in ARCHITECTURES
    ]
)
def architecture(request):
    """The name of each tiny architecture in turn."""
    return request.param


@pytest.fixture
def make_model():
    """build_model, for tests that choose the architecture."""
    return build_model


@pytest.fixture
def run_python():
    """Runs Python code in a process of its own; keyword arguments are environment variables."""

    def run(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=check,
        )

    return run


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every run of a test."""
    torch.manual_seed(0)
