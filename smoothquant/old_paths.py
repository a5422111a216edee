"""Keeps the import paths of moved modules working."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

# Old module -> modules that define its public names now
MOVED = {
    "checkpoint": ("checkpoints.folder", "core.tensor_files"),
    "config": ("core.config",),
    "convert": ("checkpoints.conversion",),
    "doctor": ("cli.doctor",),
    "errors": ("core.errors",),
    "export": ("checkpoints.export",),
    "families": ("models.families",),
    "folding": ("quantization.folding",),
    "gptq": ("layers.gptq",),
    "hf": ("checkpoints.hf",),
    "inspection": ("checkpoints.inspection", "checkpoints.sizes"),
    "layer_report": ("evaluation.layer_report",),
    "linear": ("layers.linear",),
    "manifest": ("checkpoints.manifest",),
    "model_card": ("checkpoints.model_card",),
    "moe": ("layers.experts", "models.routing"),
    "ops": ("kernels.ops", "kernels.control", "kernels.layout"),
    "quantize": ("in_memory", "quantization.records", "quantization.undo", "models.modules"),
    "reference": ("kernels.reference",),
    "sorting": ("channels.sorting", "channels.statistics"),
    "speed": ("evaluation.speed",),
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
        module.__doc__ = f"Moved: see {', '.join(f'{PACKAGE}.{home}' for home in homes)}."

        def find(name: str) -> object:
            if not name.startswith("__"):
                for home in homes:
                    module_now = importlib.import_module(f"{PACKAGE}.{home}")
                    if hasattr(module_now, name):
                        return getattr(module_now, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def register() -> None:
    """Make `import smoothquant.<old module>` work."""
    sys.meta_path.append(_Finder())
