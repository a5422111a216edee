"""The oracle chain: smoothquant.kernels.reference = C scalar = every instruction set, in bits."""

import inspect
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bits import assert_same_bits, forced_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from length import at_length

from smoothquant import MixedQuantConfig
from smoothquant.channels.statistics import ChannelStats
from smoothquant.kernels import ops, reference
from smoothquant.layers.linear import W4A4Linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SALIENT_DTYPES = {
    torch.float32: torch.bfloat16,
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
}
ISAS = ops.supported_isas()
# zeros, subnormals, the extremes, what rounds half-way, and what is not finite
SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1.2e-38,
    6e-8,
    0.5,
    1.5,
    -2.5,
    65504.0,
    -3.0e38,
    math.inf,
    -math.inf,
    math.nan,
]


@pytest.fixture(params=ISAS)
def isa(request):
    with forced_isa(request.param):
        yield request.param


def values(seed: int, *shape: int, dtype=torch.float32, special: float = 0.0) -> torch.Tensor:
    """Random values over 12 decades; a share `special` of them from SPECIAL."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= 10.0 ** torch.randint(-6, 6, shape[-1:] or (1,), generator=generator)
    if special and x.numel():
        picks = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < special, picks, x)
    return x.to(dtype)


SHAPES = [(0, 5), (1, 1), (3, 7), (4, 16), (2, 33), (5, 128), (3, 131), (2, 1024), (2, 2051)]
GROUP_SIZES = [1, 3, 4, 16, 32, 128, 1500, 10**12]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits, is_unsigned", [(2, False), (4, False), (4, True), (8, True)])
def test_group_ops_equal_the_reference(isa, dtype, num_bits, is_unsigned):
    for seed, (rows, cols) in enumerate(SHAPES):
        for group_size in GROUP_SIZES:
            for special in (0.0, 0.1):
                x = values(seed, rows, cols, dtype=dtype, special=special)
                q, scales = ops.group_quantize(x, group_size, num_bits, is_unsigned)
                q_ref, scales_ref = reference.group_quantize(x, group_size, num_bits, is_unsigned)
                assert_same_bits(q, q_ref)
                assert_same_bits(scales, scales_ref)
                assert_same_bits(
                    ops.group_dequantize(q, scales, group_size, dtype),
                    reference.group_dequantize(q, scales, group_size, dtype),
                )
                assert_same_bits(
                    ops.group_fake_quantize(
                        x, group_size, num_bits, "unsigned" if is_unsigned else "symmetric"
                    ),
                    reference.group_dequantize(q, scales, group_size, dtype),
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_format", ["symmetric", "unsigned", "zero_point"])
@pytest.mark.parametrize("num_bits, clip", [(2, 1.0), (4, 0.9), (7, 0.5)])
def test_fake_quantize_equals_the_reference(isa, dtype, act_format, num_bits, clip):
    for seed, (rows, cols) in enumerate(SHAPES):
        for group_size in GROUP_SIZES[2:]:
            x = values(seed, rows, cols, dtype=dtype, special=0.05)
            args = (x, group_size, num_bits, act_format, clip)
            assert_same_bits(ops.group_fake_quantize(*args), reference.group_fake_quantize(*args))


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_group_quantize_error_is_at_most_half_a_step(isa, num_bits):
    x = values(1, 50, 96)
    q, scales = ops.group_quantize(x, 32, num_bits)
    error = (ops.group_dequantize(q, scales, 32) - x).abs()
    step = scales.repeat_interleave(32, dim=1)
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert q.abs().max() == 2 ** (num_bits - 1) - 1


@pytest.mark.parametrize("cols", [0, 1, 2, 31, 32, 33, 64, 97])
@pytest.mark.parametrize("is_unsigned", [False, True])
def test_nibbles_equal_the_reference_and_come_back(isa, cols, is_unsigned):
    low, high = (0, 16) if is_unsigned else (-8, 8)
    dtype = torch.uint8 if is_unsigned else torch.int8
    q = torch.randint(low, high, (5, 3, cols), dtype=dtype)
    packed = ops.pack_nibbles(q)
    assert packed.shape == (5, 3, (cols + 1) // 2)
    assert_same_bits(packed, reference.pack_nibbles(q))
    assert_same_bits(ops.unpack_nibbles(packed, cols, is_unsigned), q)
    assert_same_bits(reference.unpack_nibbles(packed, cols, is_unsigned), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 7, 8, 40, 129])
def test_channel_stats_equal_the_reference_in_any_split(isa, dtype, cols):
    x = values(cols, 23, cols, dtype=dtype)
    x[5] = -x[3].abs()  # ties: the first row wins
    whole, parts, expected = (ChannelStats.empty(cols) for _ in range(3))
    whole.update(x)
    for part in (x[:1], x[1:1], x[1:20], x[20:]):
        parts.update(part)
    reference.channel_stats_update(x, *expected.to_dict().values())
    for name, tensor in expected.to_dict().items():
        assert_same_bits(getattr(whole, name), tensor)
        assert_same_bits(getattr(parts, name), tensor)
    assert whole.count == 23


@pytest.mark.parametrize("key", ["argmax", "max", "mean3std", "rms"])
@pytest.mark.parametrize("cols", [0, 1, 5, 64])
def test_sort_keys_and_argsort_equal_the_reference(isa, key, cols):
    stats = ChannelStats.empty(cols)
    stats.update(values(3, 40, cols))
    keys = ops.sort_keys(stats, key)
    assert_same_bits(keys, reference.sort_keys(stats, key))
    for descending in (False, True):
        assert_same_bits(ops.argsort(keys, descending), reference.argsort(keys, descending))


def test_sort_keys_mean_what_they_say():
    x = values(4, 100, 9)
    stats = ChannelStats.empty(9)
    stats.update(x)
    magnitude = x.double().abs()
    expected = {
        "argmax": magnitude.argmax(0).double(),
        "max": magnitude.amax(0),
        "mean3std": magnitude.mean(0) + 3 * magnitude.std(0, correction=0),
        "rms": magnitude.square().mean(0).sqrt(),
    }
    for key, value in expected.items():
        torch.testing.assert_close(ops.sort_keys(stats, key), value)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 1023])
def test_argsort_is_stable_with_nan_last(isa, size):
    keys = torch.randint(0, 10, (size,)).double()
    keys[torch.rand(size) < 0.1] = math.nan
    for descending in (False, True):
        assert_same_bits(ops.argsort(keys, descending), reference.argsort(keys, descending))


# m, n, k, num_salient, group_size: 0, 1, primes, tails, a group larger than K, nothing or
# everything salient, groups of several segments
LINEARS = [
    (0, 4, 9, 1, 4),
    (1, 1, 1, 0, 1),
    (1, 1, 1, 1, 1),
    (3, 0, 5, 0, 4),
    (2, 3, 0, 0, 4),
    (2, 17, 33, 3, 8),
    (7, 16, 128, 0, 128),
    (13, 40, 100, 100, 4),
    (5, 3, 301, 17, 3),
    (6, 5, 50, 2, 1000),
    (12, 31, 64, 5, 16),
    (41, 48, 130, 7, 20),
    (247, 19, 70, 3, 32),
    (490, 33, 70, 3, 24),
    (3, 20, 2100, 40, 1500),
    (8, 17, 4100, 0, 4100),
]


def packed_linear(
    n, k, num_salient, group_size, rotation=0, dtype=torch.float32, seed=0, salient_dtype=None
):
    """Positional arguments of w4a4_linear behind x, up to bias."""
    w = values(seed, n, k).to(dtype)
    w = torch.nan_to_num(w, posinf=6e4, neginf=-6e4)
    generator = torch.Generator().manual_seed(seed)
    perm = torch.randperm(k, generator=generator).int()
    salient_dtype = salient_dtype or SALIENT_DTYPES[dtype]
    choices = (num_salient, group_size, rotation, 4, None, salient_dtype)
    packed = ops.pack_weight(w, perm, *choices)
    expected = reference.pack_weight(w, perm, *choices)
    for one, other in zip(packed, expected, strict=True):
        assert_same_bits(one, other)
    shapes = ops.packed_shapes(n, k, num_salient, group_size)
    for tensor, shape in zip(packed, shapes, strict=True):
        assert tensor is None or tensor.shape == shape
    return (*packed, perm, torch.randn(n, generator=generator))


# num_bits, act_format, per_token, clip
FORMATS = [
    (4, "symmetric", False, 1.0),
    (4, "symmetric", True, 0.9),
    (3, "symmetric", False, 0.5),
    (4, "unsigned", False, 1.0),
    (4, "zero_point", False, 1.0),
    (4, "zero_point", True, 0.9),
    (2, "zero_point", False, 0.7),
    (8, "symmetric", False, 1.0),
    (8, "symmetric", True, 0.9),
    (5, "symmetric", False, 0.7),
    (7, "unsigned", False, 1.0),
    (7, "zero_point", False, 0.9),
]


@pytest.mark.parametrize("dtype", at_length(DTYPES, [torch.bfloat16]))
@pytest.mark.parametrize("rotation", [0, 8, 512])
@pytest.mark.parametrize("salient_dtype", [None, torch.int8])
@pytest.mark.parametrize("m, n, k, num_salient, group_size", LINEARS)
def test_linear_equals_the_reference(
    isa, dtype, rotation, salient_dtype, m, n, k, num_salient, group_size
):
    args = packed_linear(
        n, k, num_salient, group_size, rotation, dtype, salient_dtype=salient_dtype
    )
    assert_same_bits(
        ops.unpack_weight(*args[:5], n, group_size, rotation),
        reference.unpack_weight(*args[:5], n, group_size, rotation),
    )
    rows = torch.randint(n, (n // 2 + 2,)) if n else torch.zeros(0, dtype=torch.int64)
    assert_same_bits(
        ops.unpack_rows(*args[:5], rows, n, group_size, rotation),
        reference.unpack_rows(*args[:5], rows, n, group_size, rotation),
    )
    x = values(7, m, k, dtype=dtype)
    if m > 2 and k:
        x[1] = 0
        x[2, k // 2] = math.nan
    for options in FORMATS:
        choices = (n, group_size, rotation, *options)
        assert_same_bits(
            ops.w4a4_linear(x, *args, *choices), reference.w4a4_linear(x, *args, *choices)
        )
    assert_same_bits(
        ops.w4a4_linear(x, *args[:5], None, n, group_size, rotation),
        reference.w4a4_linear(x, *args[:5], None, n, group_size, rotation),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("m, n, k, num_salient, group_size", LINEARS)
def test_identity_perm_reads_in_place_what_another_gathers(
    isa, dtype, rotation, m, n, k, num_salient, group_size
):
    *packed, perm, bias = packed_linear(n, k, num_salient, group_size, rotation, dtype)
    x = values(7, m, k, dtype=dtype, special=0.01)
    identity, gathered = torch.arange(k, dtype=torch.int32), x[:, perm.long()]
    for options in FORMATS:
        choices = (bias, n, group_size, rotation, *options)
        assert_same_bits(
            ops.w4a4_linear(gathered, *packed, identity, *choices),
            ops.w4a4_linear(x, *packed, perm, *choices),
        )
    weight = ops.unpack_weight(*packed, perm, n, group_size, rotation)
    in_place = ops.unpack_weight(*packed, identity, n, group_size, rotation)
    assert_same_bits(in_place, weight[:, perm.long()])
    w = torch.randn(n, k).to(dtype)
    for one, other in zip(
        ops.pack_weight(w[:, perm.long()], identity, num_salient, group_size, rotation),
        ops.pack_weight(w, perm, num_salient, group_size, rotation),
        strict=True,
    ):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [0, 1, 2, 4, 8, 16, 64, 512])
def test_hadamard_equals_the_reference_and_is_orthonormal(isa, dtype, rotation):
    for seed, (rows, cols) in enumerate(SHAPES):
        for group_size in GROUP_SIZES[3:]:
            x = values(seed, rows, cols, dtype=dtype, special=0.05 * (seed % 2))
            y = ops.group_hadamard(x, group_size, rotation)
            assert_same_bits(y, reference.group_hadamard(x, group_size, rotation))
    x = torch.randn(20, 600)
    y = ops.group_hadamard(x, 600, rotation)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(ops.group_hadamard(y, 600, rotation), x)
    if rotation == 4:
        h = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        torch.testing.assert_close(y[:, :4], x[:, :4] @ h)


@pytest.mark.parametrize("group_size", [4, 20, 64])
def test_gptq_block_equals_the_reference(group_size):
    w = values(3, 30, 40)
    u = torch.triu(torch.rand(40, 40)) + torch.eye(40)
    scales = torch.rand(30, 20) * (torch.rand(30, 20) > 0.1)
    actual, expected = w.clone(), w.clone()
    errors = ops.gptq_block(actual, u, scales, 24, group_size)
    errors_expected = reference.gptq_block(expected, u, scales, 24, group_size)
    assert_same_bits(actual, expected)
    assert_same_bits(errors, errors_expected)


def descend_arguments(rows, cols, groups, group_size, col0):
    """(w on its grid, its gradient, h, scales): a block of a weight to descend with."""
    scales = torch.rand(rows, groups) * (torch.rand(rows, groups) > 0.1)
    of_column = scales[:, (col0 + torch.arange(cols)) // group_size]
    w = torch.randint(-7, 8, (rows, cols)) * of_column
    h = torch.randn(cols, 2 * cols)
    h = h @ h.T
    return w, (values(4, rows, cols) @ h).contiguous(), h, scales


@pytest.mark.parametrize("group_size", [4, 20, 64])
def test_descend_block_equals_the_reference(group_size):
    w, gradient, h, scales = descend_arguments(30, 40, 20, group_size, 24)
    actual, expected = (w.clone(), gradient.clone()), (w.clone(), gradient.clone())
    ops.descend_block(*actual, h, scales, 24, group_size)
    reference.descend_block(*expected, h, scales, 24, group_size)
    assert not torch.equal(actual[0], w)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def assert_on_grid(w, scales, group_size, col0):
    """w is NaN, or a code in [-7, 7] times its scale."""
    of_column = scales[:, (col0 + torch.arange(w.shape[1])) // group_size]
    assert (w.isnan() | (w.abs() <= 7 * of_column.abs())).all()


@pytest.mark.parametrize("spoiled", ["w", "scales", "matrix", "diagonal"])
def test_column_loops_keep_nan(spoiled):
    """What is not finite, and zeros on the diagonal, give what the specification gives: NaN."""
    scales, matrix = torch.rand(30, 20) + 0.1, torch.triu(torch.rand(40, 40)) + torch.eye(40)
    w, gradient = torch.randn(30, 40), torch.randn(30, 40)
    if spoiled == "w":
        w = values(5, 30, 40, special=0.02)
    elif spoiled == "scales":
        scales = torch.where(torch.rand(30, 20) < 0.2, torch.tensor(math.nan), scales)
    elif spoiled == "matrix":
        matrix[3, 7] = matrix[5, 5] = math.nan
    else:
        matrix[[0, 9], [0, 9]] = 0
    actual, expected = w.clone(), w.clone()
    errors = ops.gptq_block(actual, matrix, scales, 24, 4)
    assert_same_bits(errors, reference.gptq_block(expected, matrix, scales, 24, 4))
    assert_same_bits(actual, expected)
    assert actual.isnan().any()
    assert_on_grid(actual, scales, 4, 24)

    actual, expected = (w.clone(), gradient.clone()), (w.clone(), gradient.clone())
    ops.descend_block(*actual, matrix, scales, 24, 4)
    reference.descend_block(*expected, matrix, scales, 24, 4)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
    assert_on_grid(actual[0], scales, 4, 24)


@pytest.mark.parametrize("rows, cols", [(3001, 131), (300, 2003)])
def test_work_split_over_threads_equals_the_reference(rows, cols):
    """Every op on a problem larger than the grain of a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = values(1, rows, cols)
        q, scales = ops.group_quantize(x, 32)
        q_ref, scales_ref = reference.group_quantize(x, 32)
        assert_same_bits(q, q_ref)
        assert_same_bits(scales, scales_ref)
        for name in ("group_fake_quantize", "group_hadamard"):
            args = (x, 32, 32) if name == "group_hadamard" else (x, 32, 4, "zero_point")
            assert_same_bits(getattr(ops, name)(*args), getattr(reference, name)(*args))
        assert_same_bits(
            ops.group_dequantize(q, scales, 32), reference.group_dequantize(q, scales, 32)
        )
        packed = ops.pack_nibbles(q)
        assert_same_bits(packed, reference.pack_nibbles(q))
        assert_same_bits(ops.unpack_nibbles(packed, cols), q)
        stats, expected = ChannelStats.empty(cols), ChannelStats.empty(cols)
        stats.update(x)
        reference.channel_stats_update(x, *expected.to_dict().values())
        for name, tensor in expected.to_dict().items():
            assert_same_bits(getattr(stats, name), tensor)
        args = packed_linear(300, cols, 11, 32)
        assert_same_bits(
            ops.unpack_weight(*args[:5], 300, 32), reference.unpack_weight(*args[:5], 300, 32)
        )
        w, u = values(2, rows, 40), torch.triu(torch.rand(40, 40)) + torch.eye(40)
        other, group_scales = w.clone(), torch.rand(rows, 2)
        assert_same_bits(
            ops.gptq_block(w, u, group_scales, 0, 20),
            reference.gptq_block(other, u, group_scales, 0, 20),
        )
        assert_same_bits(w, other)
        w, gradient, h, scales = descend_arguments(rows, 40, 2, 20, 0)
        expected = (w.clone(), gradient.clone())
        ops.descend_block(w, gradient, h, scales, 0, 20)
        reference.descend_block(*expected, h, scales, 0, 20)
        assert_same_bits(w, expected[0])
        assert_same_bits(gradient, expected[1])
    finally:
        torch.set_num_threads(threads)


