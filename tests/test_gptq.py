"""GPTQ against round-to-nearest, and its failures."""

import copy

import pytest
import torch

from smoothquant import quantize
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration import collect_stats, token_blocks
from smoothquant.channels.sorting import ChannelPlan
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.gptq import curvature, descend, gptq, inverse_factor
from smoothquant.layers.linear import FakeW4A4Linear, W4A4Linear
from smoothquant.layers.rounding import round_to_grid, stored_scale, weight_group_scales


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


@pytest.mark.parametrize("move_scales", [False, True])
@pytest.mark.parametrize("k4, group_size", [(300, 64), (285, 64), (285, 4), (285, 1024), (0, 64)])
def test_descent_lowers_the_error_at_every_sweep(k4, group_size, move_scales, monkeypatch):
    x, weight = correlated_inputs(2000, 300), torch.randn(50, 300)
    hessian = x.T @ x
    factor = inverse_factor(hessian.clone(), damping=1e-6)
    scales = weight_group_scales(weight[:, :k4], MixedQuantConfig(), group_size)
    rounded = gptq(weight, factor, scales, k4, group_size, 4)

    def error(w):
        return float((((w - weight).double() @ hessian.double()) * (w - weight)).sum())

    errors = [error(rounded)]
    for sweeps in (1, 2, 4):
        monkeypatch.setattr("smoothquant.layers.gptq.SWEEPS", sweeps)
        lower, new_scales = rounded.clone(), scales.clone()
        arguments = (weight, lower, curvature(factor, k4), new_scales, group_size, 4)
        descend(*arguments, move_scales=move_scales)
        errors.append(error(lower))
    if k4 == 0:
        assert torch.equal(lower, weight)
        return
    assert errors[1] < 0.98 * errors[0] and errors[3] < errors[2] < errors[1]
    # still what can be stored: codes times stored scales
    assert torch.equal(stored_scale(new_scales), new_scales)
    assert torch.equal(new_scales, scales) == (not move_scales)
    by_column = new_scales.repeat_interleave(group_size, dim=1)[:, :k4]
    assert torch.equal(round_to_grid(lower[:, :k4], by_column, 7), lower[:, :k4])


@pytest.mark.parametrize("salient_format", ["16bit", "int8"])
@pytest.mark.parametrize("cls, backend", [(W4A4Linear, "int4"), (FakeW4A4Linear, "fake")])
def test_layers_store_what_gptq_rounded(cls, backend, salient_format):
    x, weight = correlated_inputs(2000, 300), torch.randn(50, 300)
    plan = ChannelPlan(torch.randperm(300).int(), 15)
    config = MixedQuantConfig("rtn", group_size=64, backend=backend, salient_format=salient_format)
    permuted = x[:, plan.perm.long()]
    rounding = curvature(inverse_factor(permuted.T @ permuted, damping=0.01), 285)
    nearest = cls.from_weight(weight, None, config, plan).dequantize()
    rounded = cls.from_weight(weight, None, config, plan, curvature=rounding).dequantize()
    errors = [float((x @ (w - weight).T).norm()) for w in (rounded, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("k, k4", [(300, 285), (257, 257), (5, 0), (0, 0)])
def test_curvature_is_that_of_the_damped_hessian(k, k4):
    x = correlated_inputs(2000, k)
    hessian = x.T @ x
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(k)
    salient = damped[:k4, k4:] @ damped[k4:, k4:].inverse() @ damped[k4:, :k4]
    found = curvature(inverse_factor(hessian, 0.05), k4)
    assert torch.equal(found.factor, found.factor.triu())
    inverse = found.factor.double().T @ found.factor.double()
    torch.testing.assert_close(inverse @ damped, torch.eye(k).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        found.hessian, (damped[:k4, :k4] - salient).float(), rtol=1e-4, atol=1
    )
    assert torch.equal(found.hessian, found.hessian.T)


def test_dead_channels_and_singular_hessians_are_damped():
    x = torch.randn(10, 60)  # rank 10
    x[:, 5] = 0
    factor = inverse_factor(x.T @ x, damping=0.01)
    assert factor is not None and torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all() and torch.equal(factor, factor.triu())


def test_hopeless_hessians_give_none():
    assert inverse_factor(torch.full((4, 4), float("nan")), damping=0.01) is None
    assert inverse_factor(-torch.ones(4, 4) + 2 * torch.eye(4) * 0.1, damping=1e-9) is None


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 12, 256)
    return model, batches, collect_stats(model, batches, progress=False)


@pytest.mark.parametrize("budget", [1 << 30, 200_000])
def test_quantize_by_gptq_beats_nearest(tiny, budget, monkeypatch):
    """Also with a budget that makes it collect Hessians in several passes."""
    monkeypatch.setattr("smoothquant.layers.gptq.HESSIAN_BYTES", budget)
    model, batches, stats = tiny
    held_out = batches[-1]
    expected = model(held_out).logits
    errors = {}
    for rounding in ("nearest", "gptq"):
        quantized = copy.deepcopy(model)
        config = MixedQuantConfig(weight_rounding=rounding, rotation=64, group_size=64)
        records = quantize(quantized, config, stats, batches[:-1], progress=False)
        assert not any("GPTQ" in record.reason for record in records)
        errors[rounding] = float((quantized(held_out).logits - expected).detach().norm())
    assert errors["gptq"] < 0.95 * errors["nearest"]


def test_gptq_needs_tokens(tiny):
    model, _, stats = tiny
    config = MixedQuantConfig(recipe="best")
    for batches in ([], [torch.zeros(5).long()], [torch.zeros(1, 5)]):
        with pytest.raises(ValueError, match=r"batches"):
            quantize(copy.deepcopy(model), config, stats, batches)


def test_a_hopeless_hessian_falls_back_to_nearest_and_says_so(tiny, monkeypatch):
    model, batches, stats = tiny
    monkeypatch.setattr("smoothquant.layers.gptq.inverse_factor", lambda *_: None)
    quantized = copy.deepcopy(model)
    config = MixedQuantConfig(weight_rounding="gptq")
    records = quantize(quantized, config, stats, batches[:2], progress=False)
    layers = [r for r in records if r.name.startswith("model.decoder.layers")]
    reasons = {record.reason for record in layers if record.action == "quantized"}
    assert reasons == {"calibration; rounded to nearest, not by GPTQ: its Hessian is singular"}
    assert torch.isfinite(quantized(batches[0]).logits).all()
