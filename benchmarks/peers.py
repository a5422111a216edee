"""Other libraries' 8-bit and 4-bit linears on the CPU, for linear.py.

Every function takes a weight [N, K], the number of copies to rotate over, the tokens per call and
the number of threads. It returns (layers, bytes of one copy's weights); a layer maps x [M, K] to
[M, N]. It raises ImportError or RuntimeError if the library is missing or cannot do this.

- w8a8: torch's dynamically quantized linear, with the engine FBGEMM or oneDNN.
- int4pack: torch's `_weight_int4pack_mm_for_cpu`, bf16 activations, g = 128.
- onnxruntime: MatMulNBits at accuracy_level 4 (int8 activations), g = 128. Its threads do not spin,
  because each copy is a session with its own threads.
- ggml: llama.cpp's Q4_0 (g = 32, int8 activations), in the repacked layout that it chooses. Its
  input is copied into its own tensor before the clock starts.
"""

import ctypes
import glob
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Layer = Callable[[torch.Tensor], torch.Tensor]


def w8a8(
    w: torch.Tensor, copies: int, m: int, threads: int, *, engine: str
) -> tuple[list[Layer], float]:
    quantized = torch.ops.quantized
    scales = w.abs().amax(1).double() / 127
    codes = torch.quantize_per_channel(w, scales, torch.zeros(len(w)).long(), 0, torch.qint8)
    chosen = torch.backends.quantized.engine
    torch.backends.quantized.engine = (
        engine  # a packed weight keeps using the engine that packed it
    )
    try:
        packed = [quantized.linear_prepack(codes, None) for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = chosen
    return [lambda x, p=p: quantized.linear_dynamic(x, p, False) for p in packed], w.numel()


def four_bits(w: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to (codes in [1, 15] around 8, int32 [N, K]; scales [N, K / group_size])."""
    if w.shape[1] % group_size:
        raise RuntimeError(f"{w.shape[1]} channels are not a multiple of {group_size}")
    groups = w.unflatten(1, (-1, group_size))
    scales = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scales).round().clamp(-7, 7) + 8
    return codes.flatten(1).int(), scales.squeeze(-1)


def int4pack(w: torch.Tensor, copies: int, m: int, threads: int) -> tuple[list[Layer], float]:
    codes, scales = four_bits(w, 128)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    table = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    pairs = [(packed.clone(), table.clone()) for _ in range(copies)]
    layers: list[Layer] = [lambda x, p=p, t=t: multiply(x.bfloat16(), p, 128, t) for p, t in pairs]
    return layers, packed.nbytes + table.nbytes


def onnxruntime(w: torch.Tensor, copies: int, m: int, threads: int) -> tuple[list[Layer], float]:
    import onnx
    import onnxruntime as ort

    n, k = w.shape
    codes, scales = four_bits(w, 128)
    pairs = codes.to(torch.uint8).view(n, -1, 64, 2)
    packed = pairs[..., 0] | pairs[..., 1] << 4
    attributes = {"K": k, "N": n, "bits": 4, "block_size": 128, "accuracy_level": 4}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **attributes
    )
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", kind, [None, k])],
        [onnx.helper.make_tensor_value_info("y", kind, [None, n])],
        [
            onnx.numpy_helper.from_array(packed.numpy(), "w"),
            onnx.numpy_helper.from_array(scales.numpy().reshape(-1), "scales"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [
        ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        for _ in range(copies)
    ]
    layers: list[Layer] = [
        lambda x, s=session: torch.from_numpy(s.run(None, {"x": x.numpy()})[0])
        for session in sessions
    ]
    return layers, packed.nbytes + scales.nbytes


class Ggml:
    """llama.cpp's tensor library, from the installed package llama_cpp."""

    F32, Q4_0 = 0, 2

    def __init__(self) -> None:
        import importlib.util

        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = os.path.join(os.path.dirname(str(spec.origin)), "lib")
        self.libraries = [
            ctypes.CDLL(glob.glob(f"{folder}/lib{name}.*")[0], mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        # an attribute, because the library keeps calling it
        self.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        self("ggml_log_set", self.silence, ctypes.c_void_p(None))
        self.backend = self("ggml_backend_cpu_init")
        registry = self("ggml_backend_cpu_reg")
        device = self("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        address = self(
            "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        extra = listed(address.value)(device)
        names = {}
        index = 0
        while extra and extra[index]:
            name = self("ggml_backend_buft_name", ctypes.c_void_p(extra[index]), to=ctypes.c_char_p)
            names[name] = extra[index]
            index += 1
        if b"CPU_REPACK" not in names:
            raise RuntimeError(f"ggml cannot repack weights here, it has only {sorted(names)}")
        self.repacked = names[b"CPU_REPACK"]
        self.contexts: list[ctypes.c_void_p] = []
        self.buffers: list[ctypes.c_void_p] = []
        self.plain = self("ggml_backend_cpu_buffer_type")

    def __call__(self, name: str, *args: Any, to: Any = ctypes.c_void_p) -> Any:
        """Call a function of the library; integers are passed as pointers."""
        library = next(library for library in self.libraries if hasattr(library, name))
        function = getattr(library, name)
        function.restype = to
        result = function(*[ctypes.c_void_p(a) if type(a) is int else a for a in args])
        return ctypes.c_void_p(result) if to is ctypes.c_void_p else result

    def context(self) -> ctypes.c_void_p:
        class Parameters(ctypes.Structure):
            _fields_ = [
                ("size", ctypes.c_size_t),
                ("buffer", ctypes.c_void_p),
                ("no_alloc", ctypes.c_bool),
            ]

        self.contexts.append(self("ggml_init", Parameters(1 << 20, None, True)))
        return self.contexts[-1]

    def allocate(self, context: ctypes.c_void_p, buffer_type: ctypes.c_void_p) -> None:
        buffer = self("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
        self.buffers.append(buffer)

    def free(self) -> None:
        for buffer in self.buffers:
            self("ggml_backend_buffer_free", buffer, to=None)
        for context in self.contexts:
            self("ggml_free", context, to=None)
        self.buffers, self.contexts = [], []

    def tensor(
        self,
        context: ctypes.c_void_p,
        kind: int,
        columns: int,
        rows: int,
        buffer_type: ctypes.c_void_p,
    ) -> ctypes.c_void_p:
        sizes = ctypes.c_int64(columns), ctypes.c_int64(rows)
        tensor = self("ggml_new_tensor_2d", context, ctypes.c_int(kind), *sizes)
        self.allocate(context, buffer_type)
        return tensor

    def layers(
        self, w: torch.Tensor, copies: int, m: int, threads: int
    ) -> tuple[list[Layer], float]:
        self.free()  # the previous layers have been measured
        n, k = w.shape
        zero = ctypes.c_size_t(0)
        size = n * k // 32 * 18
        codes = torch.empty(size, dtype=torch.uint8)
        start, rows, columns = map(ctypes.c_int64, (0, n, k))
        kind = ctypes.c_int(self.Q4_0)
        self(
            "ggml_quantize_chunk", kind, w.data_ptr(), codes.data_ptr(), start, rows, columns, None
        )
        self("ggml_backend_cpu_set_n_threads", self.backend, ctypes.c_int(threads))
        inputs = self.tensor(self.context(), self.F32, k, m, self.plain)

        def layer() -> Layer:
            weight = self.tensor(self.context(), self.Q4_0, k, n, self.repacked)
            amount = ctypes.c_size_t(size)
            self("ggml_backend_tensor_set", weight, codes.data_ptr(), zero, amount)
            context = self.context()
            product = self("ggml_mul_mat", context, weight, inputs)
            self.allocate(context, self.plain)
            graph = self("ggml_new_graph", context)
            self("ggml_build_forward_expand", graph, product)
            y = torch.empty(m, n)
            written: list[torch.Tensor] = []  # the input that is already in its tensor

            def run(x: torch.Tensor) -> torch.Tensor:
                if not written:
                    nbytes = ctypes.c_size_t(x.nbytes)
                    self("ggml_backend_tensor_set", inputs, x.data_ptr(), zero, nbytes)
                    written.append(x)
                status = compute(self.backend, graph)
                if status:
                    raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
                return y

            def result(x: torch.Tensor) -> torch.Tensor:
                run(x)
                nbytes = ctypes.c_size_t(y.nbytes)
                self("ggml_backend_tensor_get", product, y.data_ptr(), zero, nbytes)
                return y

            run.result = result  # type: ignore[attr-defined]
            return run

        compute = next(
            library.ggml_backend_graph_compute
            for library in self.libraries
            if hasattr(library, "ggml_backend_graph_compute")
        )
        compute.restype = ctypes.c_int
        return [layer() for _ in range(copies)], size


_ggml: list[Ggml] = []


def ggml(w: torch.Tensor, copies: int, m: int, threads: int) -> tuple[list[Layer], float]:
    if not _ggml:
        _ggml.append(Ggml())
    return _ggml[0].layers(w, copies, m, threads)


# {name of the row: (function that makes its layers, approximate bytes per weight, limit of
# benchmarks/limits.c for its arithmetic (None: the instruction set in use))}
PEERS: dict[str, tuple[Callable[..., tuple[list[Layer], float]], float, str | None]] = {
    "torch W8A8 FBGEMM": (partial(w8a8, engine="fbgemm"), 1.0, None),
    "torch W8A8 oneDNN": (partial(w8a8, engine="onednn"), 1.0, None),
    "torch int4pack bf16 g128": (int4pack, 0.56, "bf16"),
    "onnxruntime MatMulNBits g128": (onnxruntime, 0.56, None),
    "llama.cpp Q4_0 g32": (ggml, 0.56, None),
}