def test_given_group_scales_are_used(isa):
    w, perm = values(5, 20, 48), torch.randperm(48).int()
    scales = torch.rand(20, 3) * w.abs().amax()
    packed = ops.pack_weight(w, perm, 0, 16, group_scales=scales)
    expected = reference.pack_weight(w, perm, 0, 16, group_scales=scales)
    for one, other in zip(packed, expected, strict=True):
        assert_same_bits(one, other)
    assert_same_bits(packed[1].transpose(1, 2).flatten(0, 1)[:20], scales.bfloat16())


def packed_salient(rows):
    """int8 codes [N, K_s], fp32 scales [N] and unpacked values of all-salient rows."""
    w = torch.tensor(rows)
    n, k = w.shape
    perm = torch.arange(k).int()
    packed = ops.pack_weight(w, perm, k, 4, salient_dtype=torch.int8)
    for one, other in zip(
        packed, reference.pack_weight(w, perm, k, 4, salient_dtype=torch.int8), strict=True
    ):
        assert_same_bits(one, other)
    codes = packed[2].transpose(1, 2).flatten(0, 1)
    assert not codes[n:].any() and not packed[3].flatten()[n:].any()
    return codes[:n], packed[3].flatten()[:n].float(), ops.unpack_weight(*packed, perm, n, 4)


