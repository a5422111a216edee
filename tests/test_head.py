"""Quantized output heads and embeddings: config fields `head` and `embeddings`."""

import copy
import dataclasses

import pytest
import torch
from bits import assert_same_bits, forced_isa
from conftest import build_model
from length import at_length
from safetensors.torch import load_file, save_file
from small_models import small_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from smoothquant import MixedQuantConfig, quantize
from smoothquant.calibration.collect import collect_stats
from smoothquant.checkpoints.conversion import convert
from smoothquant.checkpoints.export import export_compressed_tensors
from smoothquant.checkpoints.folder import load_quantized, save_quantized
from smoothquant.checkpoints.inspection import inspect_folder, verify_folder
from smoothquant.checkpoints.sizes import bytes_by_kind, planned_bytes
from smoothquant.cli.commands import app
from smoothquant.core.config import int8_group_size, table_config
from smoothquant.core.errors import CheckpointError
from smoothquant.kernels import ops
from smoothquant.layers.embedding import QuantizedEmbedding
from smoothquant.layers.int8 import Int8Linear, pack_groups
from smoothquant.layers.linear import FakeW4A4Linear, W4A4Linear, quantized_input
from smoothquant.model_size import get_model_size
from smoothquant.models.tables import Table, find_tables
from smoothquant.quantization.undo import dequantize, simulated_copy

KINDS = ["int8", "int4"]
TIED = "llama", "gemma", "opt-post-norm"  # plain, scaled, with projections around
UNTIED = "qwen2"
MODELS = [*TIED, UNTIED, "bloom", "mixtral"]
# (architecture, kind)
CASES = at_length(
    [(name, kind) for name in MODELS for kind in KINDS], [("gemma", "int8"), (UNTIED, "int4")]
)


def config(kind="int8", **fields):
    return MixedQuantConfig(group_size=16, head=kind, embeddings=kind, **fields)


def by_weights(kind="int8", **fields):
    return config(kind, calibration="weights", **fields)


def quantized(architecture, cfg, batches=None):
    model = build_model(architecture)
    quantize(model, cfg, batches=batches, progress=False)
    return model


def tensors(folder):
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor)


def int8_layer(weight, bias=None, group_size=128, **fields):
    cfg = MixedQuantConfig(group_size=group_size, **fields)
    return Int8Linear.from_weight(weight, bias, table_config(cfg, "int8", weight.shape[1]))


# ---- The INT8 layer ----


def test_every_code_is_stored_exactly():
    codes = torch.arange(-119, 120).float()
    weight = torch.zeros(20, 256)
    weight[:, :239] = codes * 0.125
    weight[7] *= 2.0**-100
    layer = int8_layer(weight, group_size=256)
    assert_same_bits(layer.dequantize(), weight)
    low = ops.unpack_nibbles(layer.qweight, 128).float()
    assert low.min() == -8  # which the packing kernel never gives


@pytest.mark.parametrize("n, groups, g", [(1, 1, 1), (16, 3, 4), (33, 2, 7), (40, 5, 16)])
def test_given_codes_are_packed_like_rounded_ones(n, groups, g):
    codes = torch.randint(-7, 8, (n, groups * g))
    packed = ops.pack_weight(
        codes.float(),
        torch.arange(groups * g).int(),
        0,
        g,
        group_scales=torch.ones(n, groups),
    )
    assert_same_bits(pack_groups(codes.to(torch.int8).unflatten(1, (groups, g))), packed[0])


