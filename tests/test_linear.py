"""The promises of the linear layers, beyond the oracle chain of test_ops.py."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import threading

import numpy
import pytest
import torch
from bits import assert_same_bits, forced_isa
from length import at_length
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smoothquant.channels.sorting import ChannelPlan, choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.kernels import ops, reference
from smoothquant.layers import linear
from smoothquant.layers.linear import (
    FakeW4A4Linear,
    W4A4Linear,
    linear_class,
    weight_in_packed_order,
)

SALIENT_FORMATS = ["16bit", "int8"]


def plan_for(k: int, num_salient: int, seed: int = 0) -> ChannelPlan:
    generator = torch.Generator().manual_seed(seed)
    return ChannelPlan(torch.randperm(k, generator=generator).int(), num_salient)


def layer_of(n=40, k=150, num_salient=7, seed=0, dtype=torch.float32, **config) -> W4A4Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    config = MixedQuantConfig(**({"group_size": 32} | config))
    return W4A4Linear.from_weight(weight, bias, config, plan_for(k, num_salient, seed))


@pytest.mark.parametrize("isa", ops.supported_isas())
def test_row_has_the_same_bits_in_every_batch_position_and_thread_count(isa):
    layer, threads = layer_of(n=100, k=330), torch.get_num_threads()
    rows = torch.randn(257, 330)
    try:
        with forced_isa(isa):
            alone = torch.cat([layer(row[None]) for row in rows])
            for case in range(at_length(500, 60)):
                generator = torch.Generator().manual_seed(case)
                size = int(torch.randint(1, 258, (), generator=generator))
                picked = torch.randint(257, (size,), generator=generator)
                torch.set_num_threads(1 + case % 2)
                assert_same_bits(layer(rows[picked]), alone[picked])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.long
def test_more_threads_than_work_and_work_for_all_threads(run_python):
    code = """