def test_int8_salient_weights_are_rounded_to_nearest(isa):
    w = values(11, 50, 600)
    codes, scales, unpacked = packed_salient(w.tolist())
    exact = w.abs().amax(1) / 127
    assert_same_bits(scales, exact.bfloat16().float())
    assert_same_bits(unpacked, codes * scales[:, None])
    # half a step, and what rounding the scale down may cut off the largest
    assert ((unpacked - w).abs() <= scales[:, None] * (0.5 + 127 / 256)).all()
    inside = w.abs() <= 127 * scales[:, None]
    assert ((unpacked - w).abs() <= 0.5001 * scales[:, None])[inside].all()
    assert (codes.abs().amax(1) >= 126).all() and codes.min() >= -127


def test_int8_salient_rows_of_zeros_tiny_and_huge_magnitudes(isa):
    tiny, huge = 127 * 2.0**-126, torch.finfo(torch.float32).max
    codes, scales, unpacked = packed_salient(
        [[0.0, -0.0, 0.0], [tiny * 0.99, -1e-45, 0.0], [tiny, -tiny, 0.0], [huge, -huge, 1e30]]
    )
    assert codes.tolist() == [[0, 0, 0], [0, 0, 0], [127, -127, 0], [127, -127, 0]]
    assert scales[:3].tolist() == [0, 0, 2.0**-126]
    assert torch.isfinite(unpacked).all() and unpacked[2, 0] == tiny


