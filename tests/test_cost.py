"""What a dry run says of memory and time, and the bound that conversion keeps to."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from programs import ROOT

from smoothquant import MixedQuantConfig
from smoothquant.convert import float_shapes
from smoothquant.cost import planned_cost
from smoothquant.inspection import planned_bytes


@pytest.mark.skipif(platform.system() != "Linux", reason="the limit counts as Linux counts")
@pytest.mark.parametrize(
    "recipe, layers, hidden, allowance", [("fast", 2, 1024, 250), ("best", 1, 1024, 340)]
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
