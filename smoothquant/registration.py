"""transformers learns of the method when both are imported, in whichever order, and neither
imports the other for it: transformers looks for no entry points, and its import takes seconds."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys

WATCHED = "transformers.quantizers.auto"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds WATCHED as everyone else does, and has `smoothquant.hf` imported after it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    importlib.import_module("smoothquant.hf")


def register() -> None:
    """Now, if transformers is there, else as soon as it is; any number of calls is as one."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