shapes = st.tuples(
    st.integers(0, 40), st.integers(0, 40), st.integers(0, 90), st.floats(0, 1), st.integers(1, 100)
)


@settings(max_examples=at_length(300, 60), deadline=None)
@given(
    shapes,
    st.sampled_from([0, 2, 16, 128]),
    st.sampled_from(FORMATS),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.int8]),
    st.integers(0, 2**31),
)
def test_linear_equals_the_reference_for_any_shape(
    shape, rotation, options, dtype, salient_dtype, seed
):
    m, n, k, salient_share, group_size = shape
    num_salient = int(salient_share * k)
    args = packed_linear(n, k, num_salient, group_size, rotation, dtype, seed, salient_dtype)
    x = values(seed + 1, m, k, dtype=dtype, special=0.02)
    choices = (n, group_size, rotation, *options)
    expected = reference.w4a4_linear(x, *args, *choices)
    for name in ISAS:
        with forced_isa(name):
            assert_same_bits(ops.w4a4_linear(x, *args, *choices), expected)
            quantized = ops.quantize_input(x, args[4], num_salient, group_size, rotation, *options)
            shared = torch.empty_like(x), *args, *choices, quantized
            assert_same_bits(ops.w4a4_linear(*shared), expected)


@settings(max_examples=at_length(5000, 250), deadline=None)
@given(
    shapes,
    st.integers(1, 2000),
    st.sampled_from([0, 4, 64]),
    st.sampled_from(FORMATS),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.bfloat16, torch.int8]),
    st.integers(0, 2**31),
)
def test_every_isa_equals_scalar_for_any_shape(
    shape, extra_channels, rotation, options, dtype, salient_dtype, seed
):
    m, n, k, salient_share, group_size = shape
    k = k + extra_channels if seed % 50 == 0 else k  # now and then more than one segment
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).to(dtype)
    perm = torch.randperm(k, generator=generator).int()
    num_salient = int(salient_share * k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    results = []
    for name in ISAS:
        with forced_isa(name):
            packed = ops.pack_weight(
                w, perm, num_salient, group_size, rotation, salient_dtype=salient_dtype
            )
            y = ops.w4a4_linear(x, *packed, perm, None, n, group_size, rotation, *options)
            results.append((*packed, y, *ops.group_quantize(x, group_size)))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)


@st.composite
def views(draw):
    """A tensor with any strides and rank >= 1, made by slicing, transposing and expanding."""
    rank = draw(st.integers(1, 4))
    base = torch.randn([draw(st.integers(1, 9)) for _ in range(rank)])
    view = base
    for dim in range(rank):
        step = draw(st.integers(1, 3))
        start = draw(st.integers(0, view.shape[dim] - 1))
        index = [slice(None)] * rank
        index[dim] = slice(start, None, step)
        view = view[tuple(index)]
    view = view.permute(draw(st.permutations(range(rank))))
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(draw(st.integers(1, 3)), *view.shape)
    return view


@settings(max_examples=at_length(2000, 150), deadline=None)
@given(views(), st.integers(1, 12))
def test_strides_do_not_matter(view, group_size):
    k = view.shape[-1]
    plain = view.contiguous().clone()
    before = view.clone()
    w = torch.randn(5, k)
    perm = torch.arange(k).flip(0).int()
    packed = ops.pack_weight(w, perm, k // 3, group_size)
    assert_same_bits(
        ops.w4a4_linear(view, *packed, perm, None, 5, group_size),
        ops.w4a4_linear(plain, *packed, perm, None, 5, group_size),
    )
    for one, other in zip(
        ops.group_quantize(view, group_size), ops.group_quantize(plain, group_size), strict=True
    ):
        assert_same_bits(one, other)
    matrix, plain_matrix = view.flatten(0, -2) if view.ndim > 1 else view[None], None
    plain_matrix = matrix.contiguous()
    order = torch.randperm(k).int()
    for one, other in zip(
        ops.pack_weight(matrix, order, 0, group_size),
        ops.pack_weight(plain_matrix, order, 0, group_size),
        strict=True,
    ):
        assert_same_bits(one, other)
    assert torch.equal(view, before)


@pytest.mark.long
def test_offsets_beyond_two_to_the_31():
    q = torch.zeros(2**31 + 66, dtype=torch.int8)
    q[-5:] = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int8)
    packed = ops.pack_nibbles(q)
    assert packed[-3:].tolist() == [0x10, 0x32, 0x54]
    del q
    assert ops.unpack_nibbles(packed[-3:].clone(), 6).tolist() == [0, 1, 2, 3, 4, 5]


# ---- torch integration ----


def op_arguments(salient_dtype=torch.bfloat16) -> dict[str, tuple]:
    stats = ChannelStats.empty(24)
    x = torch.randn(6, 24)
    perm = torch.randperm(24).int()
    packed = ops.pack_weight(torch.randn(20, 24), perm, 3, 8, salient_dtype=salient_dtype)
    q, scales = ops.group_quantize(x, 8)
    fields = (stats.count, stats.abs_max, stats.abs_sum, stats.sq_sum, stats.argmax)
    choices = (4, 4, "zero_point", False, 1.0)
    return {
        "channel_stats_update": (x, *stats.to_dict().values()),
        "sort_keys": (*fields, "rms"),
        "argsort": (torch.randn(9).double(), True),
        "group_quantize": (x, 8, 4, False),
        "group_dequantize": (q, scales, 8, torch.float16),
        "group_fake_quantize": (x, 8, 4, "zero_point", 0.9),
        "group_hadamard": (x, 8, 4),
        "gptq_block": (torch.randn(5, 6), torch.eye(6), torch.rand(5, 2), 0, 3, 4),
        "descend_block": (
            torch.zeros(5, 6),
            torch.randn(5, 6),
            torch.eye(6),
            torch.rand(5, 2),
            0,
            3,
            4,
        ),
        "pack_nibbles": (q,),
        "unpack_nibbles": (ops.pack_nibbles(q), 24, False),
        "pack_weight": (torch.randn(20, 24), perm, 3, 8, 4, 4, None, salient_dtype),
        "unpack_weight": (*packed, perm, 20, 8, 4),
        "unpack_rows": (*packed, perm, torch.tensor([3, 19, 3]), 20, 8, 4),
        "w4a4_linear": (x, *packed, perm, torch.randn(20), 20, 8, *choices, None),
        "quantize_input": (x, perm, 3, 8, *choices),
    }


def test_every_op_is_in_the_table():
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.split("::")[1] for s in schemas if s.name.startswith("mixedquant::")}
    assert registered == set(op_arguments())


IN_INT8 = ["pack_weight", "unpack_weight", "unpack_rows", "w4a4_linear"]


@pytest.mark.parametrize(
    "name, salient_dtype",
    [(name, torch.bfloat16) for name in sorted(op_arguments())]
    + [(name, torch.int8) for name in IN_INT8],
)
def test_opcheck(name, salient_dtype):
    args = op_arguments(salient_dtype)[name]
    torch.library.opcheck(getattr(torch.ops.mixedquant, name).default, args)


@pytest.mark.parametrize("salient_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "name",
    ["group_fake_quantize", "w4a4_linear", "quantize_input", "group_quantize", "pack_weight"],
)
def test_ops_compile_and_export(name, salient_dtype):
    args = op_arguments(salient_dtype)[name]
    op = getattr(torch.ops.mixedquant, name)

    class Module(torch.nn.Module):
        def forward(self, x):
            return op(x + 1, *args[1:])

    expected = Module()(args[0])
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Module(), (args[0],)).module()
    torch.testing.assert_close(compiled(args[0]), expected, rtol=0, atol=0)
    torch.testing.assert_close(exported(args[0]), expected, rtol=0, atol=0)


# ---- errors: ValueError naming op, argument and value; RuntimeError for the environment ----

