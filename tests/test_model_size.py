"""Sizes: bytes of real tensors, shared ones once; the published formula as an estimate."""

import pytest
import torch
from torch import nn

from smoothquant import quantize
from smoothquant.core.config import MixedQuantConfig
from smoothquant.model_size import Byte, GiB, KiB, MiB, get_model_size
from smoothquant.models.modules import distinct_tensors


def test_units_are_bits():
    assert (Byte, KiB, MiB, GiB) == (8, 8 * 1024, 8 * 1024**2, 8 * 1024**3)


def test_counts_persistent_tensors_in_their_own_width():
    model = nn.Linear(3, 5).to(torch.float16)
    model.register_buffer("kept", torch.zeros(7, dtype=torch.int32))
    model.register_buffer("scratch", torch.zeros(99), persistent=False)
    assert get_model_size(model) == 8 * (2 * (15 + 5) + 4 * 7)


def test_tied_tensors_count_once(make_model):
    tied = make_model("llama")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    size = get_model_size(tied)
    assert distinct_tensors(tied)[1] == {"lm_head.weight": "model.embed_tokens.weight"}
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert get_model_size(tied) - size == 32 * tied.lm_head.weight.numel()


def test_meta_tensors_and_empty_tensors_are_distinct():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(0, 4, bias=False))
    assert get_model_size(model) == 32 * 2 * (16 + 4)
    assert distinct_tensors(model)[1] == {}


@pytest.mark.parametrize(
    "arguments, width",
    [
        ({}, 16),
        ({"data_width": 4}, 4),
        ({"data_width": 4, "group_size": 128}, 4 + 20 / 128),
        ({"data_width": 4, "salient_prop": 0.1, "group_size": 4}, 9 * 0.9 + 21 * 0.1),
    ],
)
@pytest.mark.parametrize("architecture", ["llama-bias", "mixtral"])
@pytest.mark.parametrize("backend", ["int4", "fake"])
def test_estimate_is_the_published_formula_before_and_after(
    arguments, width, architecture, backend, make_model
):
    model = make_model(architecture)
    elements = sum(parameter.numel() for parameter in model.parameters())
    before = get_model_size(model, estimate=True, **arguments)
    assert before == pytest.approx(elements * width)
    quantize(model, MixedQuantConfig(group_size=16, backend=backend), progress=False)
    assert get_model_size(model, estimate=True, **arguments) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_size": 0}, "group_size must be >= 1; got 0"),
        ({"group_size": -2}, "group_size must be >= 1; got -2"),
        ({"salient_prop": 2}, "salient_prop must be in"),
        ({"data_width": -1}, "data_width must be in"),
    ],
)
@pytest.mark.parametrize("estimate", [False, True])
def test_bad_arguments(arguments, message, estimate):
    with pytest.raises(ValueError, match=message):
        get_model_size(nn.Linear(2, 2), estimate=estimate, **arguments)


@pytest.mark.parametrize("salient_format, salient_row", [("16bit", 32 * 16), ("int8", 32 * 8 + 16)])
def test_quantized_size_is_the_formula_of_the_format(salient_format, salient_row):
    """N and K fill the panels exactly: 4 + 16 / g bits, and for 32 salient channels of a row 16
    bits each, or 8 and a scale."""
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    with pytest.warns(UserWarning):
        config = MixedQuantConfig(group_size=32, salient_prop=0.125, salient_format=salient_format)
        (record, *_) = quantize(model, config, progress=False)
    perm = 32 * 256
    bits = 64 * (224 * (4 + 16 / 32) + salient_row) + perm
    assert get_model_size(model) == bits == record.bits_per_weight * 64 * 256
