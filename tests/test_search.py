"""Choices made by trial on calibration rows, each against all of its alternatives."""

import copy

import pytest
import torch

from smoothquant import collect_stats, load_quantized, quantize, save_quantized
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration import token_blocks
from smoothquant.config import MixedQuantConfig
from smoothquant.linear import QuantizedLinear, W4A4Linear
from smoothquant.search import ACT_CLIPS, output_error, resolve
from smoothquant.sorting import ChannelPlan

PLAN = ChannelPlan(torch.arange(64, dtype=torch.int32), 4)


def layer():
    x, weight = torch.randn(400, 64), torch.randn(32, 64)
    x[:, 5] *= 4
    return x, weight


def test_the_clip_of_least_error_is_taken():
    x, weight = layer()
    config = MixedQuantConfig(group_size=32, act_clip="search")
    chosen = resolve(config, x, weight, PLAN, False)
    errors = {
        clip: output_error(
            x, weight, PLAN, MixedQuantConfig(group_size=32, act_clip=clip), x @ weight.T
        )
        for clip in ACT_CLIPS
    }
    assert chosen.act_clip == min(errors, key=errors.get) < 1.0
    assert chosen.act_format == "symmetric" and chosen.backend == "int4"


def test_unsigned_codes_only_where_nothing_was_negative():
    x, weight = layer()
    config = MixedQuantConfig(group_size=32, act_format="auto", rotation=32)
    chosen = resolve(config, x, weight, PLAN, False)
    assert (chosen.act_format, chosen.rotation) == ("zero_point", 32)
    sparse = x.relu() * (torch.rand_like(x) < 0.1)  # most channels 0: rotation would spread them
    chosen = resolve(config, sparse, weight, PLAN, True)
    assert (chosen.act_format, chosen.rotation) == ("unsigned", 0)


def test_without_rows_nothing_is_tried():
    config = MixedQuantConfig(act_format="auto", act_clip="search")
    chosen = resolve(config, None, torch.randn(32, 64), PLAN, True)
    assert (chosen.act_format, chosen.act_clip) == ("zero_point", 1.0)


@pytest.mark.parametrize("fields", [{"act_clip": "search"}, {"act_format": "auto"}])
def test_a_layer_alone_refuses_open_choices(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}='.*quantize"):
        W4A4Linear(64, 32, config=MixedQuantConfig(**fields))
    model, _ = load_bundled("tiny-opt")
    with pytest.raises(ValueError, match=f"{next(iter(fields))}='.*needs batches"):
        quantize(model, MixedQuantConfig(**fields))


@pytest.mark.parametrize("value", ["searched", "1", True, 0.0, 2])
def test_bad_clips(value):
    with pytest.raises((ValueError, TypeError), match="act_clip"):
        MixedQuantConfig(act_clip=value)


def test_a_model_with_choices_per_layer_survives_saving(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 6, 256)
    stats = collect_stats(model, batches, progress=False)
    config = MixedQuantConfig(
        recipe="fast", group_size=64, act_format="auto", act_clip="search", rotation=64
    )
    fixed = copy.deepcopy(model)
    quantize(model, config, stats, batches, progress=False)
    own = {n: m.config for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len({c.act_clip for c in own.values()}) > 1
    # after a ReLU nothing is negative, elsewhere something is
    for name, choice in own.items():
        assert choice.act_format == "zero_point" or name.endswith("fc2")
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    ids = batches[-1]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.mixedquant_config == config
    again = tmp_path / "again"
    save_quantized(loaded, again)
    for file in ("mixedquant.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    quantize(fixed, config, stats, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(fixed(ids).logits, model(ids).logits)
