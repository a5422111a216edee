"""Keeps the import paths of moved modules working."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

# Old module -> modules that hold its names now, the main one first
MOVED = {
    "blocks": ("calibration.blocks",),
    "budget": ("channels.budget",),
    "checkpoint": ("checkpoints.folder", "core.tensor_files"),
    "config": ("core.config",),
    "console": ("cli.console",),
    "convert": ("checkpoints.conversion",),
    "doctor": ("cli.doctor",),
    "errors": ("core.errors",),
    "export": ("checkpoints.export",),
    "families": ("models.families",),
    "files": ("core.files",),
    "folding": ("quantization.folding",),
    "gptq": ("layers.gptq",),
    "hessian": ("calibration.hessian",),
    "hf": ("checkpoints.hf",),
    "inspection": ("checkpoints.inspection", "checkpoints.sizes"),
    "layer_report": ("evaluation.layer_report",),
    "linear": ("layers.linear", "core.tensors"),
    "manifest": ("checkpoints.manifest", "core.tensor_files", "core.tensors", "models.modules"),
    "model_card": ("checkpoints.model_card",),
    "moe": ("layers.experts", "models.routing"),
    "ops": ("kernels.ops",),
    "pipeline": ("quantization.pipeline",),
    "quantize": (
        "in_memory",
        "quantization.records",
        "quantization.undo",
        "quantization.checks",
        "quantization.engine",
        "models.modules",
    ),
    "reference": ("kernels.reference",),
    "rounding": ("layers.rounding",),
    "search": ("quantization.search",),
    "sorting": ("channels.sorting", "channels.statistics"),
    "speed": ("evaluation.speed",),
    "spill": ("core.spill",),
    "texts": ("core.texts",),
}
# Old modules with the name of a public function. As attributes of the package, these names always
# mean the function.
NAMES_OF_FUNCTIONS = ("convert", "quantize")

PACKAGE = __name__.rpartition(".")[0]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != PACKAGE or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        homes = MOVED[module.__name__.rpartition(".")[2]]
        modules = [importlib.import_module(f"{PACKAGE}.{home}") for home in homes]
        if len(modules) == 1:
            sys.modules[module.__name__] = modules[0]  # which importlib returns instead
            return
        module.__doc__ = f"Moved: see {', '.join(m.__name__ for m in modules)}."
        for moved in reversed(modules):
            names = {n: v for n, v in vars(moved).items() if not n.startswith("__")}
            vars(module).update(names)


def register() -> None:
    """Make `import smoothquant.<old module>` work."""
    sys.meta_path.append(_Finder())
