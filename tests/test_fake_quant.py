"""The published names: values bit for bit, purity, signatures, and the model-wide entry points."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from length import at_length

from smoothquant import fake_quant, quantize
from smoothquant.channels.statistics import ChannelStats
from smoothquant.fake_quant import quantize_model
from smoothquant.layers.linear import FakeW4A4Linear, QuantizedLinear, W4A4Linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = {
    "quantize_weight_per_channel_absmax": "row",
    "quantize_weight_per_tensor_absmax": "tensor",
    "quantize_weight_per_group_absmax": "group",
    "quantize_weight_per_group_absmax_sort": "sort",
    "quantize_activation_per_token_absmax": "row",
    "quantize_activation_per_tensor_absmax": "tensor",
    "quantize_activation_per_group_absmax": "group",
    "quantize_activation_per_group_absmax_sort": "sort",
}


def stated(t, n_bits, group_size, kind):
    """The definition, restated with one group at a time and in-place steps, as it was published."""

    def absmax(block, scales):
        scales.clamp_(min=1e-5).div_(2 ** (n_bits - 1) - 1)
        block.div_(scales).round_().mul_(scales)

    rows = t.clone().reshape(-1, t.shape[-1])
    if kind == "tensor":
        absmax(rows, rows.abs().max())
    elif kind == "row":
        absmax(rows, rows.abs().max(dim=-1, keepdim=True)[0])
    else:
        order = torch.arange(rows.shape[1])
        if kind == "sort":
            order = torch.argsort(rows.abs().max(dim=0).values)
        rows = rows[:, order]
        for start in range(0, rows.shape[1], group_size):
            block = rows[:, start : start + group_size]
            absmax(block, block.abs().max(dim=-1, keepdim=True)[0])
        unsorted = torch.empty_like(rows)
        unsorted[:, order] = rows
        rows = unsorted
    return rows.reshape(t.shape)


def call(name, t, n_bits, group_size):
    function = getattr(fake_quant, name)
    return (
        function(t, n_bits)
        if FUNCTIONS[name] in ("row", "tensor")
        else function(t, n_bits, group_size)
    )


@settings(max_examples=at_length(400, 100), deadline=None)
@given(
    name=st.sampled_from(list(FUNCTIONS)),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(1, 1), (3, 7), (2, 5, 13), (17,), (2, 2, 3, 8), (5, 130), (4, 256)]),
    n_bits=st.integers(2, 16),
    group_size=st.sampled_from([1, 2, 3, 4, 7, 16, 128, 1000]),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_values_are_the_published_ones_and_the_argument_is_untouched(
    name, dtype, shape, n_bits, group_size, scale, seed
):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(dtype)
    before = t.clone()
    got = call(name, t, n_bits, group_size)
    assert torch.equal(t, before)
    assert got.dtype == dtype and got.shape == t.shape and got.is_contiguous()
    assert got.data_ptr() != t.data_ptr()
    # float16 rounds 1e-5 / q_max to 0 from 9 bits on: NaN belongs to the definition there
    want = stated(t, n_bits, group_size, FUNCTIONS[name])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_values(name):
    t = torch.tensor([[7.0, -3.4, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]])
    assert call(name, t, 4, 4).tolist() == [[7.0, -3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_views_and_empty_tensors(name):
    t = torch.randn(6, 10)
    for view in (t.T, t[::2], t[:, ::3], t.expand(2, 6, 10)):
        assert torch.equal(call(name, view, 4, 3), call(name, view.contiguous(), 4, 3))
    for shape in ((0, 8), (3, 0), (2, 0, 5)):
        assert call(name, torch.zeros(shape), 4, 3).shape == shape


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "t, n_bits, group_size, error, message",
    [
        (torch.ones(2, 4), 1, 4, ValueError, r"n_bits must be in \[2, 16\]; got 1"),
        (torch.ones(2, 4), 17, 4, ValueError, r"n_bits must be in \[2, 16\]; got 17"),
        (torch.ones(2, 4), 4.0, 4, TypeError, "n_bits must be an integer; got 4.0"),
        (torch.ones(2, 4, dtype=torch.int32), 4, 4, TypeError, "{} must be .*torch.int32"),
        ([1.0], 4, 4, TypeError, "{} must be a floating-point tensor; got list"),
        (torch.tensor(1.0), 4, 4, ValueError, "{} must have at least one dimension"),
    ],
)
def test_bad_arguments(name, t, n_bits, group_size, error, message):
    with pytest.raises(error, match=f"^{message.format('w' if 'weight' in name else 't')}"):
        call(name, t, n_bits, group_size)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "per_group" in name])
@pytest.mark.parametrize(
    "t, group_size, error, message",
    [
        (torch.ones(2, 4), 0, ValueError, "group_size must be .*; got 0"),
        (torch.ones(2, 4), -3, ValueError, "group_size must be >= 1; got -3"),
        (torch.ones(0, 4), 0, ValueError, "group_size must be .*; got 0"),
        (torch.ones(2, 4), 2.5, TypeError, "group_size must be an integer; got 2.5"),
    ],
)
def test_bad_group_sizes(name, t, group_size, error, message):
    with pytest.raises(error, match=message):
        call(name, t, 4, group_size)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "per_group" in name])
def test_a_huge_group_takes_no_memory(name):
    t = torch.randn(3, 7)
    assert torch.equal(call(name, t, 4, 2**60), call(name, t, 4, 7))


PUBLISHED = (
    "model weight_quant act_quant quantize_bmm_input input_feat salient_prop quant_bits group_size"
)


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("quantize_model", ["per_channel", "per_token", False, None, None, 4, 128, 0, 0]),
        ("quantize_opt", ["per_tensor", "per_tensor", True, None, 0, 4, 128]),
        ("quantize_llama_like", ["per_channel", "per_token", False, None, 0, 4, 128]),
        ("quantize_mixtral", ["per_channel", "per_token", False, None, 0, 4, 128]),
        ("quantize_falcon", ["per_channel", "per_token", True, None, 0, 4, 128]),
    ],
)
def test_published_signatures(name, defaults):
    parameters = inspect.signature(getattr(fake_quant, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional][:8] == PUBLISHED.split()
    assert [p.default for p in positional][1:] == defaults


def test_published_submodules_and_exports():
    import smoothquant

    assert smoothquant.quantize_model is quantize_model
    assert fake_quant.W4A4Linear is smoothquant.W4A4Linear
    assert callable(smoothquant.smooth_lm) and smoothquant.__version__


def published_means(model, token_ids):
    """input_feat as published: a list of mean magnitudes per linear."""
    feat, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, name=name: feat.setdefault(name, []).append(
                        args[0].detach().flatten(0, -2).abs().mean(0)
                    )
                )
            )
    with torch.no_grad():
        model(token_ids)
        model(token_ids.flip(1))
    for handle in handles:
        handle.remove()
    return feat


ENTRY_POINTS = [
    ("opt", fake_quant.quantize_opt),
    ("llama", fake_quant.quantize_llama_like),
    ("mistral", fake_quant.quantize_llama_like),
    ("mixtral", fake_quant.quantize_mixtral),
    ("falcon-new", fake_quant.quantize_falcon),
    ("bloom", quantize_model),
]


@pytest.mark.filterwarnings("ignore:act_quant='per_tensor'")
@pytest.mark.parametrize("architecture, entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("backend", ["int4", "fake"])
def test_published_call(architecture, entry_point, backend, make_model, token_ids, caplog):
    model = make_model(architecture)
    feat = published_means(model, token_ids)
    result = entry_point(
        model, input_feat=feat, salient_prop=0.1, group_size=16, backend=backend, progress=False
    )
    kind = W4A4Linear if backend == "int4" else FakeW4A4Linear
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert result is model and len(layers) >= 8
    experts = [name for name in layers if name not in feat]
    assert all(".experts." in name for name in experts)
    assert len(experts) == (2 * 4 * 2 if architecture == "mixtral" else 0)
    assert caplog.text.count("no statistics for 16 expert matrices") == bool(experts)
    for name, layer in layers.items():
        assert type(layer) is kind
        if name in experts:
            assert layer.num_salient == layer.in_features // 10
            continue
        importance = sum(feat[name]).float()
        salient = torch.argsort(importance, descending=True)[: max(1, int(0.1 * len(importance)))]
        assert sorted(layer.perm[-layer.num_salient :].tolist()) == sorted(salient.tolist()), name
    assert torch.isfinite(model(token_ids).logits).all()
    said = [record for record in caplog.records if "computed from the weights" in record.message]
    assert len(said) == 1


def test_without_input_feat_the_weights_choose_and_a_log_line_says_so(make_model, caplog):
    model = quantize_model(make_model("opt"), salient_prop=0.1, progress=False)
    assert model.model.decoder.layers[0].fc1.num_salient == 4
    assert "the weights alone" in caplog.text


def test_per_tensor_activations_warn_once_and_become_per_token(make_model):
    with pytest.warns(UserWarning, match="act_quant='per_tensor'") as caught:
        model = fake_quant.quantize_opt(make_model("opt"), progress=False)
    assert len(caught) == 1
    assert model.model.decoder.layers[0].fc1.config.act_quant == "per_token"
    fake = fake_quant.quantize_opt(make_model("opt"), backend="fake", progress=False)
    assert fake.model.decoder.layers[0].fc1.config.act_quant == "per_tensor"


def test_quantize_bmm_input_marks_the_attention_inputs_only(make_model, token_ids):
    model = fake_quant.quantize_falcon(make_model("falcon-parallel"), progress=False)
    marked = {n for n, m in model.named_modules() if getattr(m, "quantize_output", False)}
    assert marked == {f"transformer.h.{i}.self_attention.query_key_value" for i in range(2)}
    model(token_ids)


def test_entry_points_refuse_other_families(make_model):
    model = make_model("llama")
    for entry_point in (fake_quant.quantize_opt, fake_quant.quantize_falcon):
        with pytest.raises(ValueError, match="model must be of type .*; got 'llama'"):
            entry_point(model)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"group_size": 0}, ValueError, "group_size must be .*; got 0"),
        ({"salient_prop": 1.5}, ValueError, "salient_prop must be in"),
        ({"quant_bits": 1}, ValueError, r"quant_bits must be in \[2, 8\]; got 1"),
        ({"quant_bits": 8}, ValueError, r"quant_bits .*got 8 \(backend='fake' takes up to 8\)"),
        ({"quant_bits": 9, "backend": "fake"}, ValueError, r"quant_bits .*got 9"),
        ({"sort": "alphabet"}, ValueError, "sort must be one of .*'alphabet'"),
        ({"backend": "int5"}, ValueError, "backend must be one of .*'int5'"),
        ({"weight_quant": "per_head"}, ValueError, "weight_quant must be one of .*'per_head'"),
        ({"act_quant": "per_head"}, ValueError, "act_quant must be one of .*'per_head'"),
        ({"input_feat": [1]}, TypeError, "input_feat must map module names; got list"),
        ({"input_feat": {"lm_head": 5}}, ValueError, "input_feat of lm_head"),
        ({"input_feat": {"lm_head": []}}, ValueError, "input_feat of lm_head"),
        (
            {"input_feat": {"a.b": torch.tensor([1.0, float("nan")])}},
            ValueError,
            "feat of a.b: mean",
        ),
        (
            {"input_feat": {"lm_head": torch.ones(48)}},
            ValueError,
            "no entry for .*entries: lm_head",
        ),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message, make_model):
    model = make_model("opt")
    with pytest.raises(error, match=message):
        quantize_model(model, progress=False, **arguments)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_statistics_and_means_choose_alike_where_they_must(make_model, token_ids):
    stats = ChannelStats.from_mean(torch.arange(1.0, 49.0))
    one, other = make_model("llama"), make_model("llama")
    names = published_means(one, token_ids)
    means = {n: torch.arange(1.0, 1 + m[0].numel()) for n, m in names.items()}
    entries = {n: ChannelStats.from_mean(m) for n, m in means.items()}
    quantize_model(one, input_feat=means, salient_prop=0.1, progress=False)
    quantize(other, one.model.layers[0].mlp.up_proj.config, entries, progress=False)
    assert stats.mean_only
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
