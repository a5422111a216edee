"""Salient channels shared out among layers, against a search through all possibilities' edges."""

import re

import pytest
import torch
from torch import nn

from smoothquant import collect_stats, quantize
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration import token_blocks
from smoothquant.channels.budget import Demand, bits_per_weight, share_out
from smoothquant.channels.sorting import num_salient_channels
from smoothquant.core.config import MixedQuantConfig

pytestmark = pytest.mark.usefixtures("linears_alone")


def demands():
    peaked, flat = torch.ones(100).double(), torch.ones(200).double()
    peaked[:30] = 1000
    return [Demand((64, 32), 100, peaked), Demand((48,), 200, flat), Demand((16,), 50)]


def spent(shares, of=slice(None)):
    return sum(n * sum(d.rows) for n, d in list(zip(shares, demands(), strict=True))[of])


def test_uniform_is_the_published_rule():
    config = MixedQuantConfig(salient_prop=0.07)
    assert share_out(demands(), config) == [num_salient_channels(k, 0.07) for k in (100, 200, 50)]


@pytest.mark.parametrize("prop", [0.02, 0.1, 0.5, 1.0])
def test_channels_compete_under_the_same_average_share(prop):
    uniform = share_out(demands(), MixedQuantConfig(salient_prop=prop))
    config = MixedQuantConfig(salient_prop=prop, salient_allocation="output")
    shares = share_out(demands(), config)
    assert spent(shares, slice(2)) <= spent(uniform, slice(2))
    assert spent(shares, slice(2)) > spent(uniform, slice(2)) - 96  # the next channel did not fit
    assert shares[2] == uniform[2]  # without a score it has the average share
    assert min(shares) >= 1
    if prop == 0.1:
        assert shares[0] > 1.8 * uniform[0]  # its first 30 channels are worth more than any other


def test_nothing_salient_stays_nothing():
    config = MixedQuantConfig(salient_prop=0, salient_allocation="output")
    assert share_out(demands(), config) == [0, 0, 0]


@pytest.mark.parametrize("allocation", ["uniform", "output"])
@pytest.mark.parametrize("salient_format", ["16bit", "int8"])
def test_bits_are_kept_to_and_used(allocation, salient_format):
    fields = {"salient_allocation": allocation, "salient_format": salient_format, "group_size": 32}
    config = MixedQuantConfig(bits=6.5, **fields)
    shares = share_out(demands(), config)
    assert bits_per_weight(demands(), shares, config) <= 6.5
    more = [n + 2 for n in shares]
    assert bits_per_weight(demands(), more, config) > 6.5
    with pytest.raises(ValueError, match="bits must be at least .*; got 4"):
        share_out(demands(), MixedQuantConfig(bits=4, **fields))
    all_in_16 = share_out(demands(), MixedQuantConfig(bits=32, **fields))
    assert all_in_16 == [100, 200, 50]


@pytest.mark.parametrize("allocation", ["uniform", "output"])
def test_equal_counts_in_blocks_are_paid_for(allocation):
    blocks = [demand._replace(blocks=8) for demand in demands()[:1]] + demands()[1:]
    config = MixedQuantConfig(bits=6.5, group_size=32, salient_allocation=allocation)
    shares = share_out(blocks, config)
    assert shares[0] % 8 == 0 and shares[0] > 0
    assert bits_per_weight(blocks, shares, config) <= 6.5


def test_bits_and_share_exclude_each_other():
    with pytest.raises(ValueError, match="salient_prop and bits exclude each other; .* bits=5"):
        MixedQuantConfig(bits=5, salient_prop=0.1)
    assert MixedQuantConfig().salient_prop == 0.05
    config = MixedQuantConfig(bits=5)
    assert MixedQuantConfig.from_dict(config.to_dict()) == config


def test_a_model_keeps_to_its_bits():
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 4, 256)
    stats = collect_stats(model, batches, progress=False)
    config = MixedQuantConfig(
        bits=5.2, group_size=64, salient_allocation="output", salient_metric="output"
    )
    records = [r for r in quantize(model, config, stats, progress=False) if r.action == "quantized"]
    weights = sum(r.shape[0] * r.shape[1] for r in records)
    bits = sum(r.bits_per_weight * r.shape[0] * r.shape[1] for r in records) / weights
    assert 5.15 < bits <= 5.2
    assert len({r.num_salient / r.shape[1] for r in records}) > 4


@pytest.mark.parametrize("blocks", [4, 32])
@pytest.mark.parametrize(
    "channels, group_size, salient",
    [
        (4096, 128, 512),  # 4 x 51 would be wanted: 128 leave 896 in each part
        (11008, 128, 768),  # 4 x 137: 192 leave 2,560, and 64 would leave 2,688
        (1024, 4, 64),  # of a quad each: an even number of groups
        (640, 128, 128),  # 4 x 8: only 32 leave a group
        (384, 128, None),  # no number leaves one
    ],
)
def test_parts_have_whole_groups(channels, group_size, salient, blocks):
    config = MixedQuantConfig(group_size=group_size)
    (count,) = share_out([Demand((64,), channels, None, blocks, parts=4)], config)
    (without,) = share_out([Demand((64,), channels, None, blocks)], config)
    assert abs(without - channels // 20) <= blocks / 2
    assert count == salient or (salient is None and count == without)
    none = MixedQuantConfig(salient_prop=0)
    assert share_out([Demand((64,), channels, None, blocks, parts=4)], none) == [0]


@pytest.mark.parametrize(
    "tp_blocks, fields, warned",
    [
        (4, {"salient_prop": 0.05}, "50 % of 1024 .* comes closer to salient_prop=0.05"),
        (4, {"salient_prop": 0.5}, ""),
        (1, {"salient_prop": 0.05}, ""),
        (4, {"bits": 7.0}, "0 % of 1024 .* comes closer to bits=7.0"),
    ],
)
def test_parts_far_from_the_share_asked_for_are_told(tp_blocks, fields, warned, caplog):
    config = MixedQuantConfig("rtn", calibration="weights", tp_blocks=tp_blocks, **fields)
    quantize(nn.Sequential(nn.Linear(1024, 16)), config, progress=False)
    messages = [text for text in caplog.messages if text.startswith("tp_blocks=")]
    assert len(messages) == bool(warned)
    assert all(re.search(warned, text) for text in messages)


def test_blocks_of_a_model_keep_to_its_bits():
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 2, 256)
    config = MixedQuantConfig(
        bits=6, group_size=64, sort_within_heads=True, tp_blocks=2, salient_allocation="output"
    )
    records = quantize(model, config, batches=batches, progress=False)
    records = [r for r in records if r.action == "quantized"]
    weights = sum(r.shape[0] * r.shape[1] for r in records)
    assert sum(r.bits_per_weight * r.shape[0] * r.shape[1] for r in records) / weights <= 6