def test_group_sizes_divide_the_channels():
    sizes = {
        (128, 576): 96,
        (128, 48): 48,
        (16, 40): 20,
        (128, 202): 101,
        (32, 88): 22,
        (128, 101): 101,
    }
    sizes |= {(128, 2048): 128, (8, 64): 16, (15, 2048): 16, (16, 62): 31, (1, 1): 1, (128, 0): 1}
    assert {case: int8_group_size(*case) for case in sizes} == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, k, fields", [
    (33, 96, {}),
    (16, 101, {}),
    (40, 80, {"act_quant": "per_token", "weight_quant": "per_channel"}),
])  # fmt: skip
def test_an_int8_layer_computes_the_product(dtype, n, k, fields):
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    layer = int8_layer(weight, bias, group_size=32, **fields)
    error = (layer.dequantize() - weight.float()).abs()
    step = weight.float().abs().amax(1, keepdim=True) / 119
    assert (error <= step * (0.5 + 119 / 512)).all()
    assert error.norm() < 0.01 * weight.float().norm()
    x = torch.randn(5, k).to(dtype)
    exact = x.float() @ weight.float().T + bias.float()
    y = layer(x)
    assert y.dtype == dtype
    # a plane that is missing, or in the place of the other, is an error of 6 % or far more
    assert (y.float() - exact).norm() < 0.015 * exact.norm()
    order = torch.arange(k)
    inputs = quantized_input(x.float(), order, 0, layer.group_size, layer.config)
    computed = inputs @ layer.dequantize().T + bias.float()
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (y.float() - computed).norm() < bound * computed.norm()
    simulated = layer.simulated().float()
    assert_same_bits(simulated.dequantize(), layer.dequantize())
    assert (simulated(x.float()) - computed).norm() < 1e-5 * computed.norm()


def test_every_instruction_set_computes_the_same_from_the_largest_codes():
    weight = torch.tensor([-119.0, 104.0, 119.0, 8.0]).repeat(40, 512)  # planes of -7, 7 and -8
    x = torch.where(torch.rand(70, 2048) < 0.5, -1.0, 1.0)
    x[0], x[1] = 1, torch.tensor([-1.0, 1.0]).repeat(1024)
    layer = int8_layer(weight, group_size=1024)
    results = []
    for name in ops.supported_isas():
        with forced_isa(name):
            results.append(layer(x))
    exact = x.double() @ layer.dequantize().double().T
    assert torch.allclose(results[0].double(), exact, rtol=1e-5, atol=1e-2)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("make", [
    lambda w, b: int8_layer(w, b),
    lambda w, b: int8_layer(w, b).simulated(),
    lambda w, b: W4A4Linear.from_float(linear(w), salient_prop=0.1, group_size=16),
    lambda w, b: W4A4Linear.from_float(linear(w), salient_prop=0.1, backend="fake"),
])  # fmt: skip
def test_rows_are_those_of_the_weight(make):
    layer = make(torch.randn(50, 48), None)
    ids = torch.randint(50, (3, 4))
    assert_same_bits(layer.rows(ids), layer.dequantize()[ids])
    assert_same_bits(layer.rows(ids[0, 0]), layer.dequantize()[ids[0, 0]])
    assert layer.rows(ids[:0]).shape == (0, 4, 48)


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight)
    return module


@pytest.mark.parametrize("size", [3.38e38, 1e-35, 1e-37, 0.0])
def test_weights_at_the_ends_of_the_range(size):
    weight = torch.full((2, 32), size)
    dequantized = int8_layer(weight).dequantize()
    assert dequantized.isfinite().all()
    if size != 1e-37:  # its scale is subnormal, which counts as 0
        assert torch.allclose(dequantized, weight, rtol=5e-3, atol=0)


# ---- The embedding ----


def embedding_of(embedding):
    return QuantizedEmbedding(embedding, int8_layer(embedding.weight.detach()))


@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_ids_outside_the_vocabulary_are_refused(index):
    embedding = embedding_of(nn.Embedding(50, 32, padding_idx=3))
    with pytest.raises(ValueError, match="rows holds an index outside"):
        embedding(torch.tensor([[1, index]]))


def test_an_embedding_follows_casts_and_copies():
    source = nn.Embedding(50, 32, padding_idx=3)
    embedding = embedding_of(source)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (50, 32, 3)
    ids = torch.tensor([[3, 49, 0]], dtype=torch.int32)
    assert not embedding(ids)[0, 0].any()
    assert (embedding(ids) - source(ids)).norm() < 0.01 * source(ids).norm()
    half = copy.deepcopy(embedding).half()
    assert_same_bits(half(ids), embedding(ids).half())
    assert half.packed.scales.dtype == torch.bfloat16 and half.weight.dtype == torch.float16
    assert not embedding.state_dict().keys() & {"like", "weight"}


def test_an_embedding_compiles():
    embedding, ids = embedding_of(nn.Embedding(50, 32)), torch.tensor([[1, 2, 1]])
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    assert_same_bits(compiled(ids), embedding(ids))


