"""Types of the compiled extension (csrc/torch/module.cpp)."""

def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def build_info() -> dict[str, str]: ...

# The parts of a decoder layer (csrc/torch/decoder.cpp). Addresses are of CPU tensors, which the
# caller keeps alive; 0 for none. dtype: the number of an mq_dtype.

class Linear:
    def __init__(
        self,
        n: int,
        k: int,
        k_salient: int,
        group_size: int,
        qweight: int,
        scales: int,
        salient: int,
        salient_dtype: int,
        salient_scales: int,
        perm: int,
        bias: int,
        bias_dtype: int,
        rotation: int,
        act_bits: int,
        act_format: str,
        per_token: bool,
        clip: float,
    ) -> None: ...

class Norm:
    def __init__(self, k: int, weight: int, eps: float, offset: float) -> None: ...

class Rest:
    def __init__(
        self,
        o: Linear,
        attention_post: Norm | None,
        mlp_pre: Norm | None,
        gate_up: Linear,
        activation: str,
        down: Linear,
        mlp_post: Norm | None,
    ) -> None: ...
    def run(self, dtype: int, attended: int, residual: int, rows: int, out: int) -> None: ...

class Attention:
    kv_heads: int
    def __init__(self, heads: int, kv_heads: int, head_dim: int, scale: float) -> None: ...

class Layer:
    def __init__(self, norm: Norm, qkv: Linear, attention: Attention, rest: Rest) -> None: ...

Blocks = tuple[int, int, int, int, int, int, int]

def decode(
    steps: list[tuple[Layer, int, int, bool, int, int, int, int, int, Blocks]],
    dtype: int,
    x: int,
    sequences: int,
    out: int,
) -> None: ...
def norm_linear(norm: Norm, linear: Linear, dtype: int, x: int, rows: int, out: int) -> None: ...