BAD_CALLS = {
    "group_size": (lambda: ops.group_quantize(torch.randn(2, 4), 0), "group_size.*got 0"),
    "num_bits": (lambda: ops.group_quantize(torch.randn(2, 4), 4, 9), "num_bits.*got 9"),
    "x dtype": (lambda: ops.group_quantize(torch.zeros(2, 4).double(), 4), "x must be.*got Double"),
    "x scalar": (lambda: ops.group_quantize(torch.tensor(1.0), 4), "x must have at least one"),
    "q dtype": (lambda: ops.pack_nibbles(torch.zeros(4)), "q must be int8.*got Float"),
    "cols": (lambda: ops.unpack_nibbles(torch.zeros(4, dtype=torch.uint8), 6), "cols.*got 6"),
    "key": (lambda: ops.sort_keys(ChannelStats.empty(3), "median"), "key must be.*'median'"),
    "scales": (
        lambda: ops.group_dequantize(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 3), 4),
        r"scales must have shape \[2, 2\]; got \[2, 3\]",
    ),
    "perm twice": (
        lambda: ops.pack_weight(torch.randn(2, 3), torch.tensor([0, 1, 1]).int(), 0, 4),
        r"perm must hold every channel in \[0, 3\) once; perm\[2\] is 1",
    ),
    "perm dtype": (
        lambda: ops.pack_weight(torch.randn(2, 3), torch.tensor([0, 1, 2]), 0, 4),
        "perm must be Int; got Long",
    ),
    "num_salient": (
        lambda: ops.pack_weight(torch.randn(2, 3), torch.arange(3).int(), 4, 4),
        r"num_salient must be in \[0, 3\]; got 4",
    ),
    "weight NaN": (
        lambda: ops.pack_weight(torch.full((2, 3), math.nan), torch.arange(3).int(), 1, 4),
        "pack_weight: a weight is NaN or Inf, or",
    ),
    "salient Inf": (
        lambda: ops.pack_weight(torch.full((2, 3), math.inf), torch.arange(3).int(), 3, 4),
        "pack_weight: a weight is NaN or Inf, or",
    ),
    "salient dtype": (
        lambda: ops.pack_weight(
            torch.randn(2, 3), torch.arange(3).int(), 1, 4, salient_dtype=torch.uint8
        ),
        "salient dtype must be bfloat16, float16 or int8; got Byte",
    ),
    "int8 salient NaN": (
        lambda: ops.pack_weight(
            torch.full((2, 3), math.nan), torch.arange(3).int(), 3, 4, salient_dtype=torch.int8
        ),
        "pack_weight: a weight is NaN or Inf, or",
    ),
    "negative scale": (
        lambda: ops.pack_weight(
            torch.randn(2, 3), torch.arange(3).int(), 0, 4, group_scales=torch.full((2, 1), -1.0)
        ),
        "a scale or clip ratio is negative",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_value_errors(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 23)}, r"x must end in 24 channels; got shape \[2, 23\]"),
        ({"x": torch.randn(2, 24).double()}, "x must be float32, float16 or bfloat16; got Double"),
        ({"perm": torch.full((24,), 99).int()}, r"perm holds an index outside \[0, k\)"),
        ({"perm": torch.full((24,), -1).int()}, r"perm holds an index outside \[0, k\)"),
        ({"perm": torch.arange(40).int()}, "qweight must have shape"),
        ({"bias": torch.randn(19)}, r"bias must have shape \[20\]; got \[19\]"),
        ({"out_features": 33}, "qweight must have shape"),
        ({"out_features": -1}, "out_features must not be negative; got -1"),
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"group_size": 4}, "must have shape"),
        ({"salient_scales": torch.ones(2, 16).bfloat16()}, "only then; it is BFloat16"),
        (
            {"salient_weight": torch.zeros(2, 3, 16, dtype=torch.int8)},
            "salient_scales must be given with an int8 salient_weight, and only then; it is Char",
        ),
        (
            {
                "salient_weight": torch.zeros(2, 3, 16, dtype=torch.int8),
                "salient_scales": torch.ones(3, 16).bfloat16(),
            },
            r"salient_scales must have shape \[2, 16\]; got \[3, 16\]",
        ),
        (
            {
                "salient_weight": torch.zeros(2, 3, 16, dtype=torch.int8),
                "salient_scales": torch.ones(2, 16),
            },
            "salient_scales must be BFloat16; got Float",
        ),
        ({"rotation": 3}, "rotation must be 0 or a power of two up to 512; got 3"),
        ({"act_format": "log"}, "act_format must be symmetric, unsigned or zero_point; got 'log'"),
        (
            {"num_bits": 9, "act_format": "symmetric"},
            r"num_bits must be in \[2, 8\] for 'symmetric' activations; got 9",
        ),
        (
            {"num_bits": 8, "act_format": "zero_point"},
            r"num_bits must be in \[2, 7\] for 'zero_point' activations; got 8",
        ),
        (
            {"quantized_input": torch.zeros(9).byte()},
            r"quantized_input must have shape .* got \[9\]",
        ),
    ],
)
def test_bad_linear_arguments_are_value_errors(change, message):
    names = inspect.signature(ops.w4a4_linear).parameters
    args = dict(zip(names, op_arguments()["w4a4_linear"], strict=True))
    with pytest.raises(ValueError, match=message):
        ops.w4a4_linear(**(args | change))


def tensors_of(args):
    return [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(op_arguments()))
def test_meta_tensors_among_others_are_refused(name):
    """torch would call the fake kernel, whose results are uninitialized memory."""
    args = op_arguments(torch.int8 if name in IN_INT8 else torch.bfloat16)[name]
    op, places = getattr(torch.ops.mixedquant, name), tensors_of(args)
    if name == "w4a4_linear":
        args = (*args[:-1], torch.zeros(9).byte())
        places.append(len(args) - 1)
    for chosen in range(1, 2 ** len(places) - 1):
        mixed = list(args)
        for bit, place in enumerate(places):
            if chosen >> bit & 1:
                mixed[place] = args[place].to("meta")
        with pytest.raises(ValueError, match=f"{name}: all tensors must be on one device"):
            op(*mixed)


def with_clip(name, clip):
    args = list(op_arguments()[name])
    schema = getattr(torch.ops.mixedquant, name).default._schema
    args[[a.name for a in schema.arguments].index("clip")] = clip
    return args


