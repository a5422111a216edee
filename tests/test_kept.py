"""Modules that must stay as they are stay, for a reason that the report gives, and no others do."""

import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import AutoConfig
from typer.testing import CliRunner

from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    collect_stats,
    convert,
    quantization_report,
    quantize,
)
from smoothquant.bundled import DATA, load_bundled
from smoothquant.calibration.stats_files import save_stats
from smoothquant.channels.sorting import choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.checkpoints.folder import load_quantized, save_quantized
from smoothquant.checkpoints.manifest import Manifest
from smoothquant.cli.commands import app
from smoothquant.models.kept import kept_modules, output_heads
from smoothquant.quantization.records import weight_counts

pytestmark = [
    pytest.mark.filterwarnings("ignore:model type .* is unknown", "ignore:.*weight_norm"),
    pytest.mark.usefixtures("linears_alone"),
]
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


def test_adapters_are_refused_and_the_head_below_them_is_known():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(build("LlamaForCausalLM", "llama"), config)
    assert {name.rpartition(".")[2] for name in output_heads(model)} == {"lm_head"}
    with pytest.raises(ValueError, match="model must have no adapter of PEFT"):
        quantize(model, CONFIG, progress=False)


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


ATTENTION = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
MLP = {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj"}),
        ("up_proj", {"model.layers.0.mlp.up_proj"}),
        ("mlp.up_proj", {"model.layers.0.mlp.up_proj"}),
        ("self_attn", ATTENTION),
        ("model.layers.0.self_attn", ATTENTION),
        ("*.self_attn.?_proj", ATTENTION),
        ("re:.*mlp", MLP),
        (r"re:model\.layers\.\d+\.mlp\.(gate|up|down)_proj$", MLP),
        ("lm_head", set()),
        ("model.norm", set()),
    ],
)
def test_ignored_modules_stay(pattern, expected, tmp_path):
    model = build("LlamaForCausalLM", "llama")
    config = MixedQuantConfig(group_size=16, ignore=[pattern], calibration="weights")
    records = quantize(model, config, progress=False)
    quantized = {record.name for record in records if record.action == "quantized"}
    assert (ATTENTION | MLP) - quantized == expected
    reasons = {record.name: record.reason for record in records}
    assert {reasons[name] for name in expected} <= {f"ignore={pattern!r}"}
    save_quantized(model, tmp_path / "q")
    loaded = load_quantized(tmp_path / "q")
    assert loaded.mixedquant_config == config
    again = {record.name: record.reason for record in quantization_report(loaded)}
    assert all(again[name] == reasons[name] for name in expected)


@pytest.mark.parametrize("pattern", ["proj", "layers.00", "up", "re:lm_heads", "*.up", "Linear"])
@pytest.mark.parametrize("act", [quantize, collect_stats])
def test_a_pattern_that_matches_nothing_is_an_error(pattern, act):
    model = build("LlamaForCausalLM", "llama")
    with pytest.raises(ValueError, match=re.escape(f"ignore: {pattern!r} matches no module")):
        if act is quantize:
            quantize(model, MixedQuantConfig(ignore=["lm_head", pattern]), progress=False)
        else:
            collect_stats(model, [torch.ones(1, 4).long()], progress=False, ignore=[pattern])
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize(
    "ignore, error",
    [
        ("lm_head", TypeError),
        ([1], TypeError),
        (7, TypeError),
        ([""], ValueError),
        (["re:"], ValueError),
        (["re:("], ValueError),
    ],
)
def test_patterns_are_checked(ignore, error):
    with pytest.raises(error, match="ignore"):
        MixedQuantConfig(ignore=ignore)


def test_ignore_has_the_name_that_transformers_gives_it():
    config = MixedQuantConfig.from_fields({"modules_to_not_convert": ["lm_head"]})
    assert config == MixedQuantConfig(ignore=["lm_head"])
    assert MixedQuantConfig.from_fields({"modules_to_not_convert": None}) == MixedQuantConfig()
    with pytest.raises(ValueError, match="the same field"):
        MixedQuantConfig.from_fields({"modules_to_not_convert": ["a"], "ignore": ["b"]})
    assert MixedQuantConfig.from_dict(config.to_dict()) == config
    assert "ignore" not in MixedQuantConfig().to_dict()


def test_smoothing_spares_a_norm_that_feeds_an_ignored_layer():
    model, ids = build("LlamaForCausalLM", "llama"), torch.ones(1, 8, dtype=torch.long)
    gains = [norm.weight.clone() for norm in norms(model)]
    config = MixedQuantConfig(group_size=16, smooth_alpha=0.5, ignore=["k_proj"])
    quantize(model, config, batches=[ids], progress=False)
    same = [torch.equal(norm.weight, gain) for norm, gain in zip(norms(model), gains, strict=True)]
    assert same == [True, False]


