"""One quantization of an input that several layers read: q, k and v; gate and up."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops

MIN_TOKENS = 16  # so few are quantized in less time than it takes to see whether they are already


@dataclasses.dataclass
class _Input:
    version: int
    perm: Tensor
    choices: tuple[Any, ...]
    readers: set[int] = dataclasses.field(default_factory=set)  # ids of the layers that had it
    x: Callable[[], Tensor | None] = lambda: None
    quantized: Tensor | None = None

    def serves(self, reader: int, x: Tensor, perm: Tensor, choices: tuple[Any, ...]) -> bool:
        return (
            self.x() is x
            and self.quantized is not None
            and self.version == x._version
            and self.choices == choices
            # a layer that runs again may have an x that was written to behind torch's back
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
    """`quantize(x, perm, *choices)`, from the last call of this thread if that was for another
    layer and the same x, unchanged since. The result is kept no longer than x lives.

    Args:
        reader: the layer that reads x.

    Returns:
        None where nothing is gained or x cannot be watched: few tokens, torch.compile, tensors of
        inference mode (which have no version).
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
            last.forget()  # whatever waits for the garbage collector holds no memory
        last = _last.input = _Input(x._version, perm, key)
        last.x = weakref.ref(x, last.forget)
        last.quantized = quantize(x, perm, *choices)
    last.readers.add(id(reader))
    return last.quantized