CLIPPED = ["group_fake_quantize", "quantize_input", "w4a4_linear"]


def test_every_op_with_a_clip_is_known():
    schemas = [getattr(torch.ops.mixedquant, name).default._schema for name in op_arguments()]
    clipped = [s.name for s in schemas if "clip" in [a.name for a in s.arguments]]
    assert sorted(clipped) == [f"mixedquant::{name}" for name in CLIPPED]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CLIPPED)
def test_clips_out_of_range_are_refused(name, device):
    op = getattr(torch.ops.mixedquant, name)
    below, above = math.nextafter(ops.MIN_CLIP, 0), math.nextafter(1, 2)
    for clip in (below, above, 1e-12, 1e-300, 0.0, -0.0, -1.0, 2.0, math.inf, -math.inf, math.nan):
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in with_clip(name, clip)]
        with pytest.raises(
            ValueError, match=rf"{name}: clip must be in \[2\^-10, 1\]; got {clip:g}"
        ):
            op(*args)
        with pytest.raises(ValueError, match="act_clip"):
            MixedQuantConfig(act_clip=clip)
    for clip in (ops.MIN_CLIP, 1.0):
        op(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in with_clip(name, clip)))
        MixedQuantConfig(act_clip=clip)


@pytest.mark.parametrize("act_format", ["symmetric", "unsigned", "zero_point"])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_smallest_clip_saturates_alike_everywhere(isa, act_format, per_token):
    x, perm = values(3, 9, 150, special=0.01), torch.randperm(150).int()
    packed = ops.pack_weight(torch.randn(20, 150), perm, 3, 40)
    args = (x, *packed, perm, None, 20, 40, 0, 4, act_format, per_token, ops.MIN_CLIP)
    assert_same_bits(ops.w4a4_linear(*args), reference.w4a4_linear(*args))
    args = (x, 40, 4, act_format, ops.MIN_CLIP)
    assert_same_bits(ops.group_fake_quantize(*args), reference.group_fake_quantize(*args))


