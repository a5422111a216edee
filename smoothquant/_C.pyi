"""Types of the compiled extension (csrc/torch/module.cpp)."""

from typing import Any

from torch import Tensor

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
    def __init__(self, heads: int, kv_heads: int, head_dim: int, scale: float) -> None: ...

class Layer:
    def __init__(self, norm: Norm, qkv: Linear, attention: Attention, rest: Rest) -> None: ...

class Caches:
    def __init__(
        self, caches: list[tuple[int, int, int, int, int, int, int, int, int, int]]
    ) -> None: ...

def decode(
    layers: list[Layer],
    caches: Caches,
    tokens: int,
    cos: int,
    sin: int,
    one_position: bool,
    mask: int,
    dtype: int,
    x: int,
    sequences: int,
    out: int,
) -> None: ...
def norm_linear(norm: Norm, linear: Linear, dtype: int, x: int, rows: int, out: int) -> None: ...

# Whether modules and tensors are still what they were (csrc/torch/snapshot.cpp).

class Snapshot:
    """places: (dict, key) of objects. attributes: the __dict__ of modules, which are plain without
    hooks, training, and a forward of their own. classes: those of which a forward is called.
    tensors: those whose addresses are used. versioned: tensors whose values are."""

    def __init__(
        self,
        places: list[tuple[dict[str, Any], str]],
        attributes: list[dict[str, Any]],
        classes: list[type],
        tensors: list[Tensor],
        versioned: list[Tensor],
    ) -> None: ...
    def is_current(self) -> bool: ...
    def is_plain(self) -> bool: ...

def all_hold(snapshots: list[Snapshot]) -> bool:
    """Whether all are current and plain."""
