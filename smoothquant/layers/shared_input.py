"""Quantizing an input once for all layers that read it: q, k and v; gate and up."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops

MIN_TOKENS = 16  # quantizing so few again takes less time than the checks below


@dataclasses.dataclass
class _Input:
    version: int
    perm: Tensor
    choices: tuple[Any, ...]
    readers: set[int] = dataclasses.field(default_factory=set)  # ids of the layers served
    x: Callable[[], Tensor | None] = lambda: None
    quantized: Tensor | None = None

    def serves(self, reader: int, x: Tensor, perm: Tensor, choices: tuple[Any, ...]) -> bool:
        return (
            self.version == x._version
            and self.x() is x
            and self.quantized is not None
            and self.choices == choices
            # A layer that runs twice may see new values in x that torch's version counter missed.
            and reader not in self.readers
            and torch.equal(self.perm, perm)
        )

    def forget(self, _: Any = None) -> None:
        self.quantized = None


class _Last(threading.local):
    input: _Input | None = None


_last = _Last()


def shared_input(
    reader: Any, quantize: Callable[..., Tensor], x: Tensor, perm: Tensor, *choices: Any
) -> Tensor | None:
    """`quantize(x, perm, *choices)`, or the cached result of this thread's last call.

    The cache is used if that call was for another layer and the same, unchanged x. It is freed
    together with x.

    Args:
        reader: the layer that reads x.

    Returns:
        The quantized input; None if caching would not pay off or changes of x cannot be detected:
        few tokens, torch.compile, tensors not on the CPU or created in inference mode (these have
        no version counter).
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.numel() <= MIN_TOKENS * perm.numel()
        or x.is_inference()
        or not x.is_cpu
    ):
        return None
    key = (quantize, *choices, ops.isa())
    last = _last.input
    if last is None or not last.serves(id(reader), x, perm, key):
        if last is not None:
            last.forget()  # free the memory now, not at the next garbage collection
        last = _last.input = _Input(x._version, perm, key)
        last.x = weakref.ref(x, last.forget)
        last.quantized = quantize(x, perm, *choices)
    last.readers.add(id(reader))
    return last.quantized