# ---- Whole models ----


@pytest.mark.parametrize("architecture, kind", CASES)
def test_all_ways_in_give_the_same_bytes(architecture, kind, token_ids, tmp_path):
    batches = [token_ids[:1], token_ids[1:]]
    model = build_model(architecture)
    model.save_pretrained(tmp_path / "float")
    exact = model(token_ids).logits
    planned = planned_bytes(model, config(kind), stats_to_come=True)
    quantize(model, config(kind), batches=batches, progress=False)
    assert bytes_by_kind(model) == planned
    save_quantized(model, tmp_path / "memory")
    stored = tensors(tmp_path / "memory")
    assert sum(t.nbytes for t in stored.values()) * 8 == get_model_size(model)
    by_layer = tmp_path / "by layer"
    convert(tmp_path / "float", by_layer, config(kind), batches=batches, progress=False)
    assert_same_tensors(tensors(by_layer), stored)
    assert inspect_folder(by_layer)["kinds"] == planned
    verify_folder(by_layer)

    logits = model(token_ids).logits
    base_error = quantized(architecture, config("16bit"), batches)(token_ids).logits - exact
    most = {"int8": 1.1, "int4": 1.5}[kind] * base_error.norm()
    assert (logits - exact).norm() < most
    for loaded in (
        load_quantized(tmp_path / "memory"),
        AutoModelForCausalLM.from_pretrained(by_layer),
    ):
        assert_same_bits(loaded(token_ids).logits, logits)
        loaded.tie_weights()
        loaded.save_pretrained(tmp_path / "again", max_shard_size="10KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert_same_tensors(tensors(tmp_path / "again"), stored)
        assert loaded.generate(token_ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    base = AutoModel.from_pretrained(tmp_path / "memory")
    assert_same_bits(
        base(token_ids).last_hidden_state, model.base_model(token_ids).last_hidden_state
    )


@pytest.mark.parametrize("architecture, kind", CASES)
def test_a_model_is_quantized_as_it_loads(architecture, kind, token_ids, tmp_path):
    build_model(architecture).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=by_weights(kind))
    expected = quantized(architecture, by_weights(kind))
    assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert_same_bits(loaded(token_ids).logits, expected(token_ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", at_length(TIED, ["opt-post-norm"]))
def test_a_tied_weight_is_stored_once(architecture, kind, tmp_path):
    model = build_model(architecture)
    n, k = model.get_input_embeddings().weight.shape
    before = get_model_size(model) // 8
    rest = get_model_size(quantized(architecture, by_weights("16bit"))) // 8 - 4 * n * k
    quantize(model, by_weights(kind), progress=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert embedding.packed is head
    if kind == "int8":
        groups = 2 * k // int8_group_size(16, k)
        table = 2 * k * n // 2 + 2 * groups * n + 4 * 2 * k
    else:
        salient = max(1, int(0.05 * k))
        groups = -(-(k - salient) // 16)
        quads = sum(-(-min(16, k - salient - 16 * j) // 4) for j in range(groups))
        table = -(-quads // 2) * 4 * n + 2 * groups * n + 2 * salient * n + 4 * k
    assert get_model_size(model) // 8 == rest + table < before
    save_quantized(model, tmp_path / "m")
    stored = tensors(tmp_path / "m")
    assert sum(t.nbytes for t in stored.values()) == rest + table
    assert not any(name.startswith("lm_head") for name in stored)
    loaded = load_quantized(tmp_path / "m")
    assert loaded.get_input_embeddings().packed is loaded.get_output_embeddings()
    moved = copy.deepcopy(model).to(torch.float16)
    assert moved.get_input_embeddings().packed is moved.get_output_embeddings()


def test_a_head_is_tied_to_the_embeddings_of_a_base_model(token_ids, tmp_path):
    model = quantized("llama", by_weights())
    base = AutoModel.from_config(model.config)
    base.load_state_dict(build_model("llama").model.state_dict())
    quantize(base, by_weights(), progress=False)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head is loaded.model.embed_tokens.packed
    assert_same_bits(loaded(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("fields", at_length(
    [{}, {"head": "16bit"}, {"embeddings": "int4"}, {"head": "int4", "embeddings": "16bit"}],
    [{}, {"head": "16bit", "embeddings": "int4"}],
))  # fmt: skip
def test_untied_tables_are_quantized_apart(fields, token_ids, tmp_path):
    cfg = MixedQuantConfig(group_size=16, calibration="weights", **fields)
    model = quantized(UNTIED, cfg)
    classes = {"int8": Int8Linear, "int4": W4A4Linear}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is classes.get(fields.get("head", "int8"), nn.Linear)
    packed = getattr(embedding, "packed", None)
    assert type(packed) is classes.get(fields.get("embeddings", "int8"), type(None))
    save_quantized(model, tmp_path / "m")
    assert_same_bits(load_quantized(tmp_path / "m")(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("field", at_length(["head", "embeddings"], ["head"]))
@pytest.mark.parametrize("kind", at_length(["16bit", "int8", "int4", None], ["16bit", None]))
def test_one_field_is_enough_for_a_tied_weight(field, kind):
    cfg = MixedQuantConfig(group_size=16, calibration="weights", **{field: kind})
    expected = quantized("llama", by_weights(kind or "int8"))
    assert_same_tensors(quantized("llama", cfg).state_dict(), expected.state_dict())


def test_a_tied_weight_has_one_format():
    model = build_model("llama")
    with pytest.raises(ValueError, match="head and embeddings must not differ .* head='int8'"):
        quantize(model, MixedQuantConfig(head="int8", embeddings="int4"), progress=False)
    stored = MixedQuantConfig.from_dict({"head": "int8"})  # before there were embeddings
    assert [table.kind for table in find_tables(model, stored).quantized] == ["int8"]
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("architecture, dtype", at_length(
    [(name, dtype) for name in MODELS for dtype in (torch.float16, torch.bfloat16)],
    [("gemma", torch.bfloat16)]))  # fmt: skip
def test_other_dtypes(architecture, dtype, token_ids, tmp_path):
    model = build_model(architecture).to(dtype)
    quantize(model, by_weights("int4"), progress=False)
    logits = model(token_ids).logits
    assert logits.dtype == model.get_input_embeddings()(token_ids).dtype == dtype
    save_quantized(model, tmp_path / "m")
    assert_same_bits(load_quantized(tmp_path / "m")(token_ids).logits, logits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert_same_bits(loaded(token_ids).logits, logits)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert wide.get_input_embeddings()(token_ids).dtype == torch.float32
    assert wide(token_ids).logits.dtype == torch.float32


def test_a_scaled_embedding_is_scaled_alike(token_ids):
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model("gemma").to(dtype)
        source = copy.deepcopy(model.get_input_embeddings())
        quantize(model, by_weights(), progress=False)
        embedding = model.get_input_embeddings()
        source.weight = nn.Parameter(embedding.weight)
        assert embedding.embed_scale == pytest.approx(48**0.5)
        assert_same_bits(embedding(token_ids), source(token_ids).detach())


@pytest.mark.parametrize("architecture, kind", CASES)
def test_dequantize_restores_head_and_embeddings(architecture, kind, token_ids):
    model = quantized(architecture, by_weights(kind))
    kinds = [type(build_model(architecture).get_input_embeddings()), nn.Linear]
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    rows = model.get_input_embeddings()(token_ids)
    dequantize(model)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert [type(m) for m in modules] == kinds
    for module, weight in zip(modules, weights, strict=True):
        assert_same_bits(module.weight.detach(), weight)
    assert (modules[0].weight is modules[1].weight) == model.config.tie_word_embeddings
    assert_same_bits(modules[0](token_ids).detach(), rows)
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model(token_ids).logits.shape[-1] == 100
    assert (model.lm_head.weight is modules[0].weight) == model.config.tie_word_embeddings


def test_vocabularies_are_not_resized(token_ids, tmp_path):
    model = quantized("llama", by_weights())
    save_quantized(model, tmp_path / "m")
    for resized in (model, load_quantized(tmp_path / "m")):
        with pytest.raises(ValueError, match="resize the float model, then quantize it"):
            resized.resize_token_embeddings(100)
        resized(token_ids)


@pytest.mark.parametrize("kind", at_length(KINDS, ["int8"]))
def test_a_simulation_has_the_same_codes(kind, token_ids, tmp_path):
    packed = quantized(UNTIED, by_weights(kind))
    simulated = simulated_copy(packed)
    assert isinstance(simulated.lm_head, FakeW4A4Linear)
    assert_same_bits(simulated.lm_head.dequantize(), packed.lm_head.dequantize())
    fake = quantized(UNTIED, by_weights(kind, backend="fake"))
    assert (fake.lm_head.weight - packed.lm_head.weight).norm() < 1e-5 * fake.lm_head.weight.norm()
    save_quantized(fake, tmp_path / "m")
    assert_same_bits(load_quantized(tmp_path / "m")(token_ids).logits, fake(token_ids).logits)


# ---- Statistics of the head's input ----


@pytest.mark.parametrize("architecture", at_length(MODELS, ["opt-post-norm"]))
def test_statistics_of_the_head_are_the_same_layer_by_layer(architecture, token_ids):
    model = build_model(architecture)
    batches = [token_ids[:1], token_ids[1:]]
    stats = collect_stats(model, batches, head="lm_head", progress=False)
    by_layer = collect_stats(model, batches, by_layer=True, head="lm_head", progress=False)
    without = collect_stats(model, batches, progress=False)
    assert set(stats) - set(without) == {"lm_head"}
    inputs = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        model(batch)
    hook.remove()
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    assert stats["lm_head"].count == len(rows) == by_layer["lm_head"].count
    assert_same_bits(stats["lm_head"].abs_max, rows.abs().amax(0))
    for name, entry in stats.items():
        for key, value in entry.to_dict().items():
            assert_same_bits(by_layer[name].to_dict()[key], value)


def test_statistics_choose_the_channels_of_a_head(token_ids, caplog):
    model = build_model(UNTIED)
    with torch.no_grad():
        model.model.norm.weight[17] = 50  # an outlier in the head's input
    stats = collect_stats(model, [token_ids], head="lm_head", progress=False)
    twin = copy.deepcopy(model)
    quantize(model, config("int4"), stats, progress=False)
    assert 17 in model.lm_head.perm[-model.lm_head.num_salient :]
    assert "calibration" in record_of(model, "lm_head").reason
    del stats["lm_head"]
    quantize(twin, config("int4"), stats, progress=False)
    assert "no statistics for the output head lm_head" in caplog.text
    assert "weights" in record_of(twin, "lm_head").reason


def record_of(model, name):
    return next(record for record in model.mixedquant_report if record.name == name)


# ---- What stays ----


def hooked_head(model):
    model.lm_head.register_forward_hook(lambda *args: None)


def normed_embedding(model):
    model.model.embed_tokens.max_norm = 1.0


def replaced_embedding(model):
    class Other(nn.Embedding):
        def forward(self, input):
            return super().forward(input) + 1

    other = Other(96, 48)
    other.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = other


def third_reader(model):
    model.extra = nn.Bilinear(1, 1, 1)
    model.extra.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize("change, reason", [
    (hooked_head, "it has hooks"),
    (normed_embedding, "max_norm changes its weight"),
    (replaced_embedding, "Other has a forward of its own"),
    (third_reader, "Bilinear is no output head and no embedding"),
])  # fmt: skip
def test_what_cannot_be_quantized_stays_with_a_reason(change, reason, caplog):
    model = build_model("llama")
    change(model)
    quantize(model, by_weights(), progress=False)
    assert isinstance(model.lm_head, nn.Linear)
    assert reason in record_of(model, "lm_head").reason
    assert reason in record_of(model, "model.embed_tokens").reason
    assert record_of(model, "model.embed_tokens").action == "kept"
    assert "lm_head stays in 16 bits" in caplog.text


@pytest.mark.parametrize("pattern", at_length(["lm_head", "embed_tokens"], ["lm_head"]))
def test_ignore_wins(pattern, caplog, tmp_path):
    model = quantized("llama", by_weights(ignore=[pattern]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert f"ignore='{pattern}'" in record_of(model, "lm_head").reason
    assert "stays in 16 bits" not in caplog.text
    save_quantized(model, tmp_path / "m")
    report = inspect_folder(tmp_path / "m")["layers"]
    reasons = {entry["name"]: entry["reason"] for entry in report}
    assert reasons["lm_head"] == record_of(model, "lm_head").reason


def test_a_shared_embedding_of_encoder_and_decoder(tmp_path):
    model = small_model("T5ForConditionalGeneration")
    quantize(model, by_weights(), progress=False)
    packed = model.shared.packed
    assert model.lm_head is model.encoder.embed_tokens.packed is packed
    assert model.decoder.embed_tokens.packed is packed
    save_quantized(model, tmp_path / "m")
    ids = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[7, 8]])}
    loaded = load_quantized(tmp_path / "m")
    assert loaded.lm_head is loaded.decoder.embed_tokens.packed
    assert_same_bits(loaded(**ids).logits, model(**ids).logits)


def test_classifiers_and_other_embeddings_stay():
    model = small_model("BertForSequenceClassification")
    quantize(model, by_weights(), progress=False)
    embeddings = model.bert.embeddings
    assert isinstance(embeddings.word_embeddings, QuantizedEmbedding)
    for module in (embeddings.position_embeddings, embeddings.token_type_embeddings):
        assert type(module) is nn.Embedding
    assert type(model.classifier) is nn.Linear


def test_a_head_with_a_tied_bias(tmp_path):
    model = small_model("BertForMaskedLM")
    quantize(model, by_weights(), progress=False)
    save_quantized(model, tmp_path / "m")
    loaded, ids = load_quantized(tmp_path / "m"), torch.tensor([[5, 6, 7]])
    loaded.tie_weights()
    assert isinstance(loaded.cls.predictions.decoder, Int8Linear)
    assert_same_bits(loaded(ids).logits, model(ids).logits)


def test_tables_of_a_model_without_other_linears_are_found():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=0, n_head=4))
    table = Table("int8", "lm_head", ("transformer.wte",))
    assert find_tables(model, config()).quantized == (table,)
    with pytest.raises(ValueError, match="no quantizable nn.Linear"):
        quantize(model, by_weights(), progress=False)


# ---- Config, files and commands ----


def test_configs_from_before_there_were_formats_keep_16_bits():
    before = MixedQuantConfig(head="16bit", embeddings="16bit")
    fields = before.to_dict()
    assert not fields.keys() & {"head", "embeddings"}
    assert MixedQuantConfig.from_dict(fields) == before
    assert MixedQuantConfig.from_fields(fields) == MixedQuantConfig() != before
    for chosen in (MixedQuantConfig(), MixedQuantConfig(head="int8", embeddings="int4")):
        assert MixedQuantConfig.from_dict(chosen.to_dict()) == chosen
    assert chosen.to_dict() == fields | {"head": "int8", "embeddings": "int4"}


@pytest.mark.parametrize("field", ["head", "embeddings"])
def test_other_formats_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be one of 16bit, int8, int4; got 'int2'"):
        MixedQuantConfig(**{field: "int2"})


@pytest.mark.parametrize("cfg", [
    MixedQuantConfig(recipe="best", tp_blocks=3, sort_within_heads=True, smooth_alpha="search"),
    MixedQuantConfig(bits=5.0, num_bits=3, act_quant="per_token", weight_quant="per_channel"),
    MixedQuantConfig(backend="fake", act_quant="per_tensor", weight_quant="per_tensor"),
])  # fmt: skip
def test_any_config_has_one_for_its_tables(cfg):
    for kind in KINDS:
        table = table_config(dataclasses.replace(cfg, head=kind), kind, 576)
        assert table.activation_bits == 8 and not table.needs_tokens and table.head == "16bit"


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_folder_is_refused(kind, tmp_path):
    import json

    save_quantized(quantized("llama", by_weights(kind)), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    method = fields["quantization_config"]
    del method["checksums"], method["checksum"]
    entry = method["linears"]["model.embed_tokens.packed"]
    for value in ("int2", "int4" if kind == "int8" else "int8"):
        entry["table"] = value
        path.write_text(json.dumps(fields))
        with pytest.raises(CheckpointError):
            load_quantized(tmp_path / "m")


@pytest.mark.parametrize("architecture", [UNTIED, "llama"])
def test_an_export_writes_floats(architecture, token_ids, tmp_path):
    fields = {"recipe": "rtn", "salient_prop": 0, "sort": "none", "calibration": "weights"}
    model = quantized(architecture, MixedQuantConfig(**fields))
    before = model(token_ids).logits
    export_compressed_tensors(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    floats = copy.deepcopy(model)
    dequantize(floats)
    expected = floats.get_input_embeddings().weight
    assert torch.equal(tensors["model.embed_tokens.weight"], expected)
    if architecture == UNTIED:
        assert torch.equal(tensors["lm_head.weight"], floats.lm_head.weight)
    assert not any("packed" in name for name in tensors if "layers" not in name)
    assert_same_bits(model(token_ids).logits, before)


def test_adapters_on_all_linears_leave_the_head_out():
    from peft import LoraConfig, get_peft_model

    from smoothquant.lora import on_quantized

    model = quantized("llama", by_weights())
    adapted = get_peft_model(model, on_quantized(LoraConfig(target_modules="all-linear", r=2)))
    names = {name for name, _ in adapted.named_modules() if name.endswith(".base_layer")}
    assert len(names) == 14 and not any("packed" in name or "lm_head" in name for name in names)


def test_commands(tmp_path, capsys):
    from typer.testing import CliRunner

    build_model("llama").save_pretrained(tmp_path / "float")
    options = ["--group-size", "16", "--no-calibration", "--set", "head=int8"]
    run = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "float"), str(tmp_path / "m"), *options]
    )
    assert run.exit_code == 0, run.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "m")]).output
    assert "model.embed_tokens.packed" in shown and "head=int8" in shown


@pytest.fixture
def untied_folder(make_model, tmp_path):
    """A folder whose config ties the head, and whose file has another weight for it."""
    model = make_model("llama")
    weight = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(weight)
    model.save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    tensors = load_file(path) | {"lm_head.weight": weight}
    save_file(tensors, path, {"format": "pt"})
    return tmp_path / "float"


def test_a_stored_head_is_not_replaced_by_the_embeddings(untied_folder, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(untied_folder)
    assert plain.config.tie_word_embeddings
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    fields = {"group_size": 16, "head": "int8", "embeddings": "int8", "calibration": "weights"}
    cfg = MixedQuantConfig(recipe="rtn", **fields)
    loaded = AutoModelForCausalLM.from_pretrained(untied_folder, quantization_config=cfg)
    convert(untied_folder, tmp_path / "converted", cfg, progress=False)
    save_quantized(loaded, tmp_path / "q")
    folders = [load_quantized(tmp_path / name) for name in ("q", "converted")]

    class Own(LlamaForCausalLM):
        pass

    for model in (loaded, *folders, Own.from_pretrained(tmp_path / "q")):
        for module, original in (
            (model.lm_head, plain.lm_head),
            (model.model.embed_tokens, plain.model.embed_tokens),
        ):
            error = (module.weight - original.weight).norm() / original.weight.norm()
            assert error < 0.02


def test_a_reloaded_model_can_be_moved(make_model, tmp_path, token_ids):
    model = make_model("llama")
    quantize(model, by_weights(recipe="rtn"), progress=False)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert not any(tensor.is_meta for tensor in again.buffers())
    assert torch.equal(again.to("cpu")(token_ids).logits, model(token_ids).logits)


def test_ids_are_integers(make_model):
    model = make_model("llama")
    quantize(model, by_weights(recipe="rtn"), progress=False)
    for ids in (torch.tensor([1.7]), torch.tensor([True])):
        with pytest.raises(TypeError, match="token ids must be int32 or int64; got torch"):
            model.model.embed_tokens(ids)


def test_layers_that_differ_by_a_default_are_not_saved(make_model, tmp_path):
    model = make_model("llama")
    cfg = MixedQuantConfig(recipe="rtn", group_size=16, act_bits=8, calibration="weights")
    quantize(model, cfg, progress=False)
    layer = model.model.layers[0].mlp.down_proj
    layer.config = dataclasses.replace(layer.config, act_bits=None)
    with pytest.raises(
        ValueError, match="must have the same MixedQuantConfig; .*down_proj differs"
    ):
        save_quantized(model, tmp_path / "q")
    model.mixedquant_config = dataclasses.replace(cfg, act_bits=None)
    layer.config = cfg
    with pytest.raises(ValueError, match="must have the same MixedQuantConfig"):
        save_quantized(model, tmp_path / "r")
