"""What a report of a fault needs to say about the machine and the installation.

Nothing heavy is imported before it is asked about, so that a broken installation can be asked, too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

PACKAGES = (
    "smoothquant",
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

    "fault" is there if the package does not work here, and says why.
    """
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "processor": chip_name(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "packages": {name: _version(name) for name in PACKAGES},
        "package_folder": str(Path(__file__).resolve().parent),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("MIXEDQUANT_", "OMP_", "MKL_", "CUDA_VISIBLE"))
        },
    }
    try:
        with warnings.catch_warnings():  # of kernels that do not load: "fault" will say so
            warnings.simplefilter("ignore")
            import torch

        found["threads"] = torch.get_num_threads()
        found["cuda"] = {
            "torch": torch.version.cuda,
            "devices": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        }
        from ..kernels import ops

        build = ops.build_info()
        found["kernels"] = {
            "instruction_sets": ops.supported_isas(),
            "active": ops.isa(),
            "compiler": build["compiler"],
            "built_for_torch": build["torch"],
            "cuda_architectures": build["cuda_archs"] or None,
        }
    except (ImportError, OSError, RuntimeError) as error:
        found["fault"] = f"{type(error).__name__}: {error}"
    return found


def chip_name() -> str:
    """The processor's name, as the system tells it."""
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
    except (ValueError, OSError, AttributeError):  # not every system tells
        return None
