"""The ops on CUDA tensors, against the CPU's: bit for bit, but for sums of floats in another order.

On a card where there is one. Everywhere, the same tests on an emulated one: shim and kernels, made
for the CPU (tests/cuda/device.cpp), where CPU tensors pass for CUDA ones. What only a card has
(streams, graphs, memory) is tested there alone, and skipped visibly elsewhere.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from length import at_length
from programs import CC, CXX, EMULATED, FLAGS, ROOT, built, run, run_all, version
from transformers import AutoModelForCausalLM

from smoothquant import MixedQuantConfig, quantize
from smoothquant.channels.sorting import choose_channels
from smoothquant.channels.statistics import ChannelStats
from smoothquant.kernels import ops
from smoothquant.layers.linear import W4A4Linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_CARD = "no CUDA card here, or a build without CUDA: this was not run on a GPU"


def on_card(test):
    return pytest.mark.card(pytest.mark.skipif(not ops.has_cuda(), reason=NO_CARD)(test))


EMULATED_ARCH = 80
LIBRARY = "emulated.so"


def build_emulated(folder: Path) -> None:
    """Build the library of CUDA ops with emulated kernels."""
    torch_folder = Path(torch.__file__).parent
    shim = ["-std=c++20", "-O1", *FLAGS]
    shim += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_folder / 'include'}"]
    shim += [f'-DMQ_BUILD_CUDA_ARCHS="{EMULATED_ARCH}"']
    commands = {
        ROOT / "tests" / "cuda" / "device.cpp": [*CXX, *shim],
        ROOT / "csrc" / "torch" / "cuda.cpp": [*CXX, *shim],
        ROOT / "csrc" / "cpu" / "shape.c": [*CC, "-std=c11", *FLAGS],
    }
    for source in [*(ROOT / "csrc" / "cuda").glob("*.cu"), ROOT / "tests/cuda/emulator.cpp"]:
        commands[source] = [*CXX, f"-DMQ_ARCH={EMULATED_ARCH}", *EMULATED]
    compile_only = ["-fPIC", "-fvisibility=hidden", "-c"]
    objects = {source: str(folder / f"{source.name}.o") for source in commands}
    run_all(
        [*command, *compile_only, str(source), "-o", objects[source]]
        for source, command in commands.items()
    )
    library = str(folder / LIBRARY)
    # -Bsymbolic: device.cpp's functions, not libtorch's of the same names
    link = [*CXX, "-shared", "-Wl,-Bsymbolic", *objects.values(), "-o", library]
    run(*link, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs")


class Card:
    """Calls an op with the CPU's tensors moved to the GPU."""

    @property
    def arch(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def call(self, name: str, args: tuple) -> tuple[object, list]:
        """What it returns, and its arguments afterwards; all on the CPU."""
        on_gpu = [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]
        result = getattr(torch.ops.mixedquant, name)(*on_gpu)
        torch.cuda.synchronize()
        back = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in on_gpu]
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result), back


class EmulatedCard:
    """Calls an op's CUDA function with the CPU's tensors themselves."""

    arch = EMULATED_ARCH
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(self, name: str, args: tuple) -> tuple[object, list]:
        own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return getattr(torch.ops.mixedquant, name).default.redispatch(self.cuda, *own), own


@pytest.fixture(scope="module")
def emulated_card():
    how = (EMULATED, FLAGS, torch.__version__, version(*CC), version(*CXX))
    torch.ops.load_library(built("emulated-ops", build_emulated, *how) / LIBRARY)
    return EmulatedCard()


@pytest.fixture(
    params=[pytest.param("card", marks=pytest.mark.card) if ops.has_cuda() else "emulated"]
)
def card(request):
    return Card() if request.param == "card" else request.getfixturevalue("emulated_card")


def assert_same_as_on_cpu(card, name: str, *args: object) -> None:
    """Results and what is written to arguments, in bits."""
    own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    expected = getattr(torch.ops.mixedquant, name)(*own)
    actual, after = card.call(name, args)
    tree = torch.utils._pytree
    for one, other in zip(
        tree.tree_leaves((actual, after)), tree.tree_leaves((expected, own)), strict=True
    ):
        if isinstance(other, torch.Tensor):
            assert_same_bits(one, other)
        else:
            assert one == other


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Over some decades, with zeros and what is not finite."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-4, 4, shape[-1:])
    special = torch.tensor([0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan])
    chosen = special[torch.randint(len(special), shape)]
    return torch.where(torch.rand(shape) < 0.01, chosen, x).to(dtype)