MANY, BYTE = 2**40, torch.uint8
NO_COLUMNS = {
    "channel_stats_update": lambda x: (x, *ChannelStats.empty(0).to_dict().values()),
    "group_quantize": lambda x: (x, 8, 4, False),
    "group_dequantize": lambda x: (x.to(torch.int8), x, 8, torch.float16),
    "group_fake_quantize": lambda x: (x, 8, 4, "symmetric", 1.0),
    "group_hadamard": lambda x: (x, 8, 4),
    "gptq_block": lambda x: (x, torch.zeros(0, 0), x, 0, 8, 4),
    "descend_block": lambda x: (x, x, torch.zeros(0, 0), x, 0, 8, 4),
    "pack_nibbles": lambda x: (x.to(BYTE),),
    "unpack_nibbles": lambda x: (x.to(BYTE), 0, False),
    "pack_weight": lambda x: (x, torch.arange(0).int(), 0, 8, 0, 4, None, torch.bfloat16),
    "unpack_weight": lambda x: (
        torch.zeros(MANY // 16, 0, 64, dtype=BYTE),
        *torch.zeros(2, MANY // 16, 0, 16).bfloat16(),
        None,
        torch.arange(0).int(),
        MANY,
        8,
        0,
    ),
    "quantize_input": lambda x: (x, torch.arange(0).int(), 0, 8, 0, 4, "symmetric", False, 1.0),
    "w4a4_linear": lambda x: (
        x,
        *ops.pack_weight(torch.zeros(0, 0), torch.arange(0).int(), 0, 8),
        torch.arange(0).int(),
        None,
        *(0, 8, 0, 4, "symmetric", False, 1.0, None),
    ),
}


def test_every_op_on_rows_is_in_the_table_of_those_without_columns():
    others = {"argsort", "sort_keys", "unpack_rows"}  # of channels, or with a list of rows
    assert set(op_arguments()) - set(NO_COLUMNS) == others


@pytest.mark.parametrize("name", NO_COLUMNS)
def test_many_rows_without_columns_take_no_time(name):
    getattr(torch.ops.mixedquant, name)(*NO_COLUMNS[name](torch.zeros(MANY, 0)))


@pytest.mark.parametrize("col0", [1, 2**31, 2**62, 2**63 - 5, 2**63 - 4, 2**63 - 1])
@pytest.mark.parametrize("group_size", [4, 2**62])
def test_columns_outside_the_groups_are_refused(col0, group_size):
    w, square, scales = torch.ones(1, 4), torch.eye(4), torch.ones(1, 1)
    if col0 + 3 < group_size:
        ops.gptq_block(w.clone(), square, scales, col0, group_size)
        return
    for call in (
        lambda: ops.gptq_block(w, square, scales, col0, group_size),
        lambda: ops.descend_block(w, w.clone(), square, scales, col0, group_size),
    ):
        with pytest.raises(ValueError, match=rf"col0 must be .*; got {col0}|groups or more; got 1"):
            call()


@pytest.mark.parametrize("index", [-1, 20, 2**40, -(2**63), 2**63 - 1])
def test_rows_outside_the_weight_are_refused(isa, index):
    packed = ops.pack_weight(torch.randn(20, 24), torch.arange(24).int(), 3, 8)
    with pytest.raises(ValueError, match=r"rows holds an index outside \[0, out_features\)"):
        ops.unpack_rows(*packed, torch.arange(24).int(), torch.tensor([1, index]), 20, 8)


HUGE = {
    "count": lambda: ops.channel_stats_update(
        torch.ones(2, 1),
        torch.tensor(2**63 - 2),
        *list(ChannelStats.empty(1).to_dict().values())[1:],
    ),
    "cols": lambda: ops.unpack_nibbles(torch.zeros(0, 2**62, dtype=BYTE), 5),
    "out_features": lambda: ops.unpack_weight(
        *ops.pack_weight(torch.ones(4, 4), torch.arange(4).int(), 0, 4),
        torch.arange(4).int(),
        2**63 - 1,
        4,
    ),
    "size": lambda: ops.pack_weight(torch.zeros(0, 2**62 - 1), torch.zeros(1).int(), 0, 4),
}


@pytest.mark.parametrize("case", HUGE)
def test_sizes_at_the_end_of_int64_are_refused(case):
    with pytest.raises(ValueError, match=case if case != "size" else "perm must have shape"):
        HUGE[case]()


def at_odd_address(t):
    """A copy of t over memory that is aligned to nothing."""
    data = bytearray(1) + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(data, dtype=t.dtype, offset=1).reshape(t.shape)


@pytest.mark.parametrize("name", sorted(op_arguments()))
def test_tensors_at_odd_addresses_are_read_and_never_written(name):
    args = op_arguments()[name]
    op = getattr(torch.ops.mixedquant, name)
    written = [a.alias_info is not None for a in op.default._schema.arguments]
    fresh = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = op(*fresh)
    for place in tensors_of(args):
        odd = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        odd[place] = at_odd_address(args[place])
        if not written[place]:
            actual = op(*odd)
            for one, other in zip(
                *map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True
            ):
                assert_same_bits(one, other)
            continue
        with pytest.raises(ValueError, match="must be aligned"):
            op(*odd)


def test_an_input_quantized_for_something_else_is_refused():
    x, perm = torch.randn(24, 64), torch.arange(64).int()
    args = (*ops.pack_weight(torch.randn(16, 64), perm, 0, 16), perm, None, 16)
    quantized = ops.quantize_input(x, perm, 0, 16)
    assert_same_bits(
        ops.w4a4_linear(x, *args, 16, quantized_input=quantized), ops.w4a4_linear(x, *args, 16)
    )
    label = quantized.clone()
    label[-64:-56] = 99
    for other, why in ((label, "made for another"), (quantized[:-1], "must have shape")):
        with pytest.raises(ValueError, match=f"w4a4_linear: quantized_input (was )?{why}"):
            ops.w4a4_linear(x, *args, 16, quantized_input=other)


def test_an_input_is_multiplied_by_the_instruction_set_that_quantized_it():
    x, perm = torch.randn(24, 64), torch.arange(64).int()
    args = (*ops.pack_weight(torch.randn(16, 64), perm, 3, 16), perm, None, 16)
    expected = ops.w4a4_linear(x, *args, 16)
    for one in ISAS:
        with forced_isa(one):
            quantized = ops.quantize_input(x, perm, 3, 16)
        for other in ISAS:
            with forced_isa(other):
                shared = ops.w4a4_linear(x, *args, 16, quantized_input=quantized)
            assert_same_bits(shared, expected)


@pytest.fixture
def eager_threads():
    """Threads take turns after every few operations, not after 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_forwards_go_on_while_another_thread_changes_the_instruction_set(eager_threads):
    torch.manual_seed(0)
    layers = [
        W4A4Linear.from_float(torch.nn.Linear(256, 64), sort="none", group_size=16)
        for _ in range(3)
    ]
    inputs = [torch.randn(40, 256) for _ in range(4)]
    expected = [[layer(x) for layer in layers] for x in inputs]
    done = threading.Event()

    def change():
        changes = 0
        while not done.is_set():
            ops.set_isa(ISAS[changes % len(ISAS)])
            changes += 1
        return changes

    def forward(x, expected):
        for _ in range(at_length(1000, 60)):
            fresh = x.clone()
            for layer, y in zip(layers, expected, strict=True):  # they share the quantized input
                assert_same_bits(layer(fresh), y)

    with forced_isa(ops.isa()), ThreadPoolExecutor(len(inputs) + 1) as pool:
        changes = pool.submit(change)
        forwards = [pool.submit(forward, *case) for case in zip(inputs, expected, strict=True)]
        try:
            for running in forwards:
                running.result()
        finally:
            done.set()
        assert changes.result() > 10


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("tokens", [1, 7, 24, 29])
def test_equal_inputs_are_quantized_to_equal_bytes(name, tokens):
    """Those that nobody reads too, whatever was in memory before."""
    x, perm = torch.randn(tokens, 333), torch.randperm(333).int()
    at_hand = set()
    with forced_isa(name):
        first = ops.quantize_input(x, perm, 5, 7)
        for _ in range(300):
            quantized = ops.quantize_input(x, perm, 5, 7)
            assert torch.equal(quantized, first)
            quantized.fill_(0xA5)
            at_hand.add(quantized.data_ptr())
            del quantized
    assert len(at_hand) < 300  # some were made of what was overwritten


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("group_size", [2**40, 2**60, 2**62, 2**63 - 1])
def test_a_group_may_be_larger_than_any_layer(name, group_size):
    w, x, perm = torch.randn(16, 70), torch.randn(9, 70), torch.randperm(70).int()
    with forced_isa(name):
        results = [
            ops.w4a4_linear(x, *ops.pack_weight(w, perm, 3, g), perm, None, 16, g, per_token=per)
            for g in (67, group_size)
            for per in (False, True)
        ]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_isa_errors():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'.*scalar"):
        ops.set_isa("sse9")
    used = ops.isa()
    other_family = "neon" if "neon" not in ISAS else "avx2"
    with pytest.raises(RuntimeError, match=f"this processor lacks .* '{other_family}'"):
        ops.set_isa(other_family)
    assert ops.isa() == used


@pytest.mark.long
def test_environment_variable_forces_the_isa(run_python):
    code = "from smoothquant import ops; print(ops.isa())"
    for name in ISAS:
        assert run_python(code, MIXEDQUANT_ISA=name).stdout.strip() == name
    broken = run_python(code, MIXEDQUANT_ISA="sse9", check=False)
    assert broken.returncode != 0
    assert "RuntimeError: environment variable MIXEDQUANT_ISA" in broken.stderr
