"""Errors layer by layer, against the plainest computation."""

import copy
import math

import pytest
import torch
from torch import nn

from smoothquant import quantize
from smoothquant.calibration import collect_stats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.evaluation.layer_report import HIDDEN, LayerError, by_kind, layer_report
from smoothquant.models.families import layer_inputs


def quantized_pair(model, token_ids):
    """{"int4": ..., "fake": ...} of a model, statistics of the same tokens."""
    stats = collect_stats(model, [token_ids], progress=False)
    models = {}
    for backend in ("int4", "fake"):
        models[backend] = copy.deepcopy(model)
        config = MixedQuantConfig(group_size=20, salient_prop=0.1, backend=backend)
        quantize(models[backend], config, stats, progress=False)
    return models


def decibels(y, other):
    signal, noise = (t.detach().double().square().sum().item() for t in (y, y - other))
    return 10 * math.log10(signal / noise)


def inputs_and_outputs(model, batches):
    """{name: ([x of each batch], [y of each batch])} of the linears and decoder layers."""
    calls = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.rpartition(".")[2].isdigit():

            def hook(module, args, output, name=name):
                xs, ys = calls.setdefault(name, ([], []))
                xs.append(args[0])
                # cloned: Falcon adds to outputs in place
                ys.append((output[0] if isinstance(output, tuple) else output).clone())

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", ["opt", "llama", "falcon-new", "gpt_neox"])
def test_errors_are_those_of_the_plainest_computation(kind, make_model, token_ids):
    model = make_model(kind)
    models = quantized_pair(model, token_ids)
    batches = [token_ids, token_ids[:1, :10].flip(1)]
    report = layer_report(model, models, batches, progress=False)
    wanted = inputs_and_outputs(model, batches)
    assert {e.name for e in report if e.kind != HIDDEN} == {
        name for item in layer_inputs(model) for name in item.linears
    }
    hidden = {key: inputs_and_outputs(m, batches) for key, m in models.items()}
    for error in report:
        xs, ys = wanted[error.name]
        if error.kind == HIDDEN:
            found = {key: calls[error.name][1] for key, calls in hidden.items()}
        else:
            layers = {key: m.get_submodule(error.name) for key, m in models.items()}
            found = {key: [layer(x) for x in xs] for key, layer in layers.items()}
        y = torch.cat([y.flatten() for y in ys])
        int4, fake = (torch.cat([t.flatten() for t in found[key]]) for key in ("int4", "fake"))
        assert error.decibels["int4"] == pytest.approx(decibels(y, int4), abs=1e-3)
        assert error.decibels["fake"] == pytest.approx(decibels(y, fake), abs=1e-3)
        pair = 10 * math.log10(
            y.double().square().sum() / (int4 - fake).double().square().sum().clamp(min=1e-300)
        )
        assert error.decibels["int4 - fake"] == pytest.approx(pair, abs=0.1)
        assert 0 < error.decibels["int4"] < error.decibels["int4 - fake"]


def test_order_and_kinds(make_model, token_ids):
    model = make_model("llama")
    report = layer_report(model, quantized_pair(model, token_ids), [token_ids], progress=False)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", HIDDEN]
    assert [(e.layer, e.kind) for e in report] == [(i, kind) for i in range(2) for kind in kinds]
    assert report[7].name == "model.layers.0"


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_experts_are_measured_on_the_tokens_routed_to_them(make_model, token_ids):
    model = make_model("mixtral")
    models = quantized_pair(model, token_ids)
    report = layer_report(model, models, [token_ids, token_ids], progress=False)
    name = "model.layers.1.mlp.experts"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        model(token_ids)
    handle.remove()
    x, routed = seen[:2]
    experts, errors = model.get_submodule(name), {e.name: e for e in report}
    for expert in range(4):
        tokens = x[(routed == expert).any(1)]
        if len(tokens) == 0:
            assert f"{name}.{expert}.gate_up_proj" not in errors
            continue
        y = tokens @ experts.gate_up_proj[expert].T
        layer = models["int4"].get_submodule(f"{name}.{expert}.gate_up_proj")
        error = errors[f"{name}.{expert}.gate_up_proj"]
        assert error.layer == 1 and error.kind == "gate_up_proj"
        assert error.decibels["int4"] == pytest.approx(decibels(y, layer(tokens)), abs=1e-3)

    merged = {e.name: e for e in by_kind(report)}
    together = merged[f"{name}.*.down_proj"]
    parts = [errors[n] for e in range(4) if (n := f"{name}.{e}.down_proj") in errors]
    assert 1 < len(parts) < 4  # the tokens leave an expert idle
    assert together.signal == pytest.approx(sum(e.signal for e in parts))
    assert together.noise["fake"] == pytest.approx(sum(e.noise["fake"] for e in parts))
    assert together.layer == 1 and together.kind == "down_proj"
    assert [e.name for e in by_kind(report) if e.kind == HIDDEN] == [
        "model.layers.0",
        "model.layers.1",
    ]


def test_a_copy_has_no_error(make_model, token_ids):
    model = make_model("opt")
    report = layer_report(model, {"copy": copy.deepcopy(model)}, [token_ids], progress=False)
    assert all(e.decibels == {"copy": math.inf} and e.signal > 0 for e in report)


def test_decibels_at_the_ends():
    y = torch.full((2, 3), 2.0)
    error = LayerError("a.0.b", 0, "b")
    error.add(y, {"tenth": 0.9 * y, "zero": 0 * y, "nan": y / 0 * 0, "inf": y / 0})
    found = error.decibels
    assert found["tenth"] == pytest.approx(20) and found["zero"] == pytest.approx(0)
    assert found["inf"] == -math.inf and math.isnan(found["nan"])
    assert found["tenth - zero"] == pytest.approx(-20 * math.log10(0.9))


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_the_float_model_runs_as_before(make_model, token_ids):
    model = make_model("mixtral").train()
    before = model.eval()(token_ids).logits
    model.train()
    layer_report(model, quantized_pair(model, token_ids), [token_ids], progress=False)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.eval()(token_ids).logits, before)


def test_refusals(make_model, token_ids):
    model, other = make_model("llama"), make_model("opt")
    with pytest.raises(ValueError, match="models must contain at least one"):
        layer_report(model, {}, [token_ids])
    with pytest.raises(ValueError, match="batches must contain at least one"):
        layer_report(model, {"copy": copy.deepcopy(model)}, [])
    with pytest.raises(ValueError, match=r"models\['same'\] is the float model itself"):
        layer_report(model, {"same": model}, [token_ids])
    with pytest.raises(ValueError, match=r"models\['x'\] has no module model.layers.0.self_attn"):
        layer_report(model, {"x": other}, [token_ids])
    with pytest.raises(ValueError, match="quantized already"):
        layer_report(quantized_pair(model, token_ids)["int4"], {"float": model}, [token_ids])
