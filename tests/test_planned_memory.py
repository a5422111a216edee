"""What a dry run says of memory, and the bound that conversion keeps to."""

import dataclasses
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from programs import ROOT

from smoothquant import MixedQuantConfig, collect_stats
from smoothquant.checkpoints.conversion import float_shapes
from smoothquant.checkpoints.sizes import planned_bytes
from smoothquant.quantization.memory import BATCH_COPIES, planned_memory


@pytest.mark.skipif(platform.system() != "Linux", reason="the limit counts as Linux counts")
@pytest.mark.parametrize(
    "recipe, layers, hidden, allowance",
    [("fast", 2, 1024, 40), ("best", 1, 1024, 120)],
)
@pytest.mark.long
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


def test_plans_follow_what_is_asked_for(make_model, tmp_path):
    make_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = float_shapes(tmp_path / "m")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fast, best = (MixedQuantConfig(recipe=recipe, group_size=16) for recipe in ("fast", "best"))

    def plan(config, tokens=4096, **how):
        return planned_memory(
            model, config, sum(planned_bytes(model, config).values()), tokens, **how
        )

    whole, layers, spilled = (
        plan(fast),
        plan(fast, by_layer=True),
        plan(best, by_layer=True, spill=True),
    )
    assert whole["float model"] == sum(p.nbytes for p in model.parameters())
    assert "float model" not in layers
    assert layers["hidden states"] == 4096 * 48 * 2
    in_memory = plan(best, by_layer=True)
    assert spilled.keys() == in_memory.keys() - {"Hessians", "hidden states"}
    assert "Hessians" in plan(best) and "Hessians" not in whole
    assert plan(fast, 0).keys() == {"float model", "weights being packed"}


@pytest.mark.parametrize(
    "choices",
    [
        {"backend": "fake", "num_bits": 8, "act_clip": "search", "act_format": "symmetric"},
        {"backend": "fake", "act_quant": "per_tensor", "act_clip": "search"},
        {"rotation": 0, "act_format": "unsigned", "act_clip": "search"},
    ],
)
def test_searches_are_planned_whatever_else_is_chosen(choices, make_model):
    config = MixedQuantConfig(group_size=16, **choices)
    assert planned_memory(make_model("llama"), config, 0, 512)


def test_smoothing_is_planned_with_statistics(make_model, token_ids):
    model = make_model("llama-bias")
    stats = collect_stats(model, [token_ids], progress=False)
    search = MixedQuantConfig(group_size=16, smooth_alpha="search")
    with pytest.raises(ValueError, match="smooth_alpha needs statistics"):
        planned_memory(model, search, 0)
    planned = planned_memory(model, search, 0, 512, stats)
    assert planned == planned_memory(model, search, 0, 512)
    assert planned["weights being packed"] == 12 * 48 * 2 * 88  # gate and up
    assert "smoothed weights" not in planned
    by_layer = planned_memory(model, search, 0, 512, stats, by_layer=True)
    assert by_layer["smoothed weights"] == 4 * 48 * (48 + 2 * 24 + 2 * 88)


@pytest.mark.parametrize("with_stats", [False, True])
def test_competing_shares_are_planned_without_weights(with_stats, make_model, token_ids, tmp_path):
    model = make_model("llama")
    stats = collect_stats(model, [token_ids], progress=False) if with_stats else None
    model.save_pretrained(tmp_path / "m")
    shapes = float_shapes(tmp_path / "m")
    config = MixedQuantConfig(group_size=16, salient_allocation="output", salient_prop=0.25)
    with pytest.raises(ValueError, match="needs statistics"):
        planned_bytes(model, config)
    uniform = planned_bytes(model, dataclasses.replace(config, salient_allocation="uniform"))
    assert planned_bytes(shapes, config, stats, stats_to_come=True) == uniform


def test_the_widest_activation_counts_once(make_model):
    planned = planned_memory(make_model("llama"), MixedQuantConfig(group_size=16), 0, 512)
    assert planned["activations of a batch"] == BATCH_COPIES * 512 * 88 * 4
