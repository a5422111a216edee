"""What a dry run says of memory and time, and the bound that conversion keeps to."""

import dataclasses
import json
import os
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
    "recipe, layers, hidden, allowance", [("fast", 2, 1024, 40), ("best", 1, 1024, 120)]
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
    # Blocks of this size would come from glibc's heap, whose holes differ by 80 MB from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # what libraries take once, of whatever size the model, is in no plan
    assert found["peak_resident_mb"] <= found["planned_peak_mb"] + 50, found
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

    whole, layers, spilled = (
        plan(fast),
        plan(fast, by_layer=True),
        plan(best, by_layer=True, spill=True),
    )
    assert whole.memory["float model"] == sum(p.nbytes for p in model.parameters())
    assert "float model" not in layers.memory
    assert layers.memory["hidden states"] == 4096 * 48 * 2
    in_memory = plan(best, by_layer=True)
    assert spilled.memory.keys() == in_memory.memory.keys() - {"Hessians", "hidden states"}
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


@pytest.mark.parametrize(
    "choices, passes, of_gptq, trials",
    [
        ({}, 1, 0, 0),
        ({"weight_rounding": "gptq"}, 3, 1, 0),
        ({"act_clip": "search"}, 2, 0, 2 + len(cost.ACT_CLIPS)),
    ],
)
def test_an_expert_counts_for_the_tokens_that_reach_it(
    choices, passes, of_gptq, trials, make_model, short_trials, monkeypatch
):
    monkeypatch.setattr(cost, "_seconds", lambda work: 1.0)  # of TRIAL^2 values, TRIAL^3 products
    model, config = make_model("mixtral"), MixedQuantConfig(group_size=16, **choices)
    routed = planned_cost(model, config, 0, 1024).seconds
    model.config.num_experts_per_tok *= 2  # all four
    spared = 0.0
    for matrix in (w for p in model.parameters() if p.ndim == 3 for w in p):
        n, k = matrix.shape
        products = passes * n * k + of_gptq * k * k + trials * n * k
        spared += 512 * (products / cost.TRIAL**3 + (of_gptq + trials) * k / cost.TRIAL**2)
    assert planned_cost(model, config, 0, 1024).seconds - routed == pytest.approx(spared)


def test_the_widest_activation_counts_once(make_model, short_trials):
    planned = planned_cost(make_model("llama"), MixedQuantConfig(group_size=16), 0, 512)
    assert planned.memory["activations of a batch"] == cost.BATCH_COPIES * 512 * 88 * 4


def test_a_trial_longer_than_its_time_counts(monkeypatch):
    clock = iter([0.0, 0.4])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert cost._seconds(lambda: None) == 0.4
