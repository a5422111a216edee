"""What a dry run says of memory and time, and the bound that conversion keeps to."""

import dataclasses
import json
import platform
import subprocess
import sys

import pytest
import torch
from programs import ROOT

from smoothquant import MixedQuantConfig, collect_stats, cost
from smoothquant.convert import float_shapes
from smoothquant.cost import planned_cost
from smoothquant.inspection import planned_bytes


@pytest.mark.skipif(platform.system() != "Linux", reason="the limit counts as Linux counts")
@pytest.mark.parametrize(
    "recipe, layers, hidden, allowance", [("fast", 2, 1024, 250), ("best", 1, 1024, 400)]
)
def test_conversion_keeps_to_its_bound_and_its_plan(recipe, layers, hidden, allowance):
    command = [sys.executable, ROOT / "benchmarks" / "convert.py", "--recipe", recipe]
    command += [
        "--layers",
        layers,
        "--hidden",
        hidden,
        "--intermediate",
        3 * hidden,
        "--vocab",
        2000,
    ]
    command += ["--tokens", 1024, "--allowance", allowance]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # what the allocator keeps and libraries take once, of whatever size the model, is in no plan
    assert found["peak_resident_mb"] <= found["planned_peak_mb"] + 250, found
    assert found["planned_peak_mb"] <= 2 * found["peak_resident_mb"] + 50, found
    assert found["planned_seconds"] > 0


def test_plans_follow_what_is_asked_for(make_model, tmp_path):
    make_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = float_shapes(tmp_path / "m")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fast, best = (MixedQuantConfig(recipe=recipe, group_size=16) for recipe in ("fast", "best"))

    def plan(config, tokens=4096, **how):
        return planned_cost(
            model, config, sum(planned_bytes(model, config).values()), tokens, **how
        )

    whole, layers, spilled = plan(fast), plan(fast, by_layer=True), plan(best, spill=True)
    assert whole.memory["float model"] == sum(p.nbytes for p in model.parameters())
    assert "float model" not in layers.memory and "hidden states" not in spilled.memory
    assert layers.memory["hidden states"] == 4096 * 48 * 2
    assert "Hessians" in plan(best).memory and "Hessians" not in whole.memory
    assert plan(fast, 0).memory.keys() == {"float model", "weights at work"}
    assert plan(best, 2**24).seconds > plan(best, 2**12).seconds


@pytest.fixture
def short_trials(monkeypatch):
    monkeypatch.setattr(cost, "TRIAL", 64)
    monkeypatch.setattr(cost, "TRIAL_SECONDS", 0.001)


@pytest.mark.parametrize(
    "choices",
    [
        {"backend": "fake", "num_bits": 8, "act_clip": "search", "act_format": "symmetric"},
        {"backend": "fake", "act_quant": "per_tensor", "act_clip": "search"},
        {"rotation": 0, "act_format": "unsigned", "act_clip": "search"},
    ],
)
def test_searches_are_planned_whatever_else_is_chosen(choices, make_model, short_trials):
    config = MixedQuantConfig(group_size=16, **choices)
    assert planned_cost(make_model("llama"), config, 0, 512).seconds > 0


def test_smoothing_is_planned_with_statistics(make_model, token_ids, short_trials):
    model = make_model("llama-bias")
    stats = collect_stats(model, [token_ids], progress=False)
    search = MixedQuantConfig(group_size=16, smooth_alpha="search")
    with pytest.raises(ValueError, match="smooth_alpha needs stats"):
        planned_cost(model, search, 0)
    planned = planned_cost(model, search, 0, 512, stats)
    assert planned.memory == planned_cost(model, search, 0, 512).memory
    assert planned.memory["weights at work"] == 12 * 48 * 2 * 88  # gate and up
    assert "smoothed weights" not in planned.memory
    by_layer = planned_cost(model, search, 0, 512, stats, by_layer=True)
    assert by_layer.memory["smoothed weights"] == 4 * 48 * (48 + 2 * 24 + 2 * 88)


@pytest.mark.parametrize("with_stats", [False, True])
def test_competing_shares_are_planned_without_weights(with_stats, make_model, token_ids, tmp_path):
    model = make_model("llama")
    stats = collect_stats(model, [token_ids], progress=False) if with_stats else None
    model.save_pretrained(tmp_path / "m")
    shapes = float_shapes(tmp_path / "m")
    config = MixedQuantConfig(group_size=16, salient_allocation="output", salient_prop=0.25)
    with pytest.raises(ValueError, match="needs stats"):
        planned_bytes(model, config)
    uniform = planned_bytes(model, dataclasses.replace(config, salient_allocation="uniform"))
    assert planned_bytes(shapes, config, stats, stats_to_come=True) == uniform


def test_an_expert_counts_for_the_tokens_that_reach_it(make_model, short_trials, monkeypatch):
    monkeypatch.setattr(cost, "_seconds", lambda work: 1.0)
    model, config = make_model("mixtral"), MixedQuantConfig(group_size=16)
    routed = [planned_cost(model, config, 0, tokens).seconds for tokens in (1024, 2048)]
    model.config.num_experts_per_tok = model.config.num_local_experts
    dense = [planned_cost(model, config, 0, tokens).seconds for tokens in (1024, 2048)]
    weights = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    spared = [all_experts - some for all_experts, some in zip(dense, routed, strict=True)]
    half = [tokens * weights / 2 / cost.TRIAL**3 for tokens in (1024, 2048)]
    assert spared == pytest.approx(half, rel=0.01)


def test_the_widest_activation_counts_once(make_model, short_trials):
    planned = planned_cost(make_model("llama"), MixedQuantConfig(group_size=16), 0, 512)
    assert planned.memory["activations of a batch"] == cost.BATCH_COPIES * 512 * 88 * 4


def test_a_trial_longer_than_its_time_counts(monkeypatch):
    clock = iter([0.0, 0.4])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert cost._seconds(lambda: None) == 0.4
