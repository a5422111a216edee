"""Slices for tensor parallelism: what they dequantize to and compute, and the sizes that fit."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from smoothquant import MixedQuantConfig, quantize, save_quantized
from smoothquant.channels.sorting import choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.cli.commands import app
from smoothquant.core.errors import CheckpointError
from smoothquant.layers.int8 import Int8Linear, table_config
from smoothquant.layers.linear import QuantizedLinear, W4A4Linear
from smoothquant.models.families import known_inputs
from smoothquant.serving import shards

K = 512
PARTS = (1, 2, 4, 8)
SETTINGS = {
    "plain": {},
    "int8 salient": {"salient_format": "int8"},
    "rotated": {"rotation": 8},
    "per channel": {"weight_quant": "per_channel"},
    "no salient": {"salient": 0},
    "all salient": {"salient": K},
    "W4A8": {"act_bits": 8},
    "narrow groups": {"group_size": 6, "k": 416},
}


def make_layer(kind="plain", blocks=8, n=128):
    """A layer whose channels are in `blocks` blocks."""
    fields = {"recipe": "rtn", "group_size": 16, "tp_blocks": blocks} | SETTINGS[kind]
    k = fields.pop("k", K)
    # as many per block that 48 (or 36) INT4 channels remain
    salient = fields.pop("salient", 128)
    config = MixedQuantConfig(**fields)
    stats = ChannelStats.empty(k)
    stats.update(torch.randn(20, k) * torch.rand(k))
    plan = choose_channels(stats, num_salient=salient, tp_blocks=blocks)
    return W4A4Linear.from_weight(torch.randn(n, k), torch.randn(n), config, plan)


def int8_layer(n=128):
    config = table_config(MixedQuantConfig(), "int8", 96)
    return Int8Linear.from_weight(torch.randn(n, 96), torch.randn(n), config)


def of_slices(layer, slices, **sizes):
    """A layer of slices, given by their keys."""
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features} | sizes
    num_salient = sizes.pop("num_salient", layer.num_salient)
    sliced = type(layer)(
        **sizes, bias=True, config=layer.config, num_salient=num_salient, device="meta"
    )
    sliced.load_state_dict({k: t.contiguous() for k, t in slices.items()}, assign=True)
    assert sliced.group_size == layer.group_size or not sliced.qweight.numel()
    return sliced


def output_part(layer, start, stop):
    slices = {k: shards.output_slice(k, t, start, stop) for k, t in layer.state_dict().items()}
    return of_slices(layer, slices, out_features=stop - start)


def input_part(layer, part, parts):
    salient = layer.num_salient
    slices = {
        key: shards.input_slice(key, tensor, salient, part, parts)
        for key, tensor in layer.state_dict().items()
    }
    return of_slices(
        layer, slices, in_features=layer.in_features // parts, num_salient=salient // parts
    )


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", [*SETTINGS, "int8"])
def test_slices_of_output_channels_compute_their_rows(kind, parts):
    layer = int8_layer() if kind == "int8" else make_layer(kind)
    assert not shards.rows_fault(128, 128, parts, fused=True)
    x = torch.randn(3, layer.in_features)
    weight, y, end = layer.dequantize(), layer(x), 0
    for part in range(parts):
        start, stop = shards.share(128, 128, part, parts)
        assert start == end
        end = stop
        sliced = output_part(layer, start, stop)
        assert torch.equal(sliced.dequantize(), weight[start:stop])
        assert torch.equal(sliced(x), y[:, start:stop])
    assert end == 128


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_slices_of_input_channels_compute_their_columns(kind, parts):
    layer = make_layer(kind)
    assert not shards.channels_fault(layer, parts)
    x = torch.randn(3, layer.in_features)
    weight, size, total = layer.dequantize(), layer.in_features // parts, -(parts - 1) * layer.bias
    for part in range(parts):
        columns = slice(part * size, (part + 1) * size)
        sliced = input_part(layer, part, parts)
        assert torch.equal(sliced.dequantize(), weight[:, columns])
        total = total + sliced(x[:, columns])
    torch.testing.assert_close(total, layer(x), rtol=1e-5, atol=1e-4)


def test_parts_beyond_the_heads_get_copies():
    heads = [shards.share(48, 3, part, 6) for part in range(6)]
    assert heads == [(0, 16), (0, 16), (16, 32), (16, 32), (32, 48), (32, 48)]
    assert not shards.rows_fault(48, 3, 6, fused=True)
    assert "3 heads cannot be cut into 2 equal parts" in shards.rows_fault(48, 3, 2, fused=True)
    assert "3 heads cannot be cut into 4 equal parts" in shards.rows_fault(48, 3, 4, fused=True)


@pytest.mark.parametrize(
    "rows, parts, fused, fault",
    [
        (40, 1, False, ""),
        (40, 1, True, "40 output channels do not fill panels of 16 in 1 parts"),
        (96, 4, True, "96 output channels do not fill panels of 16 in 4 parts"),
        (96, 4, False, "96 output channels do not fill panels of 16 in 4 parts"),
        (96, 2, True, ""),
    ],
)
def test_output_channels_must_fill_panels(rows, parts, fused, fault):
    assert shards.rows_fault(rows, rows, parts, fused=fused) == fault


def test_input_channels_must_be_in_blocks():
    layer = make_layer(blocks=2)
    assert shards.channels_fault(layer, 2) == ""
    assert "tp_blocks=2: quantize with tp_blocks=4" in shards.channels_fault(layer, 4)
    with pytest.raises(CheckpointError, match="from one of 4 parts.*quantize with tp_blocks=4"):
        shards.input_slice("perm", layer.perm, layer.num_salient, 0, 4)
    layer = make_layer("narrow groups", blocks=16)  # 18 INT4 channels per part: 3 groups, 6 quads
    assert shards.channels_fault(layer, 16) == ""
    assert "in whole blocks of 64 bytes: quantize with tp_blocks=32" in (
        shards.channels_fault(layer, 32)
    )
    layer.config = MixedQuantConfig(act_quant="per_token", tp_blocks=16)
    assert "act_quant='per_token'" in shards.channels_fault(layer, 2)


# ---- Models

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}


def wide_model(make_model, architecture="mistral", **fields):
    model = make_model(architecture, **WIDE, num_hidden_layers=1)
    fields = {"group_size": 8, "recipe": "rtn", "calibration": "weights", **fields}
    quantize(model, MixedQuantConfig(**fields), progress=False)
    return model


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_models_are_cut_into_as_many_parts_as_they_have_blocks(blocks, within, make_model):
    model = wide_model(make_model, tp_blocks=blocks, sort_within_heads=within)
    faults = shards.parallel_faults(model)
    assert [parts for parts, fault in faults.items() if not fault] == [
        parts for parts in PARTS if parts <= blocks
    ]
    for item in (item for item in known_inputs(model) if item.made_by):
        layer = model.get_submodule(item.name)
        assert layer.num_salient
        for part in range(blocks):
            size = layer.in_features // blocks
            columns = layer.dequantize()[:, part * size : (part + 1) * size]
            slices = {
                key: shards.input_slice(key, tensor, layer.num_salient, part, blocks)
                for key, tensor in layer.state_dict().items()
            }
            slices["bias"] = torch.zeros(layer.out_features)
            sizes = {"in_features": size, "num_salient": layer.num_salient // blocks}
            assert torch.equal(of_slices(layer, slices, **sizes).dequantize(), columns)
    for parts, fault in faults.items():
        assert not fault or fault.endswith(f"quantize with tp_blocks={parts}")


@pytest.mark.parametrize(
    "architecture, changes, fields, parts, fault",
    [
        ("llama", {"hidden_size": 40, "intermediate_size": 64}, {}, 1, "40 output channels"),
        ("mistral", {**WIDE, "num_attention_heads": 6}, {}, 4, "6 attention heads"),
        ("mistral", WIDE, {"backend": "fake"}, 1, "backend='fake' has no packed weights"),
        ("mixtral", WIDE, {}, 2, "experts are not cut"),
        ("falcon-new", {}, {}, 2, "stored head by head"),
        ("phi3", {k: v for k, v in WIDE.items() if k != "head_dim"}, {"tp_blocks": 2}, 2, ""),
        ("opt", {"hidden_size": 128, "ffn_dim": 256}, {"tp_blocks": 2}, 2, ""),
    ],
)
def test_the_reason_is_given(architecture, changes, fields, parts, fault, make_model):
    model = make_model(architecture, **{"num_hidden_layers": 1, **changes})
    fields = {"group_size": 16, "recipe": "rtn", "calibration": "weights", **fields}
    quantize(model, MixedQuantConfig(**fields), progress=False)
    faults = shards.parallel_faults(model)
    assert fault in faults[parts] and bool(fault) == bool(faults[parts]), faults


def test_a_model_of_an_unknown_family_is_in_one_part():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(UserWarning):
        quantize(model, MixedQuantConfig(calibration="weights"), progress=False)
    faults = shards.parallel_faults(model)
    assert not faults[1] and "no row in the table of families" in faults[2]
    assert isinstance(model[0], QuantizedLinear)


def answer(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_print_the_sizes_that_fit(make_model, tmp_path):
    save_quantized(wide_model(make_model, tp_blocks=2), tmp_path / "model")
    for command in ("inspect", "verify"):
        text = answer(command, tmp_path / "model")
        assert "tensor parallel   1, 2; not 4: model.layers.0.self_attn.o_proj: " in text
        report = json.loads(answer(command, tmp_path / "model", "--json"))
        sizes = report["tensor_parallel"]
        assert list(sizes) == ["1", "2", "4", "8"] and sizes["2"] == ""
        assert sizes["4"].endswith("quantize with tp_blocks=4")
