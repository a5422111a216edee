"""Memory in pages of 2 MiB: a decoded token reads all weights once, and with pages of 4 KiB the
processor looks up an address for every 4 KiB of them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2 << 20
ALIGNMENT = 64  # bytes; kernels load whole cache lines


def move_to_huge_pages(runs: Iterable[Sequence[Tensor]]) -> None:
    """Move the contents of contiguous CPU tensors to one new block of memory, in this order.

    The tensors of a run follow each other without gaps. The tensor objects stay the same; views of
    them keep the old memory. The block lives as long as one of the tensors. A run with a tensor
    that cannot be moved stays where it is, and so do all if the system grants no block. Where it
    has no huge pages, the block has usual ones.
    """
    seen: set[int] = set()
    movable = []
    for run in runs:
        if all(map(_is_movable, run)) and seen.isdisjoint(map(id, run)):
            seen.update(map(id, run))
            movable.append(run)
    sizes = [-(-sum(t.nbytes for t in run) // ALIGNMENT) * ALIGNMENT for run in movable]
    total = sum(sizes)
    if not total:
        return
    private = {}
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory would not get huge pages
        private["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # The last page is whole, too, and there is room to start at the start of a page.
    try:
        block = mmap.mmap(-1, (total // PAGE + 2) * PAGE, **private)
    except (OSError, ValueError):  # no address space left: it works without, too
        return
    if total >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % PAGE
    for run, size in zip(movable, sizes, strict=True):
        at = start
        for tensor in run:
            moved = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=at)
            tensor.data = moved.view(tensor.shape).copy_(tensor.detach())
            at += tensor.nbytes
        start += size


def _is_movable(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.nbytes > 0
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )
