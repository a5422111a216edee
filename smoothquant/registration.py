"""Registers this package with torch and transformers when they are imported.

torch gets the ops, transformers the quantization method. Neither of them discovers plug-ins, and
importing them here would take seconds. So this module watches for their import and registers right
after it, whatever the order of imports.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

# Watched module -> the module of this package that registers with it
FOLLOWERS = {
    "torch": "smoothquant.kernels.ops",
    "transformers.quantizers.auto": "smoothquant.checkpoints.hf",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the watched module, and calls `_follow` after its import."""

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                # Only now: a spec may be asked for to see whether the module is installed.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _follow(fullname)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _follow(watched: str) -> None:
    try:
        importlib.import_module(FOLLOWERS[watched])
    except Exception as error:
        # Do not break the other package's import; the first use of this package raises again.
        warnings.warn(f"smoothquant cannot register with {watched}: {error}", stacklevel=2)


def register() -> None:
    """Register with the packages that are already imported, and watch for the others.

    Calls may be repeated.
    """
    awaited = {finder.watched for finder in sys.meta_path if isinstance(finder, _Finder)}
    for watched in FOLLOWERS:
        if watched in sys.modules:
            _follow(watched)
        elif watched not in awaited:
            sys.meta_path.insert(0, _Finder(watched))
