"""Comparison bit for bit, and a loop over the instruction sets."""

from contextlib import contextmanager

import torch

from smoothquant.kernels import ops


def assert_same_bits(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal dtype, shape and bits; any NaN equals any NaN, and None only None."""
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = actual != expected
    if actual.dtype.is_floating_point:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        different = actual.contiguous().view(integer) != expected.contiguous().view(integer)
        different &= ~(actual.isnan() & expected.isnan())
    assert not different.any(), (
        f"{int(different.sum())} of {actual.numel()} differ, first: "
        f"{actual[different][0].item()!r} for {expected[different][0].item()!r}"
    )


@contextmanager
def forced_isa(name: str):
    """The instruction set `name`, and a check that the force took."""
    before = ops.isa()
    ops.set_isa(name)
    assert ops.isa() == name
    try:
        yield
    finally:
        ops.set_isa(before)
