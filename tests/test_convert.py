"""Conversion from folder to folder: what quantize gives, whatever stops it on the way."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from length import at_length
from safetensors.torch import load_file, save_file
from spoil import edit, set_tensor

from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    collect_stats,
    convert,
    load_quantized,
    quantize,
)
from smoothquant.checkpoints import conversion
from smoothquant.core import spill
from smoothquant.core.tensor_files import CONFIG, INDEX, TENSORS, Mapped
from smoothquant.quantization.engine import Plan

SHARE = {"group_size": 16, "salient_prop": 0.1}
CONFIGS = {
    "weights alone": SHARE,
    "smoothed": {"group_size": 16, "smooth_alpha": 0.5},
    "allocated": {**SHARE, "salient_allocation": "output"},
    "gptq": {**SHARE, "weight_rounding": "gptq", "act_format": "auto"},
    "best": {**SHARE, "recipe": "best"},
}


@pytest.fixture
def source(make_model, tmp_path):
    def save(architecture="llama-bias", **kwargs):
        folder = tmp_path / f"source-{architecture}"
        make_model(architecture).save_pretrained(folder, **kwargs)
        return folder

    return save


def batches_of(count=6, length=24):
    torch.manual_seed(1)
    return [torch.randint(3, 96, (1, length)) for _ in range(count)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize(
    "architecture, name",
    [("llama-bias", name) for name in CONFIGS]
    + [(of, "gptq") for of in ("opt", "llama", "mixtral", "qwen2_moe", "qwen3_moe")],
)
def test_converted_is_quantized(architecture, name, source, make_model, token_ids, tmp_path):
    config = MixedQuantConfig(**CONFIGS[name])
    batches = None if name == "weights alone" else batches_of()
    model = make_model(architecture)
    stats = None if batches is None else collect_stats(model, batches, progress=False)
    expected = quantize(model, config, stats, batches, progress=False)
    target = tmp_path / "target"
    records = convert(source(architecture), target, config, batches=batches, progress=False)
    assert [vars(record) for record in records] == [vars(record) for record in expected]
    loaded = load_quantized(target)
    wanted, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_and_dtypes_are_kept(source, make_model, tmp_path):
    folder = source("llama-bias", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    for path in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path, {"format": "pt"})
    convert(folder, tmp_path / "target", MixedQuantConfig(group_size=16), progress=False)
    model = make_model("llama-bias").bfloat16()
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    loaded = load_quantized(tmp_path / "target")
    assert loaded.dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    places = json.loads((tmp_path / "target" / INDEX).read_text())["weight_map"]
    # a file for each layer, one for the rest
    assert len(set(places.values())) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "float8_e5m2", "int8", "complex64"])
def test_odd_dtypes_are_named_if_the_model_needs_them(dtype, source, tmp_path):
    folder, config, odd = source("opt"), MixedQuantConfig(group_size=16), getattr(torch, dtype)
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "unused": torch.ones(2).to(odd)}, folder / TENSORS, {"format": "pt"})
    convert(folder, tmp_path / "target", config, progress=False)
    load_quantized(tmp_path / "target")
    for name in ("model.decoder.layers.0.fc1.weight", "model.decoder.final_layer_norm.weight"):
        odd_one = {**tensors, name: tensors[name].to(odd)}
        save_file(odd_one, folder / TENSORS, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"tensor {name} must be float32, .*save a float"):
            convert(folder, tmp_path / "other", config, progress=False)
    assert not (tmp_path / "other").exists()


def test_what_is_spilled_is_what_would_be_in_memory(source, tmp_path, monkeypatch):
    config, folder = MixedQuantConfig(**CONFIGS["best"]), source()
    convert(folder, tmp_path / "in memory", config, batches=batches_of(), progress=False)
    shapes, original = [], spill.scratch

    def scratch(shape, dtype, folder):
        tensor = original(shape, dtype, folder)
        shapes.append((len(shape), dtype))
        assert folder.name == "spilled" and not any(folder.iterdir())
        return tensor

    for module in ("calibration.blocks", "layers.gptq", "calibration.hessian"):
        monkeypatch.setattr(f"smoothquant.{module}.scratch", scratch)
    convert(folder, tmp_path / "q", config, batches=batches_of(), spill=True, progress=False)
    assert Counter(shapes) == {
        (3, torch.float32): 2 * 2 * 6,  # for statistics and for packing: batches before two layers
        (2, torch.float32): 2 * 4,  # Hessians of a layer's four inputs
        (2, torch.float64): 2 * 4,  # as they are taken apart
        (1, torch.float64): 2 * 4,  # what is made of them
    }
    assert contents(tmp_path / "q") == contents(tmp_path / "in memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in memory", "q", folder.name]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no room is reserved here")
def test_a_full_disk_is_an_error_before_anything_is_spilled(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device for 64 bytes: .*/s'"):
        spill.scratch((4, 4), torch.float32, tmp_path / "s")
    assert not any((tmp_path / "s").iterdir())


@pytest.mark.parametrize("name", ["smoothed", "gptq"])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(name, source, tmp_path, monkeypatch):
    config, folder = MixedQuantConfig(**CONFIGS[name]), source()
    convert(folder, tmp_path / "undisturbed", config, batches=batches_of(), progress=False)
    work, target = tmp_path / ".target.partial", tmp_path / "target"
    written, original = [], conversion.write_tensors

    def stop(tensors, path):
        if len(written) == stopping:
            raise KeyboardInterrupt
        original(tensors, path)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_tensors", stop)
        for stopping in range(3):  # in the first layer, the second, what is in none
            with pytest.raises(KeyboardInterrupt):
                convert(folder, target, config, batches=batches_of(), progress=False)
            assert not target.exists()
            assert len(list((work / "folder").iterdir())) == stopping
    (work / "folder" / ".model.safetensors.0.tmp").write_bytes(b"half")  # of a killed writer
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "pack", None)  # nothing is left to pack
        convert(folder, target, config, batches=batches_of(), progress=False)
    assert contents(target) == contents(tmp_path / "undisturbed")


def test_another_conversion_starts_anew(source, tmp_path, monkeypatch, caplog):
    folder, target = source(), tmp_path / "target"
    for group_size in (8, 16):
        with monkeypatch.context() as patch:
            patch.setattr(conversion._Conversion, "write_rest", None)
            with pytest.raises(TypeError):
                convert(folder, target, MixedQuantConfig(group_size=group_size), progress=False)
    assert "starting over" in caplog.text
    convert(folder, target, MixedQuantConfig(group_size=16), progress=False)
    assert "resuming the conversion" in caplog.text
    assert load_quantized(target).mixedquant_config.group_size == 16


def test_a_changed_config_of_the_source_starts_anew(source, tmp_path, monkeypatch, caplog):
    folder, target = source("llama-bias"), tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(conversion._Conversion, "write_rest", None)
        with pytest.raises(TypeError):
            convert(folder, target, MixedQuantConfig(group_size=16), progress=False)
    edit(CONFIG, "rms_norm_eps", value=0.5)(folder)
    convert(folder, target, MixedQuantConfig(group_size=16), progress=False)
    assert "starting over" in caplog.text


KILLED = """
import sys, torch
from smoothquant import MixedQuantConfig, convert
torch.manual_seed(1)
batches = [torch.randint(3, 96, (1, 24)) for _ in range(6)]
config = MixedQuantConfig(
    group_size=16, salient_prop=0.1, weight_rounding="gptq", act_format="auto"
)
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], config, batches=batches, progress=False)
"""


def test_killed_conversions_come_to_the_same_bytes(source, tmp_path):
    folder, target, rng = source(), tmp_path / "target", random.Random(0)
    config = MixedQuantConfig(**CONFIGS["gptq"])
    convert(folder, tmp_path / "undisturbed", config, batches=batches_of(), progress=False)
    command = [sys.executable, "-c", KILLED, str(folder), str(target)]
    for _ in range(at_length(3, 1)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.5 * rng.random())
            os.kill(child.pid, signal.SIGKILL)
        if target.exists():
            break
        load = tmp_path / ".target.partial" / "folder"
        for path in load.glob("model-*.safetensors") if load.exists() else ():
            load_file(path)  # what is there is whole
    if not target.exists():
        subprocess.run(command, check=True, capture_output=True)
    assert contents(target) == contents(tmp_path / "undisturbed")


def test_statistics_by_layer_are_those_by_batch(architecture, make_model):
    model = make_model(architecture)
    by_batch = collect_stats(model, batches_of(), progress=False)
    by_layer = collect_stats(model, batches_of(), by_layer=True, progress=False)
    assert set(by_layer) == set(by_batch)
    for name, entry in by_batch.items():
        for field, tensor in entry.to_dict().items():
            assert torch.equal(by_layer[name].to_dict()[field], tensor), (name, field)


def test_targets_are_not_lost(source, tmp_path):
    folder, target = source(), tmp_path / "target"
    config = MixedQuantConfig(group_size=16)
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(ValueError, match="folder already exists"):
        convert(folder, target, config, progress=False)
    assert (target / "mine").read_text() == "mine"
    (target / "mine").unlink()
    convert(folder, target, config, progress=False)
    with pytest.raises(ValueError, match="folder already exists"):
        convert(folder, target, config, progress=False)
    convert(folder, target, MixedQuantConfig(group_size=8), overwrite=True, progress=False)
    assert load_quantized(target).mixedquant_config.group_size == 8


def test_one_conversion_at_a_time_writes_a_target(source, tmp_path, monkeypatch):
    folder, target, config = source(), tmp_path / "target", MixedQuantConfig(group_size=16)
    publish = conversion.publish_folder

    def second(*args, **kwargs):
        with pytest.raises(RuntimeError, match=r"another conversion into .*/target is running"):
            convert(folder, target, MixedQuantConfig(group_size=8), progress=False)
        publish(*args, **kwargs)

    monkeypatch.setattr(conversion, "publish_folder", second)
    convert(folder, target, config, progress=False)
    assert load_quantized(target).mixedquant_config.group_size == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "target"]


def test_a_target_that_is_taken_meanwhile_is_refused_as_usual(source, tmp_path, monkeypatch):
    folder, target, config = source(), tmp_path / "target", MixedQuantConfig(group_size=16)
    publish = conversion.publish_folder

    def taken(*args, **kwargs):
        target.mkdir()
        (target / "mine").write_text("mine")
        publish(*args, **kwargs)

    monkeypatch.setattr(conversion, "publish_folder", taken)
    with pytest.raises(ValueError, match="folder already exists"):
        convert(folder, target, config, progress=False)
    assert contents(target) == {"mine": b"mine"}


def test_an_overwritten_model_is_not_resumed_from(source, tmp_path, monkeypatch):
    folder, target = source(), tmp_path / "target"
    configs = [MixedQuantConfig(group_size=size) for size in (8, 16)]
    for config in configs:
        convert(folder, tmp_path / f"{config.group_size}", config, progress=False)
    convert(folder, target, configs[0], progress=False)
    publish = conversion.publish_folder

    def interrupted(*args, **kwargs):
        publish(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "publish_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, target, configs[1], overwrite=True, progress=False)
    assert contents(target) == contents(tmp_path / "16")
    convert(folder, target, configs[1], overwrite=True, progress=False)
    assert contents(target) == contents(tmp_path / "16")


def test_bad_sources_are_named(source, tmp_path):
    config, target = MixedQuantConfig(group_size=16), tmp_path / "target"
    with pytest.raises(ValueError, match="source must be a model folder .*nothing"):
        convert(tmp_path / "nothing", target, config)
    with pytest.raises(TypeError, match="config must be a MixedQuantConfig; got int"):
        convert(source(), target, 4)
    with pytest.raises(ValueError, match="needs calibration tokens, but the tokenizer"):
        convert(source(), target, MixedQuantConfig(weight_rounding="gptq"))
    folder = source("mixtral")
    for change, message in (
        (lambda t: None, r"experts.down_proj must have shape \(4, 48, 88\); got \(3, 48, 88\)"),
        (lambda t: t[1:].contiguous(), "cannot build .*experts.down_proj"),
    ):
        set_tensor("model.layers.1.block_sparse_moe.experts.2.w2.weight", change)(folder)
        with pytest.raises(CheckpointError, match=message):
            convert(folder, target, config, progress=False)
        folder = source("mixtral")
    folder = source("opt")
    convert(folder, tmp_path / "quantized", config, progress=False)
    with pytest.raises(ValueError, match="must hold a float model"):
        convert(tmp_path / "quantized", target, config)
    tensors = load_file(folder / TENSORS)
    name = "model.decoder.layers.0.fc1.weight"
    save_file({**tensors, name: torch.zeros(3, 4)}, folder / TENSORS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} must have shape \(88, 48\); got \(3, 4\)"):
        convert(folder, target, config)
    save_file({**tensors, name: torch.full((88, 48), torch.nan)}, folder / TENSORS)
    with pytest.raises(ValueError, match="weight of model.decoder.layers.0.fc1 holds NaN"):
        convert(folder, target, config, progress=False)
    norm = "model.decoder.layers.0.self_attn_layer_norm.weight"
    save_file({**tensors, norm: torch.full((48,), torch.nan)}, folder / TENSORS)
    with pytest.raises(ValueError, match=f"parameter {norm} holds NaN"):  # of no statistics
        convert(folder, target, config, batches=[torch.ones(1, 8).long()], progress=False)
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=TENSORS):
        convert(folder, target, config)
    assert not target.exists() and not (tmp_path / ".target.partial").exists()


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.zeros(0, 2)}
    tensors["d"] = torch.arange(7, dtype=torch.uint8)
    save_file(tensors, tmp_path / "t.safetensors")
    mapped = Mapped()
    found = mapped.read(tmp_path / "t.safetensors", tensors)
    mapped.release()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
