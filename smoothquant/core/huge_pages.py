"""Memory in pages of 2 MiB, so that a decoded token, which reads all weights once, waits for fewer
translations of addresses. In pages of 4 KiB, small layers are read at about half the speed."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE = 2 << 20
ALIGNMENT = 64  # bytes; kernels load whole cache lines


def move_to_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Move the contents of contiguous CPU tensors to one new block of huge pages, in this order.

    The tensor objects stay the same; views of them keep the old memory. The block lives as long as
    one of the tensors. Other tensors stay where they are, and so do all where the system has no
    huge pages (only Linux does).
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    movable = {id(t): t for t in tensors if _is_movable(t)}.values()
    sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in movable]
    total = sum(sizes)
    if total < PAGE:
        return
    # The last page is whole, too, and there is room to start at the start of a page.
    block = mmap.mmap(-1, (total // PAGE + 2) * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return
    at = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % PAGE
    for tensor, size in zip(movable, sizes, strict=True):
        moved = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        tensor.data = moved.view(tensor.shape).copy_(tensor.detach())
        at += size


def _is_movable(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.nbytes > 0
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )
