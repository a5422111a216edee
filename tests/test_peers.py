"""Simulations of other methods: they keep the model's function, count their bits, and pay off."""

import copy
from functools import partial

import pytest
import torch

from run_experiments import peers
from smoothquant import quantize
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration.collect import collect_stats
from smoothquant.calibration.tokens import token_blocks
from smoothquant.core.config import MixedQuantConfig
from smoothquant.evaluation.perplexity import Evaluator

# The tiny model has only 128 hidden channels: 16 outliers, where Atom has 128.
ATOM = partial(peers.atom_style, num_outliers=16)
METHODS = peers.METHODS | {"atom-style": ATOM}


@pytest.fixture(scope="module")
def tiny():
    """(model, statistics, token blocks, evaluator)."""
    model, tokenizer = load_bundled("tiny-opt")
    blocks = token_blocks(wikitext("validation"), tokenizer, 12, 256)
    evaluator = Evaluator(wikitext("test"), tokenizer, "cpu", 2, seq_len=256, progress=False)
    return model, collect_stats(model, blocks, progress=False), blocks, evaluator


def quantized(tiny, name, group_size=64):
    model = copy.deepcopy(tiny[0])
    return model, METHODS[name](model, tiny[1], tiny[2], group_size)


@pytest.fixture(scope="module")
def scores(tiny):
    """{method: (Comparison with the float model, records)}."""
    results = {}
    for name in METHODS:
        model, records = quantized(tiny, name)
        results[name] = tiny[3].compare(model, tiny[0]), records
    return results


def test_each_method_beats_plain_rounding(scores):
    plain = scores["per-token-rtn"][0]
    assert plain.kl > 1
    for name in ("smoothquant-style", "quarot-style", "atom-style"):
        score = scores[name][0]
        assert score.kl < 0.5 * plain.kl and score.perplexity < 0.5 * plain.perplexity
        assert score.top1 > plain.top1 + 0.2


def test_every_linear_is_replaced_and_recorded(tiny, scores):
    expected = {n for n, m in tiny[0].named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head"
    }
    for name, (_, records) in scores.items():
        assert {record.name for record in records} == expected
        assert all(record.action == "quantized" for record in records)
        rounding = "GPTQ" if name in ("quarot-style", "atom-style") else "nearest"
        assert {record.reason for record in records} == {rounding}
    model, _ = quantized(tiny, "per-token-rtn")
    assert {n for n, m in model.named_modules() if isinstance(m, peers.PeerLinear)} == expected


@pytest.mark.parametrize(
    "name, k, bits",
    [
        ("per-token-rtn", 128, 4 + 16 / 128),
        ("smoothquant-style", 512, 4 + 16 / 512),
        ("quarot-style", 128, 4 + 16 / 64),
        ("quarot-style", 512, 4 + 16 / 64),
        # 112 channels in two groups, 16 in INT8 with a scale
        ("atom-style", 128, (112 * 4 + 2 * 16 + 16 * 8 + 16) / 128),
        ("atom-style", 512, (496 * 4 + 8 * 16 + 16 * 8 + 16) / 512),
    ],
)
def test_bits_per_weight(scores, name, k, bits):
    (reported,) = {r.bits_per_weight for r in scores[name][1] if r.shape[1] == k}
    assert reported == pytest.approx(bits, rel=1e-12)


def test_weights_use_only_the_reported_bits(tiny):
    """The reported bits are those of the weights that compute."""
    for name, group_size in (("per-token-rtn", None), ("quarot-style", 64), ("atom-style", 64)):
        model, _ = quantized(tiny, name)
        weight = model.get_submodule("model.decoder.layers.1.fc1").weight
        k4 = 112 if name == "atom-style" else 128
        for row in weight[:20]:
            for group in row[:k4].split(group_size or 128):
                assert len(group.unique()) <= 15
            if k4 < 128:
                scale = row[k4:].abs().max() / 127
                codes = row[k4:] / scale
                assert torch.allclose(codes, codes.round(), atol=0.3)


@pytest.mark.parametrize("name", list(METHODS))
def test_without_rounding_each_method_equals_the_float_model(tiny, name, monkeypatch):
    """Rotating, reordering and smoothing keep the model's function."""
    monkeypatch.setattr(peers, "_round_act", lambda x, **_: x)
    monkeypatch.setattr(peers, "_to_grid", lambda w, **_: w)
    monkeypatch.setattr(peers, "round_to_grid", lambda w, *_: w)
    monkeypatch.setattr(peers.gptq, "gptq", lambda w, *_: w)
    model, _ = quantized(tiny, name)
    nlls, kls, same = tiny[3].token_comparison(model, tiny[0])
    assert kls.mean() < 1e-6 and same.double().mean() > 0.99
    assert torch.allclose(nlls, tiny[3].token_nlls(tiny[0]), atol=2e-3)


def test_gptq_improves_the_result(tiny, scores, monkeypatch):
    """It is calibrated on the turned and rounded inputs."""
    monkeypatch.setattr(peers.gptq, "inverse_factor", lambda *_: None)
    for name in ("quarot-style", "atom-style"):
        model, records = quantized(tiny, name)
        assert {record.reason for record in records} == {"nearest"}
        assert scores[name][0].kl < 0.9 * tiny[3].compare(model, tiny[0]).kl


@pytest.mark.parametrize("name", ["quarot-style", "atom-style"])
def test_calibration_in_several_passes(tiny, scores, name, monkeypatch):
    monkeypatch.setattr(peers.gptq, "HESSIAN_BYTES", 1_000_000)
    model, _ = quantized(tiny, name)
    # later layers see the outputs of quantized layers: different weights of about the same quality
    assert tiny[3].compare(model, tiny[0]).kl == pytest.approx(scores[name][0].kl, rel=0.3)


@pytest.mark.parametrize("k", [1, 2, 9, 64, 88, 128, 576, 1536])
def test_rotations_are_orthogonal_and_spread_every_channel(k):
    rotation = peers.random_rotation(k, seed=3)
    assert torch.allclose(rotation @ rotation.T, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rotation, peers.random_rotation(k, seed=3))
    if k > 1:
        assert not torch.equal(rotation, peers.random_rotation(k, seed=4))
    if k & (k - 1) == 0:  # a Hadamard matrix: all entries of one magnitude
        assert torch.allclose(rotation.abs(), torch.tensor(k**-0.5, dtype=torch.float64))
    else:
        assert rotation.abs().max() < 0.999 and (rotation != 0).all()


def test_outliers_are_the_channels_with_the_largest_sums_of_squares(tiny):
    model, _ = quantized(tiny, "atom-style")
    name = "model.decoder.layers.2.fc1"
    layer, energy = model.get_submodule(name), tiny[1][name].sq_sum
    order = layer.round_input.__self__.turn(torch.arange(128.0)).long()
    assert set(order[112:].tolist()) == set(energy.topk(16).indices.tolist())
    assert (energy[order].diff() >= 0).all()
    # an outlier's input has 8 bits: its error is far below that of 4 bits
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    error = (layer.round_input(x) - x[:, order]).square().mean(0)
    assert error[112:].mean() < 0.02 * error[:112].mean()


def test_short_groups_and_few_channels(make_model, token_ids):
    """K = 48 and 88 with groups of 20 or 1000; Atom's 128 outliers then cover all channels."""
    model = make_model("llama")
    stats = collect_stats(model, [token_ids], progress=False)
    for name, method in peers.METHODS.items():
        for group_size in (20, 1000):
            peer = copy.deepcopy(model)
            records = method(peer, stats, [token_ids], group_size)
            assert torch.isfinite(peer(token_ids).logits).all()
            if name == "atom-style":
                expected = {8 + 16 / k for k in (48, 88)}
                assert {record.bits_per_weight for record in records} == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models(make_model, token_ids, dtype):
    model = make_model("qwen2").to(dtype)
    stats = collect_stats(model, [token_ids], progress=False)
    for method in METHODS.values():
        peer = copy.deepcopy(model)
        method(peer, stats, [token_ids], 20)
        assert peer(token_ids).logits.dtype == dtype


def test_refusals(tiny, make_model, token_ids):
    model, stats, blocks, _ = tiny
    with pytest.raises(ValueError, match="this method needs batches"):
        peers.quarot_style(copy.deepcopy(model), stats, None, 64)
    with pytest.raises(ValueError, match="this method needs stats"):
        peers.atom_style(copy.deepcopy(model), None, blocks, 64)
    with pytest.raises(ValueError, match="stats has no entry for model.decoder.layers.0"):
        peers.atom_style(copy.deepcopy(model), {"x": None}, blocks, 64)
    already = copy.deepcopy(model)
    quantize(already, MixedQuantConfig(), progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        peers.per_token_rtn(already)
    with pytest.raises(
        ValueError, match="only mixedquant can quantize fused experts: model.layers.0.mlp.experts"
    ):
        peers.per_token_rtn(make_model("mixtral"))
