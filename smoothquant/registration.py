"""What other packages learn from this one as soon as they are imported.

torch gets the ops and transformers the quantization method. Neither looks for plug-ins, and
importing them takes seconds, so their imports are watched instead: in whichever order the packages
are imported, the registration follows, and none is imported for it.
"""

import importlib
import importlib.abc
import sys
import warnings

# Imported module -> ours that registers with it
FOLLOWERS = {
    "torch": "smoothquant.kernels.ops",
    "transformers.quantizers.auto": "smoothquant.checkpoints.hf",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves finding a watched module to the other finders, and follows its import."""

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                # Only now: a spec may be asked for to see whether the module is installed.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _follow(fullname)

            spec.loader.exec_module = exec_module
        return spec


def _follow(watched: str) -> None:
    try:
        importlib.import_module(FOLLOWERS[watched])
    except (ImportError, OSError, RuntimeError) as error:
        # It must not break the import of another package; the first use of ours raises it again.
        warnings.warn(f"smoothquant cannot register with {watched}: {error}", stacklevel=2)


def register() -> None:
    """Register with what is imported already, and watch for the rest; calls may be repeated."""
    awaited = {finder.watched for finder in sys.meta_path if isinstance(finder, _Finder)}
    for watched in FOLLOWERS:
        if watched in sys.modules:
            _follow(watched)
        elif watched not in awaited:
            sys.meta_path.insert(0, _Finder(watched))