import torch
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.linear import W4A4Linear
from smoothquant.channels.sorting import ChannelPlan
torch.manual_seed(0)
torch.set_num_threads({threads})
w, x = torch.randn(700, 1100), torch.randn(300, 1100)
plan = ChannelPlan(torch.randperm(1100).int(), 55)
layer = W4A4Linear.from_weight(w, None, MixedQuantConfig(), plan)
print(hash(tuple(layer(x).flatten().tolist())), hash(bytes(layer.qweight.flatten().tolist())))
"""
    results = {run_python(code.format(threads=t), PYTHONHASHSEED="0").stdout for t in (1, 2, 5)}
    assert len(results) == 1


def test_a4_is_real():
    """The result is the integer one, and not that of 16-bit activations."""
    layer, x = layer_of(num_salient=0, recipe="rtn"), torch.randn(9, 150)
    y = layer(x)
    codes, scales = reference.group_quantize(x[:, layer.perm.long()], 32)
    assert codes.unique().numel() <= 15
    weight = layer.dequantize()
    a4 = reference.group_dequantize(codes, scales, 32) @ weight[:, layer.perm.long()].T + layer.bias
    a16 = x @ weight.T + layer.bias
    torch.testing.assert_close(y, a4, rtol=1e-4, atol=1e-4)
    assert (y - a16).norm() > 0.03 * a16.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_are_exactly_the_bias(dtype):
    layer = layer_of(dtype=dtype)
    x = torch.randn(4, 150, dtype=dtype)
    x[2] = 0
    assert_same_bits(layer(x)[2], layer.bias)


@pytest.mark.parametrize("case", range(200))
def test_non_finite_values_stay_in_their_row(case):
    generator = torch.Generator().manual_seed(case)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
    layer = layer_of(
        num_salient=case % 5 * 30,
        seed=case,
        dtype=dtype,
        group_size=1 + case % 40,
        salient_format=SALIENT_FORMATS[case % 2],
    )
    x = torch.randn(6, 150, generator=generator).to(dtype)
    clean = layer(x)
    assert torch.isfinite(clean).all()
    row, column = (int(torch.randint(high, (), generator=generator)) for high in (6, 150))
    x[row, column] = (math.nan, math.inf, -math.inf)[case % 3]
    dirty = layer(x)
    assert dirty[row].isnan().all()
    others = torch.arange(6) != row
    assert_same_bits(dirty[others], clean[others])


@pytest.mark.parametrize("isa", ops.supported_isas())
@pytest.mark.parametrize("group_size", [4, 128, 1024, 16384])
def test_largest_codes_everywhere_are_summed_exactly(isa, group_size):
    k = 16384
    x, w = torch.full((3, k), 7.0), torch.full((16, k), -7.0)
    x[1] = -7
    x[2, ::2] = -7
    config = MixedQuantConfig("rtn", group_size=group_size, salient_prop=0.0)
    with forced_isa(isa):
        layer = W4A4Linear.from_weight(w, None, config, ChannelPlan(torch.arange(k).int(), 0))
        expected = torch.tensor([-49.0 * k, 49.0 * k, 0.0])[:, None].expand(3, 16)
        assert torch.equal(layer(x), expected)


def test_weights_of_any_magnitude_survive():
    w = torch.tensor([[1e-6, -1e-6, 1e4, -1e4], [1e-30, 0.0, 1e30, -1e30]])
    config = MixedQuantConfig(group_size=2, salient_prop=0.0)
    layer = W4A4Linear.from_weight(w, None, config, ChannelPlan(torch.arange(4).int(), 0))
    torch.testing.assert_close(layer.dequantize(), w, rtol=0.08, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_any_rank(rank):
    layer = layer_of()
    x = torch.randn([2] * (rank - 1) + [150])
    y = layer(x)
    assert y.shape == (*x.shape[:-1], 40)
    assert_same_bits(y.reshape(-1, 40), layer(x.reshape(-1, 150)))
    assert layer(torch.empty(0, 3, 150)).shape == (0, 3, 40)


@pytest.mark.parametrize("salient_format, salient_bits", [("16bit", 16), ("int8", 8)])
def test_no_float_copy_of_the_weights_remains(salient_format, salient_bits):
    layer = layer_of(512, 1024, num_salient=51, group_size=128, salient_format=salient_format)
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    bits = 8 * held / (512 * 1024)
    assert bits < (1 - 0.05) * (4 + 16 / 128) + salient_bits * 0.05 + 0.2
    assert not list(layer.parameters())


@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
def test_state_dict_holds_everything(salient_format):
    layer, x = layer_of(salient_format=salient_format), torch.randn(5, 150)
    fresh = W4A4Linear(150, 40, config=layer.config, num_salient=layer.num_salient)
    fresh.load_state_dict(layer.state_dict())
    assert_same_bits(fresh(x), layer(x))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: layer.cpu()],
)
@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
def test_copies_compute_the_same(duplicate, salient_format):
    layer, x = layer_of(salient_format=salient_format), torch.randn(5, 150)
    assert_same_bits(duplicate(layer)(x), layer_of(salient_format=salient_format)(x))


@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
def test_cast_keeps_what_must_not_be_rounded(salient_format):
    layer = layer_of(salient_format=salient_format)
    half = copy.deepcopy(layer).half()
    assert half.bias.dtype == torch.float16
    for name in ops.PACKED:
        assert_same_bits(getattr(half, name), getattr(layer, name))
    assert half(torch.randn(2, 150).half()).dtype == torch.float16
    assert half.float().scales.dtype == torch.bfloat16


@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
def test_meta_and_shared_memory(salient_format):
    layer = layer_of(salient_format=salient_format).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(3, 150, device="meta")).shape == (3, 40)
    assert layer_of().share_memory().qweight.is_shared()


def run_layer(layer, x, results):
    results.put(layer(x).numpy())


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_layer_in_another_process(method):
    layer, x = layer_of(), torch.randn(5, 150)
    expected = layer(x)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=run_layer, args=(layer, x, results))
    process.start()
    result = torch.from_numpy(results.get(timeout=120))
    process.join()
    assert_same_bits(result, expected)


def test_forks():
    layer, x = layer_of(), torch.randn(2, 150)
    expected = layer(x)
    for _ in range(at_length(100, 15)):
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(layer(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_eight_threads_at_once():
    layer = layer_of()
    inputs = [torch.randn(1 + i, 150) for i in range(8)]
    expected = [layer(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(at_length(1000, 150)):
            if not torch.equal(layer(inputs[i]), expected[i]):
                wrong.append(i)
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("weight_quant", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize("act_quant", ["per_group", "per_token"])
@pytest.mark.parametrize("num_bits, act_bits", [(2, None), (4, None), (4, 7), (4, 8)])
@pytest.mark.parametrize("act_format", ["symmetric", "unsigned", "zero_point"])
@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_backend_agrees_with_the_integers(
    weight_quant, act_quant, num_bits, act_bits, act_format, salient_format, dtype
):
    if act_bits == 8 and act_format != "symmetric":
        act_bits = 6
    weight, x = torch.randn(40, 150).to(dtype), torch.randn(30, 150).to(dtype)
    choices = {
        "weight_quant": weight_quant,
        "weight_scale": "mse",
        "act_quant": act_quant,
        "act_format": act_format,
        "num_bits": num_bits,
        "act_bits": act_bits,
        "salient_format": salient_format,
        "rotation": 32 if act_format != "unsigned" else 0,
    }
    layers = []
    for cls, backend in ((W4A4Linear, "int4"), (FakeW4A4Linear, "fake")):
        config = MixedQuantConfig(group_size=32, backend=backend, act_clip=0.9, **choices)
        layers.append(cls.from_weight(weight, None, config, plan_for(150, 7)))
    real, fake = layers
    exact = dtype == torch.float32
    salient = real.perm[-7:].long()
    stored, simulated = (layer.dequantize()[:, salient] for layer in layers)
    assert torch.equal(stored.to(dtype), simulated)
    torch.testing.assert_close(
        real.dequantize(), fake.dequantize().float(), rtol=0 if exact else 0.02, atol=1e-2
    )
    error = (real(x).float() - fake(x).float()).norm() / fake(x).float().norm()
    # the simulation rounds weights and quantized activations to its dtype
    assert error < (1e-5 if exact else 0.01)


@pytest.mark.parametrize("weight_quant", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize("n, k, num_salient", [(4, 8, 8), (0, 8, 0), (3, 0, 0), (1, 1, 0)])
@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_degenerate_layers(weight_quant, n, k, num_salient, salient_format, cls, backend):
    config = MixedQuantConfig(
        weight_quant=weight_quant, backend=backend, rotation=4, salient_format=salient_format
    )
    layer = cls.from_weight(torch.randn(n, k), torch.ones(n), config, plan_for(k, num_salient))
    assert layer(torch.zeros(2, k)).tolist() == [[1.0] * n] * 2


def test_mse_scales_reduce_the_error():
    weight = torch.randn(64, 256)
    errors = {}
    for weight_scale in ("max", "mse"):
        config = MixedQuantConfig(group_size=64, salient_prop=0, weight_scale=weight_scale)
        layer = W4A4Linear.from_weight(weight, None, config, plan_for(256, 0))
        errors[weight_scale] = (layer.dequantize() - weight).square().sum()
    assert errors["mse"] < 0.95 * errors["max"]


def test_rotation_and_zero_points_reduce_the_error_of_outliers():
    weight, x = torch.randn(64, 256), torch.randn(100, 256)
    x[:, 0] *= 30
    x[:, 1:] += 1
    exact = x @ weight.T
    errors = {}
    for rotation, act_format in ((0, "symmetric"), (64, "symmetric"), (64, "zero_point")):
        config = MixedQuantConfig(group_size=64, rotation=rotation, act_format=act_format)
        layer = W4A4Linear.from_weight(weight, None, config, plan_for(256, 0))
        errors[rotation, act_format] = float((layer(x) - exact).norm())
    plain, rotated, shifted = errors.values()
    assert rotated < 0.9 * plain and shifted < 0.95 * rotated


@pytest.mark.parametrize(
    "weight, bias, plan, message",
    [
        (torch.randn(3, 4), torch.randn(4), plan_for(4, 0), r"bias must have shape \(3,\); got"),
        (torch.randn(3, 4), None, plan_for(5, 0), "plan.perm must be .* of 4 channels"),
        (torch.randn(3, 4), None, ChannelPlan(torch.zeros(4).int(), 0), "plan.perm must be"),
        (torch.randn(3, 4), None, ChannelPlan(torch.arange(4).int(), 5), "num_salient must be in"),
        (torch.full((3, 4), math.inf), None, plan_for(4, 0), "weight of shape .* NaN or Inf"),
    ],
)
@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_bad_weights_and_plans(weight, bias, plan, message, cls, backend):
    with pytest.raises(ValueError, match=message):
        cls.from_weight(weight, bias, MixedQuantConfig(backend=backend), plan)


def test_salient_weights_too_large_for_16_bits_are_refused():
    weight = torch.full((2, 4), 1e5)
    with pytest.raises(ValueError, match="too large for 16 bits"):
        ops.pack_weight(weight, torch.arange(4).int(), 4, 4, salient_dtype=torch.float16)


def test_int8_salient_weights_are_near_and_their_activations_are_not_rounded():
    weight, x = torch.randn(64, 256), torch.randn(100, 256)
    plan, exact, errors = plan_for(256, 256), x @ weight.T, {}
    for salient_format in SALIENT_FORMATS:
        config = MixedQuantConfig(salient_format=salient_format)
        layer = W4A4Linear.from_weight(weight, None, config, plan)
        y = layer(x)
        torch.testing.assert_close(y, x @ layer.dequantize().T, rtol=1e-5, atol=1e-4)
        errors[salient_format] = float((y - exact).norm() / exact.norm())
    assert 0.001 < errors["16bit"] < 0.003 < errors["int8"] < 0.01


@pytest.mark.parametrize("own, other", [("16bit", "int8"), ("int8", "16bit")])
def test_loading_another_salient_format_is_refused(own, other):
    layer, state = layer_of(salient_format=own), layer_of(salient_format=other).state_dict()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"salient_weight is torch.*salient_format='{own}'"):
        layer.load_state_dict(state, strict=False)
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_loading_checks_perm_and_takes_the_salient_dtype_over():
    half, x = layer_of(dtype=torch.float16), torch.randn(3, 150).half()
    other = W4A4Linear(150, 40, config=half.config, num_salient=7)
    other.load_state_dict(half.state_dict())
    assert_same_bits(other(x), half(x))
    state = half.state_dict() | {"perm": torch.zeros(150, dtype=torch.int32)}
    with pytest.raises(ValueError, match="perm is not a permutation of 150 channels"):
        other.load_state_dict(state)


@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_a_device_that_is_named_overrules_the_one_around(cls, backend):
    config = MixedQuantConfig(group_size=32, backend=backend)
    with torch.device("meta"):
        here, there = cls(64, 48, config=config, device="cpu"), cls(64, 48, config=config)
    assert {t.device.type for t in here.state_dict().values()} == {"cpu"}
    assert torch.equal(here.perm, torch.arange(64).int())
    assert {t.device.type for t in there.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("recipe", ["rtn", "fast"])
@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_a_layer_is_where_its_weight_was(recipe, cls, backend, monkeypatch):
    for check in ("is_finite", "is_permutation"):  # of values, which these tensors do not have
        monkeypatch.setattr(linear, check, lambda *_: True)
    with FakeTensorMode():
        weight, bias = torch.empty(8, 64, device="cuda"), torch.empty(8, device="cuda")
        plan = ChannelPlan(torch.empty(64, device="cuda").int(), 4)
        config = MixedQuantConfig(recipe=recipe, group_size=16, backend=backend)
        packed = weight_in_packed_order(weight, config, plan, 16, None)
        layer = cls.from_weight(weight, bias, config, plan)
    assert {t.device.type for t in packed} == {"cpu"}
    assert {t.device.type for t in layer.state_dict().values()} == {"cuda"}


def test_a_layer_half_on_meta_is_refused():
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        layer_of().to("meta")(torch.randn(3, 150))


def test_non_finite_raise():
    layer = layer_of(non_finite="raise")
    x = torch.zeros(2, 150)
    layer(x)
    x[1, 3] = math.nan
    with pytest.raises(ValueError, match="x holds NaN or Inf"):
        layer(x)


def test_quantized_output():
    weight, x = torch.randn(40, 150), torch.randn(3, 150)
    config = MixedQuantConfig(group_size=32)
    plain = W4A4Linear.from_weight(weight, None, config, plan_for(150, 7))
    quantized = W4A4Linear.from_weight(weight, None, config, plan_for(150, 7), quantize_output=True)
    assert_same_bits(quantized(x), ops.group_fake_quantize(plain(x), 32, 4))


def test_from_float_published_arguments():
    module = nn.Linear(150, 40)
    before = module.weight.detach().clone()
    importance = torch.rand(150)
    layer = W4A4Linear.from_float(
        module, "per_group", "per_group", importance=importance, salient_prop=0.1, group_size=32
    )
    assert layer.num_salient == 15
    top = set(torch.argsort(importance, descending=True)[:15].tolist())
    assert set(layer.perm[-15:].tolist()) == top
    assert torch.equal(module.weight, before)
    with pytest.raises(TypeError, match="module must be an nn.Linear; got ReLU"):
        W4A4Linear.from_float(nn.ReLU())
    with pytest.raises(ValueError, match="importance must have 150 entries; got 149"):
        W4A4Linear.from_float(module, importance=importance[:-1], salient_prop=0.1)
    with pytest.raises(ValueError, match="act_quant must be one of .*'per_row'"):
        W4A4Linear.from_float(module, act_quant="per_row")
    with pytest.warns(UserWarning, match="depend on the whole batch"):
        W4A4Linear.from_float(module, act_quant="per_tensor")


@pytest.mark.parametrize("salient_format", SALIENT_FORMATS)
def test_compile_and_export(salient_format):
    layer, x = layer_of(salient_format=salient_format), torch.randn(5, 150)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), layer(x))
    assert_same_bits(torch.export.export(layer, (x,)).module()(x), layer(x))


# ---- sorting ----


def stats_of(x: torch.Tensor) -> ChannelStats:
    stats = ChannelStats.empty(x.shape[-1])
    stats.update(x)
    return stats


@pytest.mark.parametrize("sort", ["none", "max", "mean3std", "argmax", "rms"])
@pytest.mark.parametrize("salient_prop", [0, 0.01, 0.5, 1])
def test_plan_is_a_permutation_with_salient_channels_last(sort, salient_prop):
    x = torch.randn(50, 30) * torch.rand(30)
    stats = stats_of(x)
    plan = choose_channels(stats, salient_prop=salient_prop, sort=sort)
    assert sorted(plan.perm.tolist()) == list(range(30))
    assert plan.num_salient == (max(1, int(salient_prop * 30)) if salient_prop else 0)
    salient = plan.perm[30 - plan.num_salient :].long()
    rest = plan.perm[: 30 - plan.num_salient].long()
    if plan.num_salient and len(rest):
        assert stats.rms[salient].min() >= stats.rms[rest].max()
    keys = rest.flip(0).double() if sort == "none" else ops.sort_keys(stats, sort)[rest]
    assert (keys[:-1] >= keys[1:]).all()


def test_plan_errors():
    stats = stats_of(torch.randn(4, 10))
    with pytest.raises(ValueError, match="salient_prop must be in .*got 1.5"):
        choose_channels(stats, salient_prop=1.5)
    with pytest.raises(ValueError, match="sort must be one of .*'up'"):
        choose_channels(stats, salient_prop=0, sort="up")
    with pytest.raises(ValueError, match="salient_metric must be one of .*'median'"):
        choose_channels(stats, salient_prop=0, salient_metric="median")
    mean_only = ChannelStats.from_mean(torch.rand(10))
    with pytest.raises(ValueError, match="sort='rms' needs more than a mean"):
        choose_channels(mean_only, salient_prop=0, sort="rms")
    with pytest.raises(ValueError, match="x must end in 10 channels"):
        stats.update(torch.randn(4, 11))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group_size": 0}, "group_size must be in .*; got 0"),
        ({"num_bits": 5}, r"num_bits must be in \[2, 4\]; got 5"),
        ({"num_bits": 9, "backend": "fake"}, r"num_bits must be in \[2, 8\]; got 9"),
        ({"act_bits": 9, "recipe": "rtn"}, r"act_bits must be in \[2, 8\]; got 9"),
        ({"act_bits": 1}, r"act_bits must be in \[2, 7\]; got 1"),
        ({"act_bits": 8, "act_format": "zero_point"}, r"act_bits must be in \[2, 7\]; got 8"),
        (
            {"num_bits": 8, "backend": "fake", "act_format": "unsigned"},
            r"num_bits must be in \[2, 7\] with act_format='unsigned' unless act_bits",
        ),
        ({"salient_prop": -0.1}, r"salient_prop must be in \[0, 1\]; got -0.1"),
        ({"salient_prop": math.nan}, "salient_prop must be in"),
        ({"sort": "size"}, "sort must be one of none, max, mean3std, argmax, rms; got 'size'"),
        ({"salient_format": "int4"}, "salient_format must be one of 16bit, int8; got 'int4'"),
        ({"tp_blocks": 0}, "tp_blocks must be >= 1; got 0"),
        ({"backend": "int8"}, "backend must be one of int4, fake; got 'int8'"),
        ({"act_clip": 0}, "act_clip must be in .*; got 0"),
        ({"act_quant": "per_tensor"}, "scale from the whole batch"),
        ({"rotation": 96}, "rotation must be 0 or a power of two; got 96"),
        ({"rotation": 1024}, r"rotation must be in \[0, 512\]; got 1024"),
        ({"act_format": "log"}, "act_format must be one of symmetric.*'log'"),
        ({"act_format": "unsigned", "rotation": 32}, "'unsigned' needs rotation=0"),
        ({"recipe": ["best"]}, "recipe must be one of"),
        ({"recipe": "good"}, "recipe must be one of rtn, fast, best, tuned; got 'good'"),
        ({"weight_rounding": "up"}, "weight_rounding must be one of nearest, gptq; got 'up'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MixedQuantConfig(**fields)


def test_config_type_errors_and_round_trip():
    with pytest.raises(TypeError, match="group_size must be an integer; got 32.0"):
        MixedQuantConfig(group_size=32.0)
    with pytest.raises(TypeError, match="salient_prop must be a number; got '5%'"):
        MixedQuantConfig(salient_prop="5%")
    with pytest.raises(TypeError, match="sort_within_heads must be a bool; got 1"):
        MixedQuantConfig(sort_within_heads=1)
    best = MixedQuantConfig(recipe="best", group_size=100)
    assert (best.rotation, best.act_format, best.weight_rounding) == (64, "auto", "gptq")
    assert MixedQuantConfig(recipe="best", rotation=0).rotation == 0
    config = MixedQuantConfig(group_size=numpy.int64(64), act_clip=numpy.float32(0.5), sort="max")
    json.dumps(config.to_dict())
    assert MixedQuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown MixedQuantConfig field.*groupsize"):
        MixedQuantConfig.from_dict({"groupsize": 3})


@pytest.mark.parametrize("salient_format", ["16bit", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_simulates_itself(salient_format, bias):
    weight = torch.randn(50, 70)
    config = MixedQuantConfig(
        recipe="fast", group_size=16, salient_format=salient_format, weight_rounding="nearest"
    )
    plan = ChannelPlan(torch.randperm(70).int(), 5)
    layer = W4A4Linear.from_weight(weight, torch.randn(50) if bias else None, config, plan)
    simulated = layer.simulated()
    x = torch.randn(9, 70)
    y = layer(x)
    assert (simulated(x) - y).norm() < 1e-5 * y.norm()
    assert (simulated.dequantize() - layer.dequantize()).abs().max() < 1e-6
    assert simulated.config.backend == "fake" and (simulated.bias is None) == (not bias)


@pytest.mark.parametrize("backend", ["int4", "fake"])
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.copy_(torch.randn_like(x)),
        lambda x: x.numpy().__setitem__((3, 5), 100),
        lambda x: x.set_(torch.randn_like(x)),
        lambda x: torch.utils.dlpack.from_dlpack(x).zero_(),
    ],
    ids=["in place", "data", "numpy", "set_", "dlpack"],
)
def test_an_input_that_changes_between_two_layers_is_never_stale(write, backend):
    """torch's version counter misses most of these."""
    config = MixedQuantConfig(group_size=16, backend=backend)
    plan = ChannelPlan(torch.arange(64).int(), 4)
    one, two = (
        linear_class(config).from_weight(torch.randn(48, 64), None, config, plan) for _ in "12"
    )
    x = torch.randn(40, 64)
    one(x)
    write(x)
    assert_same_bits(two(x), two(x.clone()))
