"""GPTQ against round-to-nearest, and its failures."""

import pytest
import torch

from smoothquant.config import MixedQuantConfig
from smoothquant.gptq import gptq, inverse_factor
from smoothquant.linear import FakeW4A4Linear, W4A4Linear, round_to_grid, weight_group_scales
from smoothquant.sorting import ChannelPlan


def correlated_inputs(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, k // 6, generator=generator)
    mix = torch.randn(k // 6, k, generator=generator)
    return common @ mix + torch.randn(tokens, k, generator=generator)


@pytest.mark.parametrize("k4", [300, 285])
def test_output_error_is_below_nearest_rounding(k4):
    x, weight = correlated_inputs(2000, 300), torch.randn(50, 300)
    config = MixedQuantConfig(group_size=64)
    scales = weight_group_scales(weight[:, :k4], config, 64)
    factor = inverse_factor(x.T @ x, damping=0.01)
    by_column = scales.repeat_interleave(64, dim=1)[:, :k4]
    rounded = gptq(weight, factor, scales, k4, 64, 4)
    nearest = torch.cat([round_to_grid(weight[:, :k4], by_column, 7), weight[:, k4:]], dim=1)

    def error(w):
        return float((x @ (w - weight).T).norm())

    assert error(rounded) < 0.6 * error(nearest)
    # what was rounded is on the grid: packing it again changes nothing
    assert torch.equal(round_to_grid(rounded[:, :k4], by_column, 7), rounded[:, :k4])
    moved = (rounded[:, k4:] != weight[:, k4:]).all()
    assert k4 == 300 or moved  # salient columns absorb errors


@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_layers_store_what_gptq_rounded(cls, backend):
    x, weight = correlated_inputs(2000, 300), torch.randn(50, 300)
    plan = ChannelPlan(torch.randperm(300).int(), 15)
    config = MixedQuantConfig(group_size=64, backend=backend)
    permuted = x[:, plan.perm.long()]
    factor = inverse_factor(permuted.T @ permuted, damping=0.01)
    nearest = cls.from_weight(weight, None, config, plan).dequantize()
    rounded = cls.from_weight(weight, None, config, plan, factor=factor).dequantize()
    errors = [float((x @ (w - weight).T).norm()) for w in (rounded, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_dead_channels_and_singular_hessians_are_damped():
    x = torch.randn(10, 60)  # rank 10
    x[:, 5] = 0
    factor = inverse_factor(x.T @ x, damping=0.01)
    assert factor is not None and torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all() and torch.equal(factor, factor.triu())


def test_hopeless_hessians_give_none():
    assert inverse_factor(torch.full((4, 4), float("nan")), damping=0.01) is None
    assert inverse_factor(-torch.ones(4, 4) + 2 * torch.eye(4) * 0.1, damping=1e-9) is None
