"""Control of the compiled kernels: instruction sets, CUDA's table of kernels, the build."""

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
    """Instruction sets this processor has kernels for, in rising order of preference.

    Of "scalar" (the specification, everywhere), "avx2", "avxvnni" (vpdpbusd on 256 bits),
    "avx512vnni" (on 512 bits), and on Arm "neon" (with sdot) and "neoni8mm" (with smmla).
    """
    return _C.supported_isas()


def isa() -> str:
    """The instruction set in use; the best supported one unless forced."""
    return _C.active_isa()


def set_isa(name: str) -> None:
    """Force an instruction set for all threads.

    The environment variable ``MIXEDQUANT_ISA`` does the same at import.

    Raises:
        ValueError: unknown name. RuntimeError: this processor lacks it.
    """
    _C.set_isa(name)


def build_info() -> dict[str, str]:
    """What the kernels were built with and for: "compiler", "torch", and "cuda_archs", the GPU
    architectures as nvcc names them ("75,80,..."), "" for a build without CUDA."""
    return _C.build_info()


def has_cuda() -> bool:
    """Whether the ops run on CUDA tensors here: this build has the kernels, torch an Nvidia GPU."""
    return _HAS_CUDA


def _load_cuda() -> bool:
    """Register the CUDA kernels, a library of their own beside `_C`; whether there is use for it.

    Raises:
        RuntimeError: it cannot be loaded.
    """
    archs = build_info()["cuda_archs"]
    if not (archs and torch.version.cuda and torch.cuda.is_available()):
        return False
    built = Path(_C.__file__)
    try:
        torch.ops.load_library(built.with_name(built.name.replace("_C", "_cuda", 1)))
    except OSError as error:
        raise RuntimeError(
            f"MixedQuant's CUDA kernels (for {archs}) could not be loaded; build them anew, "
            f"or without them by MIXEDQUANT_CUDA=0 ({error.__cause__ or error})"
        ) from error
    return True


_HAS_CUDA = _load_cuda()


class CudaKernel(NamedTuple):
    """A row of the table from which ``w4a4_linear`` takes its kernel on CUDA: the first that serves
    the layer on the GPU and takes so many tokens. None: no limit."""

    name: str
    oldest: int
    """Compute capability, of 7.5: 75. This one and newer ones."""
    newest: int | None
    """And this one and older ones."""
    most_tokens: int | None
    """Chosen for at most so many; forced, it takes any number."""
    group_multiple: int
    """`group_size` must be a multiple of it, unless all INT4 channels are one group."""


def cuda_kernels() -> list[CudaKernel]:
    """The kernels that multiply on CUDA, in order of preference.

    Raises:
        RuntimeError: no CUDA kernels are loaded (see :func:`has_cuda`).
    """
    names, numbers = _cuda_control("kernels")()
    limits = [None if number < 0 else number for number in numbers]
    return [CudaKernel(name, *limits[4 * i : 4 * i + 4]) for i, name in enumerate(names)]


def forced_cuda_kernel() -> str | None:
    """The kernel that is forced; None where the table chooses.

    Raises:
        RuntimeError: no CUDA kernels are loaded.
    """
    return _cuda_control("forced_kernel")()


def set_cuda_kernel(name: str | None) -> None:
    """Force a kernel of :func:`cuda_kernels` for all layers and threads; None: the table chooses.

    A layer that it cannot multiply raises ValueError when called. The environment variable
    ``MIXEDQUANT_CUDA_KERNEL`` does the same at import.

    Raises:
        ValueError: unknown name. RuntimeError: no CUDA kernels are loaded.
    """
    _cuda_control("set_kernel")(name)


def _cuda_control(name: str) -> Callable[..., Any]:
    """An op of the CUDA library that says, or sets, which kernels are used."""
    try:
        return getattr(torch.ops.mixedquant_cuda, name)
    except AttributeError:
        raise RuntimeError(
            "no CUDA kernels are loaded: no Nvidia GPU is here, or this is a build without CUDA"
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
