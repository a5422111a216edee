"""Folding moves data: the same logits, and gathers that are gone."""

import pytest
import torch
from bits import assert_same_bits
from torch import nn

from smoothquant import (
    MixedQuantConfig,
    collect_stats,
    fold_permutations,
    load_quantized,
    quantize,
    save_quantized,
)
from smoothquant.channels.sorting import ChannelPlan
from smoothquant.layers.linear import FakeW4A4Linear, QuantizedLinear, W4A4Linear
from smoothquant.models.families import LayerInput, value_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:no token was routed"),
    pytest.mark.usefixtures("linears_alone"),
]

# Ends of the names of the linears behind elementwise functions, and behind attention.
ELEMENTWISE = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")
BEHIND_ATTENTION = ("o_proj", "self_attn.out_proj", "dense", "attn.c_proj")
# Architectures whose attention outputs are not made by a linear of the table.
UNTRACED = {"deepseek_v3"}
# torch's silu and tanh give the last columns of a strided row other bits if they fill no 2 vectors.
WHOLE_VECTORS = {"phi3": 96, "mixtral": 96}


@pytest.fixture
def quantized(make_model, token_ids):
    """Builds a quantized model: quantized(architecture, **fields of the config)."""

    def build(architecture, dtype=torch.float32, **fields):
        size = WHOLE_VECTORS.get(architecture)
        model = make_model(architecture, **({"intermediate_size": size} if size else {})).to(dtype)
        stats = collect_stats(model, [token_ids], progress=False)
        config = MixedQuantConfig(**({"group_size": 20, "salient_prop": 0.1} | fields))
        batches = [token_ids] if config.weight_rounding == "gptq" else None
        quantize(model, config, stats, batches, progress=False)
        return model

    return build


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def perms(model):
    named = model.named_modules()
    return {name: m.perm.clone() for name, m in named if isinstance(m, QuantizedLinear)}


def named_like(names, *parts):
    return [name for name in names if name.endswith(tuple(f".{part}" for part in parts))]


def is_identity(perm):
    return torch.equal(perm, torch.arange(len(perm)).int())


def is_compaction(perm, num_salient):
    parts = perm[: len(perm) - num_salient], perm[len(perm) - num_salient :]
    return all((part[1:] > part[:-1]).all() for part in parts)


@pytest.mark.parametrize("backend", ["int4", "fake"])
@pytest.mark.parametrize("within", [False, True])
def test_logits_keep_their_bits(architecture, backend, within, quantized, token_ids):
    model = quantized(architecture, backend=backend, sort_within_heads=within)
    before, expected = perms(model), logits(model, token_ids)
    folded = fold_permutations(model)
    after = perms(model)

    elementwise = named_like(before, *ELEMENTWISE)
    behind_attention = named_like(before, *BEHIND_ATTENTION)
    foldable = within and architecture not in UNTRACED
    assert sorted(folded) == sorted(elementwise + (behind_attention if foldable else []))
    assert len(behind_attention) in (1, 2) and len(elementwise) >= 2
    for name in before:
        num_salient = model.get_submodule(name).num_salient
        assert not is_identity(before[name])
        assert is_identity(after[name]) == (name in elementwise)
        assert is_compaction(after[name], num_salient) == (name in folded)
        assert torch.equal(before[name], after[name]) == (name not in folded)
    assert_same_bits(logits(model, token_ids), expected)
    assert fold_permutations(model) == []
    assert_same_bits(logits(model, token_ids), expected)


@pytest.mark.parametrize("backend", ["int4", "fake"])
def test_nothing_is_left_to_gather_without_salient_channels(
    architecture, backend, quantized, token_ids
):
    model = quantized(architecture, backend=backend, salient_prop=0.0, sort_within_heads=True)
    expected = logits(model, token_ids)
    folded, after = fold_permutations(model), perms(model)
    behind_attention = () if architecture in UNTRACED else BEHIND_ATTENTION
    assert sorted(folded) == sorted(named_like(after, *ELEMENTWISE, *behind_attention))
    assert all(is_identity(after[name]) for name in folded)
    assert_same_bits(logits(model, token_ids), expected)


