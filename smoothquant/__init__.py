"""MixedQuant: real W4A4 quantization with 16-bit salient channels.

stats = collect_stats(model, batches)                  # one pass over calibration tokens
quantize(model, MixedQuantConfig(), stats)             # packed INT4 weights, in place
save_quantized(model, folder); model = load_quantized(folder)
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from .registration import register

if TYPE_CHECKING:
    from .public import *  # noqa: F403

__version__ = "0.1.0"
SWEEPS = PurePath(__file__).parent.with_name("run_experiments") / "__main__.py"


def load_public() -> None:
    """Make the public names attributes of the package, and register with transformers.

    That is what `import smoothquant` does, but in a process of the command line, whose --help and
    completions do not wait for torch: there each command calls it first.
    """
    from . import public

    globals().update((name, getattr(public, name)) for name in public.__all__)
    globals()["__all__"] = [*public.__all__, "__version__"]
    register()  # AutoModelForCausalLM.from_pretrained(..., quantization_config=MixedQuantConfig())


def _is_command_line() -> bool:
    """Whether this process is `smoothquant ...`, `python -m smoothquant ...` or `python -m
    run_experiments ...`."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # while Python looks for the module
        return sys.orig_argv[-len(sys.argv)] == __name__
    return PurePath(name).stem == __name__ or PurePath(name) == SWEEPS


if not _is_command_line():
    load_public()
