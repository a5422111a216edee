"""Modules that must stay as they are stay, for a reason that the report gives, and no others do."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import AutoConfig

from smoothquant import MixedQuantConfig, quantize
from smoothquant.checkpoints.folder import load_quantized, save_quantized
from smoothquant.models.kept import kept_modules, output_heads

pytestmark = pytest.mark.filterwarnings("ignore:model type .* is unknown", "ignore:.*weight_norm")
CONFIG = MixedQuantConfig(group_size=16)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(class_name, model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return getattr(transformers, class_name)(config).eval()


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Scaled(nn.Linear):
    """A subclass whose parent reads a parameter of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


class Renamed(nn.Linear):
    """An alias, which computes what nn.Linear does."""


class Reader(nn.Module):
    """Reads the weight of one linear without calling it, and only the dtype of another's."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.called(x.to(self.called.weight.dtype)) @ self.read.weight


def patched(linear):
    linear.forward = lambda x: x
    return linear


def with_child():
    linear = nn.Linear(32, 32)
    linear.extra = nn.ReLU()
    return linear


KEPT = {
    "own forward": lambda: Rectified(32, 32),
    "replaced forward": lambda: patched(nn.Linear(32, 32)),
    "own parameter": lambda: Scaled(32, 32),
    "own module": with_child,
    "weight_norm": lambda: weight_norm(nn.Linear(32, 32)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(32, 32)),
    "pruning": lambda: prune.l1_unstructured(nn.Linear(32, 32), "weight", 3),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(32, 32)),
}


@pytest.mark.parametrize("special", KEPT.values(), ids=KEPT)
def test_a_linear_with_more_than_weight_and_bias_stays(special):
    model = nn.Sequential(nn.Linear(32, 32), special(), Renamed(32, 32)).eval()
    x = torch.randn(4, 32)
    expected = model[1](x)
    records = {record.name: record for record in quantize(model, CONFIG, progress=False)}
    assert torch.equal(model[1](x), expected)
    assert [n for n, r in records.items() if r.action == "quantized"] == ["0", "2"]


def test_a_weight_that_is_read_stays():
    model = nn.Sequential(Reader(), nn.MultiheadAttention(32, 2), nn.TransformerDecoderLayer(32, 2))
    kept = set(kept_modules(model))
    attentions = ("1", "2.self_attn", "2.multihead_attn")
    assert kept == {"0.read", *(f"{name}.out_proj" for name in attentions)}


def test_a_weight_that_is_read_stays_in_transformers_models():
    state = {"state_size": 8, "mamba_d_state": 8}
    for class_name, model_type in (("MambaForCausalLM", "mamba"), ("JambaForCausalLM", "jamba")):
        with torch.device("meta"):
            kept = kept_modules(build(class_name, model_type, **state, num_experts=2))
        last = {name.rpartition(".")[2] for name in kept}
        assert last <= {"dt_proj", "lm_head", "router"} and "dt_proj" in last


@pytest.mark.parametrize(
    "register",
    [
        lambda linear: linear.register_forward_hook(lambda module, x, y: 2 * y),
        lambda linear: linear.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
        lambda linear: linear.register_full_backward_hook(lambda module, x, y: None),
    ],
)
def test_hooks_are_refused_and_may_be_left_out(register):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    handle = register(model[1])
    with pytest.raises(ValueError, match="1 has hooks"):
        quantize(model, CONFIG, progress=False)
    quantize(model, MixedQuantConfig(group_size=16, ignore=["1"]), progress=False)
    assert type(model[1]) is nn.Linear
    handle.remove()


HEADS = {
    "RobertaForSequenceClassification": ("roberta", {"classifier.dense", "classifier.out_proj"}),
    "ElectraForSequenceClassification": ("electra", {"classifier.dense", "classifier.out_proj"}),
    "BartForSequenceClassification": (
        "bart",
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    "BertForMaskedLM": ("bert", {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
    "DistilBertForMaskedLM": ("distilbert", {"vocab_transform", "vocab_projector"}),
    "LlamaForQuestionAnswering": ("llama", {"qa_outputs"}),
    "LlamaForTokenClassification": ("llama", {"score"}),
    "LlamaForCausalLM": ("llama", {"lm_head"}),
    "LlamaModel": ("llama", set()),
}


@pytest.mark.parametrize("class_name", HEADS)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "parallel"])
def test_heads_are_all_that_is_outside_the_base_model(class_name, wrap):
    model_type, heads = HEADS[class_name]
    model = wrap(build(class_name, model_type))
    prefix = "module." if isinstance(model, nn.DataParallel) else ""
    assert output_heads(model) == {prefix + name for name in heads}
    assert kept_modules(model) == {prefix + name: "output head" for name in heads}


def test_the_head_of_a_model_with_adapters_stays():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(build("LlamaForCausalLM", "llama"), config)
    with pytest.warns(UserWarning, match="q_proj .it has an adapter"):
        records = quantize(model, CONFIG, progress=False)
    quantized = {r.name.rpartition(".")[2] for r in records if r.action == "quantized"}
    assert quantized == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model(torch.ones(1, 4, dtype=torch.long))


def test_routers_with_a_forward_of_their_own_stay(tmp_path):
    fields = {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2}
    model = build("Llama4ForCausalLM", "llama4_text", **fields)
    ids = torch.ones(1, 8, dtype=torch.long)
    records = quantize(model, CONFIG, progress=False)
    router = next(r for r in records if r.name.endswith("router"))
    assert router.action == "kept" and router.reason
    save_quantized(model, tmp_path / "q")
    assert torch.equal(load_quantized(tmp_path / "q")(ids).logits, model(ids).logits)


def test_plain_aliases_are_quantized(make_model):
    records = quantize(make_model("falcon-new"), CONFIG, progress=False)
    assert sum(record.action == "quantized" for record in records) == 8


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_broken_layer_is_named_before_calibration(leaf, make_model, token_ids):
    model = make_model("llama-bias")
    getattr(model.model.layers[0].mlp.down_proj, leaf).data.view(-1)[3] = float("inf")
    with pytest.raises(ValueError, match=f"{leaf} of model.layers.0.mlp.down_proj holds NaN"):
        quantize(model, CONFIG, batches=[token_ids], progress=False)