@pytest.mark.parametrize("recipe", ["fast", "best"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_recipe_and_dtype(recipe, dtype, quantized, token_ids):
    model = quantized("llama-bias", dtype, recipe=recipe, sort_within_heads=True)
    expected = logits(model, token_ids)
    assert len(fold_permutations(model)) == 4
    assert_same_bits(logits(model, token_ids), expected)


def test_the_cache_serves_a_folded_model(quantized, token_ids):
    model = quantized("mistral", sort_within_heads=True)
    model.generation_config.eos_token_id = None

    def generated():
        return model.generate(token_ids[:1, :5], max_new_tokens=12, do_sample=False)

    expected = generated()
    assert len(fold_permutations(model)) == 4
    assert torch.equal(generated(), expected) and expected.shape == (1, 17)


@pytest.mark.parametrize("within", [False, True])
def test_blocks_stay_where_they_are(within, quantized, token_ids):
    model = quantized("llama", tp_blocks=2, sort_within_heads=within)
    block = model.model.layers[1]
    rows_before = [
        set(map(tuple, half)) for half in block.mlp.gate_proj.weight.view(2, 44, 48).tolist()
    ]
    expected = logits(model, token_ids)
    assert len(fold_permutations(model)) == (4 if within else 2)
    assert_same_bits(logits(model, token_ids), expected)
    down = block.mlp.down_proj
    salient = down.num_salient // 2
    halves = torch.arange(88).view(2, 44)
    compaction = torch.cat(
        [halves[:, : 44 - salient].flatten(), halves[:, 44 - salient :].flatten()]
    )
    assert salient and torch.equal(down.perm, compaction.int())
    rows = [set(map(tuple, half)) for half in block.mlp.gate_proj.weight.view(2, 44, 48).tolist()]
    assert rows == rows_before


def test_a_folded_model_is_saved_and_loaded(quantized, token_ids, tmp_path):
    for backend in ("int4", "fake"):
        model = quantized("phi3", backend=backend, sort_within_heads=True)
        expected = logits(model, token_ids)
        folded = fold_permutations(model)
        save_quantized(model, tmp_path / backend)
        loaded = load_quantized(tmp_path / backend)
        assert_same_bits(logits(loaded, token_ids), expected)
        assert folded and fold_permutations(loaded) == []
        for name, perm in perms(model).items():
            assert torch.equal(perms(loaded)[name], perm)


def test_quantized_outputs_stay_where_their_groups_are(quantized, token_ids):
    model = quantized("llama", quantize_output=True, sort_within_heads=True)
    expected = logits(model, token_ids)
    assert fold_permutations(model) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert_same_bits(logits(model, token_ids), expected)
    with pytest.raises(
        ValueError, match="cannot reorder outputs that are quantized in groups of neighbours"
    ):
        model.model.layers[0].self_attn.v_proj.reorder_outputs(torch.arange(24))


@pytest.mark.parametrize("shared", ["gate_proj", "down_proj"])
def test_a_layer_with_two_names_is_left_alone(shared, make_model, token_ids):
    model = make_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    setattr(second, shared, getattr(first, shared))
    quantize(model, MixedQuantConfig(group_size=20), progress=False)
    expected = logits(model, token_ids)
    assert fold_permutations(model) == []
    assert_same_bits(logits(model, token_ids), expected)


def test_orders_that_differ_between_heads_of_one_v_are_left_alone(quantized, token_ids):
    model = quantized("llama", sort_within_heads=True, salient_prop=0.0)
    perm = model.model.layers[0].self_attn.o_proj.perm
    perm[:12] = perm[:12].flip(0)  # the first of two heads
    expected = logits(model, token_ids)
    assert "model.layers.0.self_attn.o_proj" not in fold_permutations(model)
    assert_same_bits(logits(model, token_ids), expected)


def test_models_that_cannot_be_folded(make_model):
    with pytest.raises(ValueError, match="model must be quantized; got OPTForCausalLM"):
        fold_permutations(make_model("opt"))
    unknown = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    with pytest.warns(UserWarning, match="is unknown: assuming"):
        quantize(unknown, MixedQuantConfig(group_size=8), progress=False)
    before = perms(unknown)
    assert fold_permutations(unknown) == []
    assert all(torch.equal(perm, before[name]) for name, perm in perms(unknown).items())


@pytest.mark.parametrize("kind", [W4A4Linear, FakeW4A4Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("num_salient", [0, 5, 50])
def test_reordered_outputs_are_those_of_a_reordered_weight(kind, dtype, n, num_salient):
    weight, bias, order = torch.randn(n, 50).to(dtype), torch.randn(n).to(dtype), torch.randperm(n)
    config = MixedQuantConfig(group_size=12, backend="int4" if kind is W4A4Linear else "fake")
    plan = ChannelPlan(torch.randperm(50).int(), num_salient)
    layer = kind.from_weight(weight, bias, config, plan)
    layer.reorder_outputs(order)
    expected = kind.from_weight(weight[order], bias[order], config, plan)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert_same_bits(layer.state_dict()[name], tensor)
        assert layer.state_dict()[name].is_contiguous()


@pytest.mark.parametrize(
    "made_from, num_heads, in_features, out_features, rows",
    [
        ("v", 4, 8, 4, [[0, 1], [2, 3]]),
        ("v", 2, 4, 4, [[0, 1], [2, 3]]),
        ("q, k, v", 4, 8, 16, [[12, 13], [14, 15]]),
        ("qkv by head", 4, 8, 16, [[6, 7], [14, 15]]),
        ("qkv by head", 2, 4, 8, [[6, 7]]),
        ("channel", 0, 8, 8, None),
        ("v", 3, 8, 8, None),
        ("v", 4, 8, 6, None),
        ("v", 4, 8, 5, None),
        ("v", 4, 8, 0, None),
        ("q, k, v", 4, 8, 8, None),
        ("q, k, v", 4, 8, 14, None),
        ("v", 4, 0, 0, None),
    ],
)
def test_rows_of_v(made_from, num_heads, in_features, out_features, rows):
    item = LayerInput("o", None, ("o",), made_by=("v",), made_from=made_from, num_heads=num_heads)
    found = value_rows(item, in_features, out_features)
    assert (None if found is None else found.tolist()) == rows
