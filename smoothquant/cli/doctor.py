"""The environment report of `smoothquant doctor`.

It must also work where torch or our kernels fail to load. That rules out torch.utils.collect_env
for the whole report; only what needs torch anyway comes from there.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from ..core.version import DISTRIBUTION, __version__
from ..serving.launch import vllm_state

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "typer",
    "accelerate",
    "gguf",
    "peft",
)


def environment() -> dict[str, Any]:
    """Versions, processor, kernels and CUDA, as plain JSON values.

    If the package does not work here, "fault" says why.
    """
    report: dict[str, Any] = {
        "platform": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "processor": chip_name(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "packages": {DISTRIBUTION: __version__} | {name: _version(name) for name in PACKAGES},
        "package_folder": str(Path(__file__).resolve().parents[1]),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("MIXEDQUANT_", "OMP_", "MKL_", "CUDA_VISIBLE", "VLLM_"))
        },
        "vllm": vllm_state(),
    }
    try:
        with warnings.catch_warnings():  # kernels that do not load are reported as a fault below
            warnings.simplefilter("ignore")
            import torch
            from torch.utils import collect_env

        report["threads"] = torch.get_num_threads()
        report["cuda"] = {
            "torch": torch.version.cuda,
            "driver": collect_env.get_nvidia_driver_version(collect_env.run),
            "toolkit": collect_env.get_running_cuda_version(collect_env.run),
            "devices": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        }
        from ..kernels import ops

        build = ops.build_info()
        report["kernels"] = {
            "instruction_sets": ops.supported_isas(),
            "active": ops.isa(),
            "compiler": build["compiler"],
            "built_for_torch": build["torch"],
            "cuda_architectures": build["cuda_archs"] or None,
        }
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        report["fault"] = f"{type(error).__name__}: {error}"
    return report


def chip_name() -> str:
    """The processor's name as the operating system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not on every system
        return None