# rows, columns, group size
SHAPES = [
    (0, 5, 2),
    (3, 0, 4),
    (1, 1, 1),
    (5, 131, 16),
    (4, 300, 128),
    (2, 1300, 1100),
    (3, 70, 99),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols, group_size", SHAPES)
def test_group_ops(card, dtype, rows, cols, group_size):
    x = values(rows, cols, dtype=dtype)
    for num_bits, is_unsigned in ((2, False), (4, False), (8, True)):
        assert_same_as_on_cpu(card, "group_quantize", x, group_size, num_bits, is_unsigned)
        q, scales = ops.group_quantize(x, group_size, num_bits, is_unsigned)
        assert_same_as_on_cpu(card, "group_dequantize", q, scales, group_size, dtype)
    for act_format, clip in (("symmetric", 1.0), ("unsigned", 0.9), ("zero_point", 0.5)):
        assert_same_as_on_cpu(card, "group_fake_quantize", x, group_size, 4, act_format, clip)
    for rotation in (0, 4, 512):
        assert_same_as_on_cpu(card, "group_hadamard", x, group_size, rotation)


@pytest.mark.parametrize("cols", [0, 1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_nibbles(card, cols, dtype):
    q = torch.randint(0, 16, (3, 2, cols), dtype=torch.uint8).to(dtype)
    assert_same_as_on_cpu(card, "pack_nibbles", q)
    assert_same_as_on_cpu(card, "unpack_nibbles", ops.pack_nibbles(q), cols, dtype == torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(0, 3), (23, 1), (40, 300)])
def test_statistics_keys_and_argsort(card, dtype, rows, cols):
    stats = ChannelStats.empty(cols)
    for _ in range(2):
        x = values(rows, cols, dtype=dtype)
        assert_same_as_on_cpu(card, "channel_stats_update", x, *stats.to_dict().values())
        stats.update(x)
    fields = (stats.count, stats.abs_max, stats.abs_sum, stats.sq_sum, stats.argmax)
    for key in ("argmax", "max", "mean3std", "rms"):
        assert_same_as_on_cpu(card, "sort_keys", *fields, key)
        keys = torch.ops.mixedquant.sort_keys(*fields, key)
        for descending in (False, True):
            assert_same_as_on_cpu(card, "argsort", keys, descending)


# n, k, salient channels, group size, rotation
LAYERS = [
    (0, 4, 1, 2, 0),
    (3, 0, 0, 4, 0),
    (1, 1, 1, 1, 0),
    (17, 33, 3, 8, 4),
    (40, 100, 100, 4, 0),
    (33, 256, 0, 64, 64),
    (150, 301, 17, 32, 0),
    (35, 1300, 20, 1100, 512),
    (290, 300, 30, 128, 128),
    # without salient channels, so that bits are compared: groups of an odd number of steps, of an
    # odd number of quads, and of a half step
    (70, 480, 0, 96, 32),
    (40, 210, 0, 20, 4),
    (40, 200, 0, 16, 16),
]


def layer_args(n, k, num_salient, group_size, rotation, dtype, salient_dtype):
    """(weight, arguments of pack_weight behind it), (packed tensors and perm)."""
    w, perm = torch.randn(n, k).to(dtype), torch.randperm(k).int()
    packing = (perm, num_salient, group_size, rotation, 4, None, salient_dtype)
    return (w, *packing), (*ops.pack_weight(w, *packing), perm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("salient_dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", LAYERS)
def test_weights_are_packed_and_unpacked(card, dtype, salient_dtype, shape):
    packing, packed = layer_args(*shape, dtype, salient_dtype)
    assert_same_as_on_cpu(card, "pack_weight", *packing)
    assert_same_as_on_cpu(card, "unpack_weight", *packed, shape[0], *shape[3:])
    if shape[0]:
        rows = torch.randint(shape[0], (7,))
        assert_same_as_on_cpu(card, "unpack_rows", *packed, rows, shape[0], *shape[3:])
        rows[2:4] = torch.tensor([-1, shape[0]])
        (unpacked, _) = card.call("unpack_rows", (*packed, rows, shape[0], *shape[3:]))
        assert unpacked[2:4].isnan().all() and unpacked[[0, 1, 4, 5, 6]].isfinite().all()
    groups = packed[1].shape[1]
    given = torch.rand(shape[0], groups)
    assert_same_as_on_cpu(card, "pack_weight", *packing[:6], given, salient_dtype)


@pytest.mark.parametrize("rows, cols, col0", [(0, 4, 0), (5, 1, 7), (30, 40, 24)])
def test_column_loops(card, rows, cols, col0):
    scales = torch.rand(rows, 20) * (torch.rand(rows, 20) > 0.1)
    u = torch.triu(torch.rand(cols, cols)) + torch.eye(cols)
    assert_same_as_on_cpu(card, "gptq_block", torch.randn(rows, cols), u, scales, col0, 4, 4)
    of_column = scales[:, (col0 + torch.arange(cols)) // 4]
    w = torch.randint(-7, 8, (rows, cols)) * of_column
    h = torch.randn(cols, 2 * cols)
    gradient, h = torch.randn(rows, cols), h @ h.T
    assert_same_as_on_cpu(card, "descend_block", w, gradient, h, scales, col0, 4, 4)


FORMATS = [
    (4, "symmetric", False, 1.0),
    (3, "symmetric", True, 0.9),
    (4, "unsigned", False, 1.0),
    (4, "zero_point", False, 0.8),
    (8, "symmetric", False, 1.0),
    (7, "zero_point", True, 0.9),
]


def assert_linear(card, x, packed, bias, shape, options):
    """y = the CPU's, but for the order of sums in fp32; bits where that is the same."""
    n, k, num_salient, group_size, rotation = shape
    args = (x, *packed, bias, n, group_size, rotation, *options, None)
    expected = torch.ops.mixedquant.w4a4_linear(*args)
    actual, _ = card.call("w4a4_linear", args)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if num_salient == 0 and x.shape[0] > 64:  # the kernel for many tokens adds groups in order
        assert_same_bits(actual, expected)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    w = ops.unpack_weight(*packed, n, group_size, rotation)
    terms = k - (k - num_salient) // max(1, min(group_size, k)) * (group_size - 1) + 8
    largest = x.float().nan_to_num(0, 0, 0).abs().sum(1, keepdim=True) * max(1, rotation) ** 0.5
    bound = terms * 2**-24 * largest * w.abs().amax(1) if k else torch.zeros(())
    bound = bound + 2 * torch.finfo(x.dtype).eps * expected.abs().float()
    wrong = (actual.float() - expected.float()).abs() > bound
    wrong &= expected.isfinite()
    assert not wrong.any(), (actual[wrong], expected[wrong])


@pytest.mark.parametrize("dtype", at_length(DTYPES, [torch.bfloat16]))
@pytest.mark.parametrize("salient_dtype", at_length([torch.bfloat16, torch.int8], [torch.int8]))
@pytest.mark.parametrize("shape", LAYERS)
def test_linear(card, dtype, salient_dtype, shape):
    n, k = shape[:2]
    _, packed = layer_args(*shape, dtype, salient_dtype)
    biases = [None, torch.randn(n), torch.randn(n).to(dtype)]
    # each format by kernels for few and for many tokens
    calls = zip((0, 1, 9, 40, 130, 70, 70, 70, 70, 70, 5, 20), 2 * FORMATS, strict=True)
    for i, (m, form) in enumerate(calls):
        x = torch.randn(m, k).to(dtype)
        if m > 1 and k:
            x[1] = 0
            x[0, k // 2] = math.nan if i % 2 else math.inf
        assert_linear(card, x, packed, biases[i % 3], shape, form)


@pytest.mark.parametrize("k", [24064, 24568, 24576])  # of halves: 47 KiB, almost 48, and 48
def test_scales_of_tokens_that_fill_the_shared_memory(card, k):
    shape = (5, k, 16, 128, 0)
    _, packed = layer_args(*shape, torch.float16, torch.float16)
    assert_linear(card, torch.randn(2, k).half(), packed, None, shape, FORMATS[1])


def test_linear_of_any_strides_and_alignment(card):
    shape = (40, 128, 16, 32, 0)
    _, packed = layer_args(*shape, torch.float16, torch.float16)
    storage = torch.randn(70 * 128 + 1).half()
    odd = storage[1:].view(70, 128)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape) for t in packed[:3]]
    for to, tensor in zip(shifted, packed, strict=False):
        to.copy_(tensor)
    for x in (odd, odd[::2], torch.randn(128, 70).half().T):
        expected, _ = card.call("w4a4_linear", (x.contiguous().clone(), *packed, None, *SHORT))
        for tensors in (packed, (*shifted, *packed[3:])):
            actual, _ = card.call("w4a4_linear", (x, *tensors, None, *SHORT))
            assert_same_bits(actual, expected)
    cube, _ = card.call("w4a4_linear", (odd.view(2, 35, 128), *packed, None, *SHORT))
    flat, _ = card.call("w4a4_linear", (odd, *packed, None, *SHORT))
    assert_same_bits(cube.view(70, 40), flat)


SHORT = (40, 32, 0, *FORMATS[0], None)  # arguments of w4a4_linear behind the bias


def test_mistakes_are_value_errors(card):
    _, packed = layer_args(40, 128, 16, 32, 0, torch.float32, torch.bfloat16)
    x, w = torch.randn(3, 128), torch.randn(4, 6)
    perm = torch.arange(6).int()
    twice = torch.tensor([0, 1, 2, 3, 4, 4]).int()
    outside = torch.tensor([0, 1, 2, 3, 4, 6]).int()
    packing = (0, 4, 0, 4, None, torch.bfloat16)
    long = 2**20 + 1
    huge = ops.pack_weight(torch.ones(1, long), torch.arange(long).int(), 0, long)
    quantized = ops.quantize_input(x, packed[4], 16, 32)
    cases = {
        r"group_size must be at least 1; got 0": ("group_quantize", (x, 0, 4, False)),
        r"num_bits must be in \[2, 8\]; got 9": ("group_quantize", (x, 4, 9, False)),
        r"x must be float32.*got Double": ("group_hadamard", (x.double(), 4, 4)),
        r"rotation must be.*got 3": ("group_hadamard", (x, 4, 3)),
        r"act_format must be.*'log'": ("group_fake_quantize", (x, 4, 4, "log", 1.0)),
        r"cols must be two per byte.*got 7": ("unpack_nibbles", (x.byte(), 7, False)),
        r"q must be int8": ("pack_nibbles", (x,)),
        r"x must end in 128 channels; got shape \[3, 6\]": (
            "w4a4_linear",
            (torch.randn(3, 6), *packed, None, *SHORT),
        ),
        r"bias must have shape \[40\]; got \[39\]": (
            "w4a4_linear",
            (x, *packed, torch.zeros(39), *SHORT),
        ),
        r"quantized_input must be None": (
            "w4a4_linear",
            (x, *packed, None, *SHORT[:-1], quantized),
        ),
        r"quantize_input.*quantized_input must be None": (
            "quantize_input",
            (x, packed[4], 16, 32, 0, *FORMATS[0]),
        ),
        r"group_size may be up to 1048576 on CUDA; got 1048577": (
            "w4a4_linear",
            (torch.ones(1, long), *huge, torch.arange(long).int(), None, 1, long, *SHORT[2:]),
        ),
        r"perm must hold every channel in \[0, 6\) once": ("pack_weight", (w, twice, *packing)),
        r"perm must hold every channel .* once": ("pack_weight", (w, outside, *packing)),
        r"a weight is NaN or Inf": ("pack_weight", (w / 0, perm, *packing)),
        r"a scale or clip ratio": (
            "pack_weight",
            (w, perm, *packing[:4], -torch.ones(4, 2), torch.bfloat16),
        ),
        r"scales must have 2 groups or more; got 1": (
            "gptq_block",
            (w, torch.eye(6), torch.ones(4, 1), 0, 3, 4),
        ),
        r"key must be.*'median'": (
            "sort_keys",
            (*(ChannelStats.empty(3).to_dict()[f] for f in SORTED), "median"),
        ),
    }
    for message, (name, args) in cases.items():
        with pytest.raises(ValueError, match=f"mixedquant::{name}: .*{message}|{message}"):
            card.call(name, args)


SORTED = ("count", "abs_max", "abs_sum", "sq_sum", "argmax")


@pytest.fixture
def force(card):
    yield ops.set_cuda_kernel
    ops.set_cuda_kernel(None)


def test_the_table_of_kernels(card):
    rows = ops.cuda_kernels()
    by_name = {row.name: row for row in rows}
    # sm_90a may be missing from a build
    assert by_name.pop("prefill_wgmma", WGMMA) == WGMMA
    assert list(by_name) == ["decode_8", "decode_16", "decode_32", "prefill_s4", "prefill_s8"]
    assert rows[0] == ("decode_8", 75, None, 8, 1, 8)
    assert by_name["prefill_s4"] == ("prefill_s4", 75, 89, None, 1, 4)
    # few tokens first, and one for anything last
    limits = [row.most_tokens or math.inf for row in rows]
    assert limits == sorted(limits)
    assert rows[-1][1:] == (75, None, None, 1, 8)


WGMMA = ("prefill_wgmma", 90, 90, None, 128, 8)


def test_a_forced_kernel_multiplies(card, force):
    """One that adds groups in order, as the CPU does, and one whose warps share the groups."""
    shape = (40, 2048, 0, 16, 0)
    _, packed = layer_args(*shape, torch.float32, torch.bfloat16)
    args = (torch.randn(9, 2048), *packed, None, 40, 16, 0, *FORMATS[0], None)
    expected = torch.ops.mixedquant.w4a4_linear(*args)
    for name, in_order in (("prefill_s8", True), ("decode_8", False)):
        force(name)
        assert ops.forced_cuda_kernel() == name
        assert torch.equal(card.call("w4a4_linear", args)[0], expected) == in_order
    chosen = card.call("w4a4_linear", args)[0]
    force(None)
    assert ops.forced_cuda_kernel() is None
    torch.testing.assert_close(card.call("w4a4_linear", args)[0], chosen)


def test_kernels_that_cannot_be_forced(card, force):
    with pytest.raises(ValueError, match="name must be None or one of decode_8, .*; got 'fast'"):
        force("fast")
    assert ops.forced_cuda_kernel() is None
    _, packed = layer_args(40, 128, 16, 32, 0, torch.float32, torch.bfloat16)
    arch = card.arch
    # the one for Turing to Ada on newer cards, the one for Hopper's groups of 128 elsewhere
    choosy = [
        row
        for row in ops.cuda_kernels()
        if 32 % row.group_multiple or not row.oldest <= arch <= (row.newest or arch)
    ]
    assert choosy or arch < 90  # Hopper's may be missing from a build
    for row in choosy:
        force(row.name)
        limits = f"'{row.name}'.*multiple of {row.group_multiple} .*{arch}, group_size 32"
        with pytest.raises(ValueError, match=f"forced kernel {limits}"):
            card.call("w4a4_linear", (torch.randn(3, 128), *packed, None, *SHORT))


def test_a_kernel_of_nibbles_takes_no_wide_activations(card, force):
    _, packed = layer_args(40, 128, 16, 32, 0, torch.float32, torch.bfloat16)
    if 75 <= card.arch < 90:
        force("prefill_s4")
        with pytest.raises(ValueError, match="act_bits up to 4; got .*, act_bits 8"):
            card.call(
                "w4a4_linear", (torch.randn(3, 128), *packed, None, *SHORT[:3], *FORMATS[4], None)
            )


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize(
    "k, group_size", at_length([(256, 256), (3000, 3000), (1024, 128)], [(256, 256), (1024, 128)])
)
def test_the_largest_sums(card, m, k, group_size, code):
    """Every code at an end of its range."""
    _, (qweight, *packed) = layer_args(24, k, 0, group_size, 0, torch.float32, torch.bfloat16)
    qweight = torch.full_like(qweight, code)
    for sign in (1, -1):
        for form in FORMATS:
            args = (sign * torch.ones(m, k), qweight, *packed, None, 24, group_size, 0, *form, None)
            expected = torch.ops.mixedquant.w4a4_linear(*args)
            torch.testing.assert_close(card.call("w4a4_linear", args)[0], expected)


@pytest.mark.long
def test_environment_variable_forces_a_kernel(run_python):
    code = "from smoothquant import ops; print(ops.forced_cuda_kernel())"
    for name, known in (("prefill_s8", True), ("fast", False)):
        result = run_python(code, check=False, MIXEDQUANT_CUDA_KERNEL=name)
        if known and ops.has_cuda():
            assert result.stdout.strip() == name
            continue
        reason = "name must be" if ops.has_cuda() else "no CUDA kernels are loaded"
        assert "RuntimeError: environment variable MIXEDQUANT_CUDA_KERNEL: " in result.stderr
        assert reason in result.stderr


def test_a_bad_perm_in_a_linear_makes_nans(card):
    shape = (40, 128, 16, 32, 0)
    _, packed = layer_args(*shape, torch.float32, torch.bfloat16)
    packed[4][5] = 200
    y, _ = card.call("w4a4_linear", (torch.randn(70, 128), *packed, None, *SHORT))
    assert y.isnan().all()


def test_every_op_of_the_cpu_has_a_cuda_function(card):
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name for s in schemas if s.name.startswith("mixedquant::")}
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here: they would run")
@pytest.mark.parametrize(
    "command",
    at_length(
        [
            [sys.executable, "benchmarks/card.py"],
            [sys.executable, "benchmarks/card_kernels.py"],
            [sys.executable, "benchmarks/card_model.py"],
            ["benchmarks/card.sh"],
        ],
        [["benchmarks/card.sh"]],
    ),
)
def test_without_a_card_the_scripts_fail_and_say_so(command):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nothing was" in result.stderr and "CUDA card" in result.stderr
    assert result.stdout == ""


@pytest.mark.long
def test_the_model_benchmark_runs_without_a_card(tmp_path):
    """At toy size: its rows, and a CUDA graph that cannot be had as a reason."""
    result = subprocess.run(
        [sys.executable, "benchmarks/card_model.py", *TOY, "--json", str(tmp_path / "rows.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    report = [sys.executable, "benchmarks/report.py", str(tmp_path / "rows.json")]
    table = run(*report).splitlines()
    assert "2 layers of 256 channels; prompt of 9 tokens, batch of 1." in table[0]
    assert table[2:] == result.stdout.splitlines()[2:]
    phases = ["prefill", "decode, eager", "decode, graph"]
    assert [row["phase"] for row in rows] == 2 * phases
    assert [row["contender"] for row in rows] == ["bf16"] * 3 + ["W4A4 g64 p0.05"] * 3
    for row in rows:
        if "graph" in row["phase"]:
            assert row["failed"] == "RuntimeError: CUDA graphs need a CUDA card"
        else:
            assert row["tokens_per_second"] > 0 and row["ratio"] > 0
    of_linears = 2 * (4 * 256 * 256 + 3 * 256 * 688)  # of both layers
    saved = rows[0]["weight_bytes"] - rows[-1]["weight_bytes"]
    bits = 16 - 8 * saved / of_linears
    assert 4 < bits < 5.2
    for row in rows:
        assert f"| {row['contender']} | {row['weight_bytes'] / 2**20:.0f} | - |" in result.stdout


TOY = ["--device", "cpu", "--layers", "2", "--hidden", "256", "--prompt", "9", "--new", "2"]
TOY += ["--turns", "2", "--group-size", "64", "--modes", "eager", "graph"]


def test_the_report_draws_what_a_card_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import card
    import report

    def row(name: str, weight_bytes: int, m: int, median: float, ratio: float) -> dict:
        contender = card.Contender(name, weight_bytes, None, None, 8, 0.1)
        return card.row_of(contender, 64, 32, m, median, ratio)

    rows = [row(card.BASELINE, 4096, 1, 2e-6, 1.0), row("W4A4 g64 p0", 1100, 1, 1e-6, 2.0)]
    rows += [row(card.BASELINE, 4096, 512, 8e-6, 1.0), row("W4A4 g64 p0", 1100, 512, 5e-6, 1.6)]
    limits = {"GPU": {"memory": 3.0, "fp16": 200.0, "int8": 400.0}}
    record = {"chip": "a card", "torch": "2", "date": "today", "limits": limits, "rows": rows}
    record["baseline"] = card.BASELINE
    activations = {"k": 64, "m": 9, "choice": "g64", "microseconds": 3.0}
    record["activations"] = [activations | {"gigabytes_per_second": 2.0, "of_copy": 0.5}]
    table = report.tables(record)
    assert table.startswith("a card; torch 2; today\n")
    assert "| 64 | 9 | g64 | 3.0 | 2 | 50% |" in table
    assert "Milliseconds of cuBLAS fp16, then times its speed." in table
    assert "| 64 x 32 | 1 | 0.0020 ms | 2.00 |" in table
    assert "| 64 x 32 | 512 | 0.0080 ms | 1.60 |" in table
    assert rows[1]["gmacs"] == pytest.approx(64 * 32 / 1e-6 / 1e9)
    report.roofline(record, str(tmp_path / "roofline.png"))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_weights_as_the_w4a16_peer_packs_them(monkeypatch):
    """Up to torch's own function, which lays them out for a card."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import card

    packed = {}
    monkeypatch.setattr(card, "to_int4pack", lambda pairs, tiles: packed.setdefault("w", pairs))
    w = torch.randn(8, 256)
    x = torch.randn(2, 256).bfloat16().float()
    (_, table), _, product = card.int4pack(w, x)
    codes = torch.stack([packed["w"] >> 4, packed["w"] & 15], -1).flatten(1).float()
    scales, zeros = table.float().permute(2, 1, 0)
    again = (codes.unflatten(1, (2, 128)) - 8) * scales[..., None] + zeros[..., None]
    assert table.shape == (2, 8, 2)
    assert (again.flatten(1) - w).norm() < 0.15 * w.norm()
    torch.testing.assert_close(product, x @ again.flatten(1).T)


@pytest.mark.parametrize("num_salient", [0, 13])
def test_what_the_benchmark_expects_of_a_linear(monkeypatch, num_salient):
    """One wrong scale of a weight, which a bound on the exact linear would not see, is too much."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import card

    _, packed = layer_args(24, 300, num_salient, 64, 0, torch.float32, torch.bfloat16)
    x = torch.randn(20, 300)
    expected = card.dequantized(x, packed[:4], packed[4], 24, 64)
    y = ops.w4a4_linear(x, *packed, None, 24, 64)
    assert card.relative(y, expected) < 1e-5
    packed[1][0, 0] *= 2
    assert card.relative(ops.w4a4_linear(x, *packed, None, 24, 64), expected) > card.MOST_ERROR


# ---- What only a card has ----


@pytest.fixture
def quantized_model(make_model):
    """A tiny LLaMA whose linears are W4A4, on the CPU."""
    model = make_model("llama")
    quantize(model, MixedQuantConfig(group_size=20, salient_prop=0.1), progress=False)
    return model


@on_card
def test_a_model_moves_to_the_gpu_and_generates(quantized_model, token_ids):
    with torch.no_grad():
        expected = quantized_model(token_ids).logits
        on_gpu = quantized_model.to("cuda")
        assert all(t.is_cuda for t in (*on_gpu.parameters(), *on_gpu.buffers()))
        logits = on_gpu(token_ids.cuda()).logits.cpu()
    # attention in another order of sums now and then rounds an activation the other way
    assert (logits - expected).norm() < 0.05 * expected.norm()
    ids = on_gpu.generate(token_ids.cuda(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.is_cuda and ids.shape == (2, token_ids.shape[1] + 5)
    assert torch.equal(ids[:, : token_ids.shape[1]].cpu(), token_ids)


@on_card
@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}])
def test_device_maps(device_map, quantized_model, token_ids, tmp_path):
    quantized_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    layers = quantized_layers(loaded)
    assert layers and all(layer.qweight.is_cuda for layer in layers)
    for layer, own in zip(layers, quantized_layers(quantized_model), strict=True):
        assert torch.equal(layer.qweight.cpu(), own.qweight)
    with torch.no_grad():
        logits = loaded(token_ids.cuda()).logits.cpu()
        expected = quantized_model(token_ids).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


def quantized_layers(model):
    return [m for m in model.modules() if isinstance(m, W4A4Linear)]


@pytest.fixture
def layer():
    """A layer 96 -> 80 on the GPU, with some input on the CPU."""
    weight, x = torch.randn(80, 96), torch.randn(20, 96)
    stats = ChannelStats.empty(96)
    stats.update(x)
    plan = choose_channels(stats, salient_prop=0.1)
    config = MixedQuantConfig(group_size=32, salient_prop=0.1)
    return W4A4Linear.from_weight(weight, torch.randn(80), config, plan).cuda(), x


@on_card
def test_a_layer_moves_to_the_gpu_and_back(layer):
    on_gpu, x = layer
    y = on_gpu(x.cuda())
    assert y.is_cuda
    torch.testing.assert_close(y.cpu(), on_gpu.cpu()(x), rtol=1e-5, atol=1e-5)


@on_card
def test_opcheck():
    from test_ops import op_arguments

    for name, args in op_arguments().items():
        if name == "quantize_input":
            continue
        on_gpu = tuple(arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args)
        torch.library.opcheck(getattr(torch.ops.mixedquant, name).default, on_gpu)


@on_card
@pytest.mark.large
@pytest.mark.parametrize("prop", [0, 0.05])
@pytest.mark.parametrize("k, n", [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_large_linears_by_every_kernel(force, monkeypatch, k, n, prop):
    """Right, the same each time, and the same by all kernels that add in one order."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import card

    arch = Card().arch
    names = [r.name for r in ops.cuda_kernels() if r.oldest <= arch <= (r.newest or arch)]
    perm = torch.randperm(k).int().cuda()
    packed = ops.pack_weight(torch.randn(n, k, device="cuda"), perm, int(prop * k), 128)
    for m in (65, 300, 4096):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

        def multiply(name, x=x):
            force(name)
            return ops.w4a4_linear(x, *packed, perm, None, n, 128)

        expected, in_order = card.dequantized(x, packed, perm, n, 128), multiply("prefill_s8")
        for name in names:
            y = multiply(name)
            assert card.relative(y.float(), expected) < card.MOST_ERROR, (name, m)
            assert all(torch.equal(multiply(name), y) for _ in range(3)), (name, m)
            if prop == 0 and name.startswith("prefill"):
                assert torch.equal(y, in_order), (name, m)


@on_card
@pytest.mark.large
def test_generation_with_a_static_cache_and_torch_compile(quantized_model, token_ids):
    model, ids = quantized_model.to("cuda"), token_ids.cuda()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"cache_implementation": "static", "return_dict_in_generate": True}
    expected = model.generate(ids, disable_compile=True, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True)
    found = model.generate(ids, disable_compile=True, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found.sequences.shape == expected.sequences.shape
    one, other = found.logits[0], expected.logits[0]
    assert (one - other).norm() < 0.05 * other.norm()


@on_card
@pytest.mark.large
def test_torch_compile(layer):
    on_gpu, x = layer
    x = x.cuda()
    expected = on_gpu(x + 1)
    compiled = torch.compile(lambda x: on_gpu(x + 1), fullgraph=True)
    assert_same_bits(compiled(x).cpu(), expected.cpu())


@on_card
def test_a_cuda_graph_replays_on_new_input(layer):
    on_gpu, x = layer
    for m in (1, 20):
        still = x[:m].cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_gpu(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = on_gpu(still)
        for seed in range(3):
            torch.manual_seed(seed)
            still.copy_(torch.randn(m, 96))
            graph.replay()
            assert_same_bits(y.cpu(), on_gpu(still).cpu())


@on_card
def test_kernels_run_on_the_current_stream(layer):
    """Behind a slow kernel of a side stream: on any other stream they would read old values."""
    on_gpu, x = layer
    x = x.cuda()
    inputs, streams = [x.clone() for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for i, (own, stream) in enumerate(zip(inputs, streams, strict=True)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            own.mul_(i + 2)
            outputs.append(on_gpu(own))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert_same_bits(y.cpu(), on_gpu(x * (i + 2)).cpu())


@on_card
def test_the_current_device_stays(layer):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: tensors of another device than the current one were not tested")
    on_gpu, x = layer
    expected = on_gpu(x.cuda()).cpu()
    other = on_gpu.to("cuda:1")
    with torch.cuda.device(0):
        assert_same_bits(other(x.to("cuda:1")).cpu(), expected)
        assert torch.cuda.current_device() == 0


@on_card
def test_tensors_elsewhere_are_refused(layer):
    on_gpu, x = layer
    with pytest.raises(ValueError, match="must be on cuda:0, like the other arguments"):
        q, scales = ops.group_quantize(x, 8)
        ops.group_dequantize(q.cuda(), scales, 8)
    with pytest.raises(ValueError, match="x must be on the CUDA device of the other arguments"):
        on_gpu(x)


@on_card
@pytest.mark.large
def test_offsets_beyond_two_to_the_31():
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free; offsets beyond 2^31 need 16")
    rows, cols = (2**31 + 4096) // 64, 64
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(cols)
    y = ops.group_fake_quantize(x, 32)
    assert_same_bits(y[-1:].cpu(), ops.group_fake_quantize(x[-1:].cpu(), 32))
    assert not y[:-1].any()
    del y
    perm = torch.arange(cols, dtype=torch.int32)
    packed = ops.pack_weight(torch.randn(1, cols), perm, 0, 32)
    args = [t if t is None else t.cuda() for t in (*packed, perm, None)]
    y = ops.w4a4_linear(x, *args, 1, 32)
    last = ops.w4a4_linear(x[-1:].cpu().expand(65, -1), *packed, perm, None, 1, 32)[-1:]
    assert_same_bits(y[-1:].cpu(), last)
