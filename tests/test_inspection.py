"""Bytes by kind: of models, of folders, and of what quantizing would make."""

import pytest
import torch

from smoothquant import CheckpointError, MixedQuantConfig, collect_stats, quantize, save_quantized
from smoothquant.checkpoints import inspection
from smoothquant.checkpoints.inspection import inspect_folder, verify_folder
from smoothquant.checkpoints.sizes import bytes_by_kind, planned_bytes
from smoothquant.layers.linear import W4A4Linear
from smoothquant.model_size import Byte, get_model_size

pytestmark = pytest.mark.usefixtures("linears_alone")


@pytest.mark.parametrize("choices", [{"salient_format": "int8"}, {"backend": "fake"}])
def test_plan_and_folder_and_model_agree(architecture, choices, make_model, tmp_path):
    model = make_model(architecture)
    config = MixedQuantConfig(group_size=20, salient_prop=0.1, **choices)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    float_size = get_model_size(model) // Byte
    assert sum(bytes_by_kind(model).values()) == float_size
    planned = planned_bytes(model, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    records = quantize(model, config, progress=False)
    assert planned == bytes_by_kind(model)
    save_quantized(model, tmp_path / "q")
    found = inspect_folder(tmp_path / "q")
    assert found["kinds"] == planned
    assert found["bytes"] * Byte == get_model_size(model)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert set(layers) == {record.name for record in records}
    for record in records:
        layer = layers[record.name]
        assert layer["shape"] == list(record.shape) and layer["action"] == record.action
        assert layer["bits_per_weight"] == pytest.approx(record.bits_per_weight)
    buffers = sum(
        tensor.nbytes
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, torch.nn.Parameter) and name.endswith("correction_bias")
    )
    assert sum(layer["bytes"] for layer in found["layers"]) + buffers == found["bytes"]
    assert verify_folder(tmp_path / "q")["bytes"] == found["bytes"]


def test_plan_of_budgets_and_searches(make_model, token_ids):
    model = make_model("llama-bias")
    stats = collect_stats(model, [token_ids], progress=False)
    config = MixedQuantConfig(
        recipe="best", bits=8, group_size=8, salient_allocation="output", calibration=["text"]
    )
    planned = planned_bytes(model, config, stats)
    quantize(model, config, stats, [token_ids], progress=False)
    assert planned == bytes_by_kind(model)
    with pytest.raises(ValueError, match="salient_allocation='output' needs statistics"):
        planned_bytes(make_model("llama-bias"), config)


def test_16_bit_folders(make_model, tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    quantize(model, MixedQuantConfig(group_size=8), progress=False)
    save_quantized(model, tmp_path / "q")
    found = inspect_folder(tmp_path / "q")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert found["dtype"] == "bfloat16" and found["bytes"] * Byte == get_model_size(model)
    assert layers["model.embed_tokens"]["bits_per_weight"] == 16
    assert layers["lm_head"]["bytes"] == 0


def test_verify_tries_the_layers(make_model, tmp_path, monkeypatch):
    model = make_model("opt")
    quantize(model, MixedQuantConfig(group_size=8), progress=False)
    save_quantized(model, tmp_path / "q")
    forward = W4A4Linear._forward
    with monkeypatch.context() as patch:
        patch.setattr(W4A4Linear, "_forward", lambda self, x: forward(self, x) * len(x))
        with pytest.raises(
            CheckpointError, match="gives a row different bits alone and in a batch"
        ):
            verify_folder(tmp_path / "q")
        patch.setattr(W4A4Linear, "_forward", lambda self, x: forward(self, x) / 0)
        with pytest.raises(CheckpointError, match="gives NaN or Inf"):
            verify_folder(tmp_path / "q")
    monkeypatch.setattr(inspection, "stored_bytes", lambda model: 1)
    with pytest.raises(CheckpointError, match="bytes, but the model has 1"):
        verify_folder(tmp_path / "q")
