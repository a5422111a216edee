"""MixedQuant: real W4A4 quantization with 16-bit salient channels.

quantize(model, MixedQuantConfig())                    # packed INT4 weights, in place
save_quantized(model, folder); model = load_quantized(folder)

`import smoothquant` is fast: public names and submodules are imported on first use. The ops
``torch.ops.mixedquant`` and transformers' quantization method are registered as soon as torch or
transformers is imported, whichever import comes first.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

from . import old_paths, registration
from .core.version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> object:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `from . import public` would call this function again.
    public = importlib.import_module(f"{__name__}.public")
    if name == "__all__":
        return [*public.__all__, "__version__"]
    if name in public.__all__:
        value = globals()[name] = getattr(public, name)
        return value
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    public = importlib.import_module(f"{__name__}.public")
    return sorted({*globals(), *public.__all__})


class _Package(types.ModuleType):
    """Keeps `smoothquant.quantize` a function after an import of the old module of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        is_old_module = isinstance(value, types.ModuleType) and name in old_paths.NAMES_OF_FUNCTIONS
        if not is_old_module:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
old_paths.register()
registration.register()
