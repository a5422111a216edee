"""Control of the compiled kernels: instruction sets, the table of CUDA kernels, build info."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    from .. import _C
except ImportError as error:
    raise RuntimeError(
        "MixedQuant's compiled kernels could not be loaded; build them with "
        f"'pip install --no-build-isolation .' for this Python and PyTorch >= 2.10 ({error})"
    ) from error


def supported_isas() -> list[str]:
    """Instruction sets that this processor supports and kernels exist for, best one last.

    The names are "scalar" (the specification, available everywhere), "avx2", "avxvnni" (vpdpbusd on
    256 bits), "avx512vnni" (vpdpbusd on 512 bits) and, on Arm, "neon" (with sdot) and "neoni8mm"
    (with smmla).
    """
    return _C.supported_isas()


def isa() -> str:
    """The instruction set in use: the best supported one, unless another is forced."""
    return _C.active_isa()


def set_isa(name: str) -> None:
    """Force an instruction set for all threads. Calls already running keep theirs.

    The environment variable ``MIXEDQUANT_ISA`` does the same at import.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: this processor does not support it.
    """
    _C.set_isa(name)


def build_info() -> dict[str, str]:
    """How the kernels were built.

    Returns:
        "compiler" and "torch" (versions), and "cuda_archs": GPU architectures in nvcc's notation
        ("75,80,..."), or "" for a build without CUDA.
    """
    return _C.build_info()


def has_cuda() -> bool:
    """Whether the ops accept CUDA tensors: this build has the kernels and torch sees a GPU."""
    return _HAS_CUDA


def _load_cuda() -> bool:
    """Load the library of CUDA kernels, a separate file next to `_C`, which registers them.

    Returns:
        False, without loading, if the build has no CUDA kernels or torch sees no Nvidia GPU.

    Raises:
        RuntimeError: the library cannot be loaded.
    """
    archs = build_info()["cuda_archs"]
    if not (archs and torch.version.cuda and torch.cuda.is_available()):
        return False
    built = Path(_C.__file__)
    try:
        torch.ops.load_library(built.with_name(built.name.replace("_C", "_cuda", 1)))
    except OSError as error:
        raise RuntimeError(
            f"MixedQuant's CUDA kernels (for {archs}) could not be loaded; rebuild them, or build "
            f"without CUDA by setting MIXEDQUANT_CUDA=0 ({error.__cause__ or error})"
        ) from error
    return True


_HAS_CUDA = _load_cuda()


class CudaKernel(NamedTuple):
    """A row of the table from which ``w4a4_linear`` chooses its CUDA kernel: the first one that
    fits the GPU, the layer and the number of tokens. A limit of None is no limit."""

    name: str
    oldest: int
    """Lowest compute capability, times ten: 75 for 7.5."""
    newest: int | None
    """Highest compute capability, times ten."""
    most_tokens: int | None
    """Largest number of tokens it is chosen for. A forced kernel takes any number."""
    group_multiple: int
    """`group_size` must be a multiple of this, unless all INT4 channels form one group."""
    most_act_bits: int
    """The largest number of activation bits it multiplies."""


def cuda_kernels() -> list[CudaKernel]:
    """The CUDA kernels of ``w4a4_linear``, in order of preference.

    Raises:
        RuntimeError: no CUDA kernels are loaded (see :func:`has_cuda`).
    """
    names, numbers = _cuda_control("kernels")()
    limits: list[Any] = [None if number < 0 else number for number in numbers]
    return [CudaKernel(name, *limits[5 * i : 5 * i + 5]) for i, name in enumerate(names)]


def forced_cuda_kernel() -> str | None:
    """The name of the forced kernel; None if the table chooses.

    Raises:
        RuntimeError: no CUDA kernels are loaded.
    """
    return _cuda_control("forced_kernel")()


def set_cuda_kernel(name: str | None) -> None:
    """Force one of :func:`cuda_kernels` for all layers and threads; None lets the table choose.

    A layer that the kernel does not support raises ValueError when called. The environment variable
    ``MIXEDQUANT_CUDA_KERNEL`` does the same at import.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: no CUDA kernels are loaded.
    """
    _cuda_control("set_kernel")(name)


def _cuda_control(name: str) -> Callable[..., Any]:
    """An op of the CUDA library that reads or sets the choice of kernels."""
    try:
        return getattr(torch.ops.mixedquant_cuda, name)
    except AttributeError:
        raise RuntimeError(
            "no CUDA kernels are loaded: torch sees no Nvidia GPU, or the build is without CUDA"
        ) from None


for _variable, _force in (
    ("MIXEDQUANT_ISA", set_isa),
    ("MIXEDQUANT_CUDA_KERNEL", set_cuda_kernel),
):
    if os.environ.get(_variable):
        try:
            _force(os.environ[_variable])
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"environment variable {_variable}: {error}") from error