def norms(model):
    layer = model.model.layers[0]
    return layer.input_layernorm, layer.post_attention_layernorm


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def llava(**fields):
    vision = {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "llama", **SIZES, **fields}
    parts = {"vision_config": vision, "text_config": text, "image_token_index": 63}
    config = AutoConfig.for_model("llava", **parts)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_layers_that_no_token_reaches_stay_with_a_warning(recipe, from_file, tmp_path, caplog):
    model, batches = llava(), [torch.randint(1, 60, (1, 16))]
    stats = None
    if from_file:
        stats = tmp_path / "stats.safetensors"
        save_stats(collect_stats(model, batches, progress=False), stats)
    config = MixedQuantConfig(group_size=16, recipe=recipe)
    records = quantize(model, config, stats, batches, progress=False)
    unreached = {r.name for r in records if r.reason == "no calibration token reached it"}
    assert {name.split(".")[1] for name in unreached} == {"vision_tower", "multi_modal_projector"}
    assert next(iter(unreached)) and "no calibration token reached 8 layers" in caplog.text
    text = {r.name for r in records if "language_model.layers" in r.name and len(r.shape) == 2}
    assert all(r.action == "quantized" for r in records if r.name in text)


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_layers_that_no_token_reaches_can_be_quantized_by_their_weights(recipe, caplog, tmp_path):
    model, batches = llava(), [torch.randint(1, 60, (1, 16))]
    linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    config = MixedQuantConfig(group_size=16, recipe=recipe, unreached="weights")
    records = quantize(model, config, None, batches, progress=False)
    by_weights = {
        r.name: r
        for r in records
        if r.reason.startswith("weights: no calibration token reached it")
    }
    assert {name.split(".")[1] for name in by_weights} == {"vision_tower", "multi_modal_projector"}
    assert all(record.action == "quantized" for record in by_weights.values())
    assert "reached 8 layers, whose salience and order come from the weights" in caplog.text
    for name in by_weights:
        stats = ChannelStats.empty(linears[name].shape[1])
        stats.update(linears[name])
        plan = choose_channels(stats, salient_prop=0.05)
        assert torch.equal(model.get_submodule(name).perm, plan.perm)
    save_quantized(model, tmp_path / "q")
    assert load_quantized(tmp_path / "q").mixedquant_config == config


@pytest.mark.parametrize("unreached", ["keep", "weights"])
def test_every_way_in_treats_unreached_layers_alike(unreached, tmp_path):
    source, name = DATA / "tiny-opt", "model.decoder.layers.1.fc1"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    stats = collect_stats(model, [torch.randint(3, 90, (1, 64))], progress=False)
    stats[name] = ChannelStats.empty(stats[name].num_channels)
    save_stats(stats, tmp_path / "stats.safetensors")
    config = MixedQuantConfig(group_size=16, unreached=unreached)
    results = [quantize(model, config, stats, progress=False)]
    results.append(convert(source, tmp_path / "c", config, stats, progress=False))
    assert results[0] == results[1]
    record = next(record for record in results[0] if record.name == name)
    assert record.action == {"keep": "kept", "weights": "quantized"}[unreached]
    assert record.reason.endswith("no calibration token reached it")
    command = ["quantize", str(source), str(tmp_path / "q"), "--set", f"unreached={unreached}"]
    command += ["--stats", str(tmp_path / "stats.safetensors"), "--set", "group_size=16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    for folder in ("c", "q"):
        loaded = load_quantized(tmp_path / folder)
        assert type(loaded.get_submodule(name)) is type(model.get_submodule(name))
        loaded.save_pretrained(tmp_path / f"{folder} again")
        base = type(loaded.base_model).from_pretrained(tmp_path / folder)
        assert reasons(base).get(name.removeprefix("model.")) == reasons(loaded).get(name)
        for again in (loaded, type(loaded).from_pretrained(tmp_path / f"{folder} again")):
            assert reasons(again) == reasons(model)


def reasons(model):
    """Why each kept parameter stays, by the report."""
    return {r.name: r.reason for r in quantization_report(model) if r.action == "kept"}


@pytest.mark.parametrize("kept", [["a"], {"a": 1}, "a"])
def test_stored_reasons_are_checked(kept, make_model, tmp_path):
    model = make_model("llama")
    quantize(model, CONFIG, progress=False)
    fields = {**Manifest.of_model(model).to_dict(), "kept": kept}
    with pytest.raises(CheckpointError, match="kept"):
        Manifest.from_dict(fields)


def test_a_model_that_calibrates_while_loading_takes_unreached_layers_too(tmp_path):
    _, tokenizer = load_bundled("tiny-opt")
    model = llava(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fields = {"calibration": ["a few words to calibrate on"], "calibration_tokens": 8}
    config = MixedQuantConfig(group_size=16, unreached="weights", **fields)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    reasons = {r.name: r.reason for r in quantization_report(loaded)}
    assert reasons["model.multi_modal_projector.linear_1"].endswith(
        "no calibration token reached it"
    )


def test_calibration_that_reaches_nothing_is_an_error():
    model = nn.Sequential(nn.Embedding(8, 4), nn.ModuleDict({"unused": nn.Linear(4, 4)}))
    model.forward = model[0].forward
    with pytest.raises(ValueError, match="no token reached layer 1.unused"):
        quantize(model, CONFIG, batches=[torch.ones(1, 4).long()], progress=False)


@pytest.mark.parametrize("ignore", [[], ["mlp"], ["self_attn"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_share_of_quantized_weights_is_told(ignore, tied, caplog):
    model = build("LlamaForCausalLM", "llama", tie_word_embeddings=tied)
    quantize(model, MixedQuantConfig(group_size=16, ignore=ignore), progress=False)
    sizes = {"self_attn": 4 * 32 * 32, "mlp": 3 * 32 * 64}
    kept = sum(sizes[name] for name in ignore) + (0 if tied else 64 * 32)
    counts = weight_counts(model)
    assert counts == (sum(sizes.values()) + (0 if tied else 64 * 32) - kept, kept, 64 * 32)
    assert ("most of the others: 6,144 (ignore='mlp')" in caplog.text) == (ignore == ["mlp"])
