"""Decoder layers whose small steps run in one or two calls.

Between its attention product and the next one, a decoder layer does a dozen small steps. Called
one by one, they cost more than their arithmetic: each reads and writes memory, allocates and goes
through Python and torch's dispatcher. `place_and_fuse` gives decoder layers of the families that
`smoothquant.models.families` describes a forward that computes

1. the norm and the linears that read it (q, k and v) in one call,
2. the attention by transformers' own module, with its caches, masks and kernels,
3. the rest in one call: o, the residual sum, the norm, the MLP, the residual sum.

For one token per sequence and plain attention, all of it is one call. Results differ from those of
the separate steps only by the order of sums. The separate
steps are used for everything else: gradients, training, GPUs, tracing and compiling, autocast,
hooks on inner modules, and linears that were replaced, for example by adapters.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.huge_pages import move_to_huge_pages
from ..core.tensors import FLOATS
from ..kernels import ops
from ..kernels.control import _C
from ..models.families import DecoderParts, decoder_layers, decoder_parts
from .linear import PASS, QuantizedLinear, W4A4Linear, handed, kernel_choices

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # mq_dtype
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "ReLU": "relu"}

_enabled = os.environ.get("MIXEDQUANT_FUSED_LAYERS", "1") != "0"


def use_fused_layers(enabled: bool) -> None:
    """Turn the fused decoder layers of all models on or off. They are on, unless the environment
    variable ``MIXEDQUANT_FUSED_LAYERS`` is 0 at import."""
    global _enabled
    _enabled = enabled


def place_and_fuse(model: nn.Module) -> None:
    """Prepare a quantized model for speed on the CPU; results change only in the norms' last bits.

    Moves the quantized layers' tensors to huge pages, and gives the decoder layers of known
    families their fused forward.
    """
    runs: list[list[Tensor]] = []
    if parts := decoder_parts(model):
        for name in decoder_layers(model):
            layer = model.get_submodule(name)
            runs += [*_runs(layer, parts.qkv), *_runs(layer, parts.gate_up)]
            if not isinstance(layer, FusedLayer):
                layer.__class__ = _fused_class(type(layer))
            _PARTS[layer] = parts
    placed = {id(t) for run in runs for t in run}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    rest = [t for m in packed for t in m.buffers(recurse=False) if id(t) not in placed]
    move_to_huge_pages([*runs, *([t] for t in rest)])


def unfuse(model: nn.Module) -> None:
    """Give decoder layers the class that they had before `place_and_fuse`."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            layer.__class__ = type(layer).__mro__[2]
            _PARTS.pop(layer, None)
            _STATES.pop(layer, None)


def _runs(layer: nn.Module, names: Sequence[str]) -> list[list[Tensor]]:
    """The packed tensors of linears that can be one call if these follow each other in memory."""
    children = [_child(layer, name) for name in names]
    linears = [m for m in children if type(m) is W4A4Linear]
    if len(linears) < len(children):
        return []
    buffers = [[linear._buffers[part] for linear in linears] for part in ops.PACKED]
    return [[t for t in run if t is not None] for run in buffers]


class FusedLayer(nn.Module):
    """Mixed into the class of a decoder layer by `place_and_fuse`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not _takes(hidden_states) or self.training:
            return super().forward(hidden_states, *args, **kwargs)
        fused = _state_of(self)
        if fused is None or fused.dtype != hidden_states.dtype:
            return super().forward(hidden_states, *args, **kwargs)
        return fused.run(hidden_states, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; its base can be found by name.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_layer, (type(self).__mro__[2], _PARTS.get(self)), *reduced[2:])


def _fused_class(base: type) -> Any:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (FusedLayer, base), {"__module__": base.__module__})
    return _CLASSES[base]


_CLASSES: dict[type, type] = {}


def _new_layer(base: type, parts: DecoderParts | None) -> nn.Module:
    layer: nn.Module = nn.Module.__new__(_fused_class(base))
    if parts is not None:
        _PARTS[layer] = parts
    return layer


def runs_fused(layer: nn.Module) -> bool:
    """Whether a decoder layer takes its fused forward for plain calls on the CPU."""
    return _enabled and isinstance(layer, FusedLayer) and _state_of(layer) is not None


def _takes(x: Tensor) -> bool:
    """Whether nothing but plain eager arithmetic on the CPU is asked for."""
    return (
        _enabled
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in FLOATS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not nn.modules.module._has_any_global_hook()
    )


# By layer, not in it, because copies and pickles of a layer must not hold addresses.
_PARTS: weakref.WeakKeyDictionary[nn.Module, DecoderParts] = weakref.WeakKeyDictionary()
_STATES: weakref.WeakKeyDictionary[nn.Module, tuple[_Source, _Fused | None]] = (
    weakref.WeakKeyDictionary()
)


class _Source:
    """The modules and tensors of a layer at one time, with what finds them again quickly."""

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        self.module_places: list[tuple[dict[str, Any], str]] = []
        for name in names:
            parent, _, child = name.rpartition(".")
            self.module_places.append((layer.get_submodule(parent)._modules, child))
        self.modules = [places[name] for places, name in self.module_places]
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.attributes = [m.__dict__ for m in self.modules]
        self.tensor_places: list[tuple[dict[str, Any], str]] = [
            (places, name)
            for m in self.modules
            for places in (m._parameters, m._buffers)
            for name, tensor in places.items()
            if tensor is not None
        ]
        self.tensors = [places[name] for places, name in self.tensor_places]
        self.addresses = [t.data_ptr() for t in self.tensors]

    def is_overridden(self) -> bool:
        """Whether a module has hooks, or a forward of its own, as some libraries give it."""
        return any(self.hooks) or any("forward" in own for own in self.attributes)

    def is_current(self) -> bool:
        """Whether the layer still consists of the same modules and tensors, at the same addresses:
        moving a module sets ``.data``."""
        try:
            modules = [places[name] for places, name in self.module_places]
            tensors = [places[name] for places, name in self.tensor_places]
        except KeyError:
            return False
        return (
            all(map(operator.is_, modules, self.modules))
            and all(map(operator.is_, tensors, self.tensors))
            and [t.data_ptr() for t in tensors] == self.addresses
        )


def _state_of(layer: nn.Module) -> _Fused | None:
    """The prepared calls of a layer, made anew if a module or tensor was replaced; None if they
    cannot be made or would pass over something."""
    known = _STATES.get(layer)
    if known is None or not known[0].is_current():
        parts = _PARTS.get(layer)
        if parts is None or any(_child(layer, name) is None for name in parts.names):
            return None
        source = _Source(layer, parts.names)
        fused = _fused(layer, parts)
        if fused is not None:  # a call in another thread may outlast the state
            fused.kept = (fused.kept, source.tensors)
        known = _STATES[layer] = source, fused
    source, fused = known
    return None if source.is_overridden() else fused


def _child(layer: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = layer
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def _fused(layer: nn.Module, parts: DecoderParts) -> _Fused | None:
    """The prepared calls; None if a part is not what they can compute."""
    children: dict[str | None, Any] = {name: _child(layer, name) for name in parts.names}
    norms: dict[str | None, Any] = {}
    for name in parts.norms:
        norms[name] = _norm(children[name], parts.norm_offset)
    linears = [
        _linear([children[name] for name in names])
        for names in (parts.qkv, (parts.o,), parts.gate_up, (parts.down,))
    ]
    mlp = children[parts.mlp]
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    activation = ACTIVATIONS.get(type(function).__name__)
    if activation is None or None in norms.values() or None in linears:
        return None
    dtypes = {norm.dtype for norm in norms.values()}
    if len(dtypes) > 1:
        return None
    qkv, o, gate_up, down = (linear.call for linear in linears if linear is not None)
    calls = {name: norm.call for name, norm in norms.items()}
    rest = _C.Rest(
        o,
        calls.get(parts.attention_post),
        calls[parts.mlp_norm],
        gate_up,
        activation,
        down,
        calls.get(parts.mlp_post),
    )
    return _Fused(
        children[parts.attention],
        [children[name] for name in parts.qkv],
        children[parts.o],
        calls[parts.attention_norm],
        qkv,
        rest,
        dtypes.pop(),
        (norms, linears),
        _attention(parts, children),
    )


def _attention(parts: DecoderParts, children: Mapping[str | None, Any]) -> Any:
    """The attention of one token per sequence; None if it is not a plain one."""
    module = children[parts.attention]
    size, scale = getattr(module, "head_dim", 0), getattr(module, "scaling", None)
    if not parts.plain_attention or len(parts.qkv) != 3 or not isinstance(scale, float):
        return None
    widths = [children[name].out_features for name in parts.qkv]
    if size < 2 or size % 2 or size > 512 or any(n % size for n in widths):
        return None
    q, k, v = (n // size for n in widths)
    return _C.Attention(q, k, size, scale) if k == v and q % k == 0 else None


class _Norm(NamedTuple):
    call: Any
    dtype: torch.dtype
    weight: Tensor


def _norm(module: nn.Module | None, offset: float) -> _Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    if weight.dtype not in FLOATS or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    return _Norm(_C.Norm(weight.numel(), weight.data_ptr(), eps, offset), weight.dtype, weight)


class _Linear(NamedTuple):
    call: Any
    bias: Tensor | None


def _linear(modules: Sequence[nn.Module | None]) -> _Linear | None:
    """One call for linears that read the same input and whose packed tensors follow each other in
    memory."""
    layers = [m for m in modules if type(m) is W4A4Linear]
    if len(layers) != len(modules):
        return None
    first = layers[0]
    choices = kernel_choices(first.config)
    for layer in layers:
        alike = (
            kernel_choices(layer.config) == choices
            and layer.config.non_finite == "propagate"
            and not layer.quantize_output
            and layer.perm.device.type == "cpu"
            and (layer.in_features, layer.num_salient, layer.group_size)
            == (first.in_features, first.num_salient, first.group_size)
            and (layer.bias is None) == (first.bias is None)
            and torch.equal(layer.perm, first.perm)
        )
        if not alike or (layer is not layers[-1] and layer.out_features % ops.PANEL):
            return None
    for one, other in pairwise(layers):
        for a, b in zip(one._packed(), other._packed(), strict=True):
            if a is None or b is None:
                if a is not b:
                    return None
            elif a.dtype != b.dtype or a.data_ptr() + a.nbytes != b.data_ptr():
                return None
    bias = None
    if first.bias is not None:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len({b.dtype for b in biases}) > 1 or biases[0].dtype not in FLOATS:
            return None
        bias = torch.cat(biases)
    salient_scales = first.salient_scales
    call = _C.Linear(
        sum(layer.out_features for layer in layers),
        first.in_features,
        first.num_salient,
        first.group_size,
        first.qweight.data_ptr(),
        first.scales.data_ptr(),
        first.salient_weight.data_ptr(),
        DTYPES[first.salient_weight.dtype],
        0 if salient_scales is None else salient_scales.data_ptr(),
        first.perm.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        choices.rotation,
        choices.act_bits,
        choices.act_format,
        choices.per_token,
        choices.clip,
    )
    return _Linear(call, bias)


class _Fused:
    """The prepared calls of one layer. `kept` keeps memory alive that they point to."""

    def __init__(
        self,
        attention: nn.Module,
        qkv: Sequence[W4A4Linear],
        o: W4A4Linear,
        norm: Any,
        qkv_call: Any,
        rest: Any,
        dtype: torch.dtype,
        kept: Any,
        plain_attention: Any,
    ) -> None:
        self.attention, self.qkv, self.o = attention, qkv, o
        self.norm, self.qkv_call, self.rest = norm, qkv_call, rest
        self.dtype, self.kept = dtype, kept
        self.sizes = [linear.out_features for linear in qkv]
        self.plain_attention = plain_attention

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        from .cache import growing_layer  # it imports transformers

        past = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = growing_layer(past, getattr(self.attention, "layer_idx", 0))
        x = x.contiguous()
        if layer is not None and self.plain_attention and x.dim() == 3 and x.shape[1] == 1:
            out = self._decode(x, layer, **kwargs)
            if out is not None:
                return out
        dtype, rows = DTYPES[x.dtype], x.numel() // x.shape[-1]
        y = x.new_empty((*x.shape[:-1], sum(self.sizes)))
        _C.norm_linear(self.norm, self.qkv_call, dtype, x.data_ptr(), rows, y.data_ptr())
        values = zip(self.qkv, y.split(self.sizes, -1), strict=True)
        # The attention module calls its linears with whatever it is given: here with x, only for
        # its shape. They answer with what is computed already; o hands its input through.
        with handed({**dict(values), self.o: PASS}):
            attended = self.attention(hidden_states=x, **kwargs)[0].contiguous()
        out = torch.empty_like(x)
        self.rest.run(dtype, attended.data_ptr(), x.data_ptr(), rows, out.data_ptr())
        return out

    def _decode(
        self,
        x: Tensor,
        layer: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Any = None,
        use_cache: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **unknown: Any,
    ) -> Tensor | None:
        """The layer's output for one token per sequence, in one call; None if an argument asks for
        anything but usual attention."""
        module: Any = self.attention
        sequences = len(x)
        if (
            any(value is not None for value in unknown.values())
            or position_embeddings is None
            or module.config._attn_implementation != "sdpa"
            or module.training
            or not layer.is_initialized
            or getattr(cache or past_key_values, "offloading", False)
        ):
            return None
        cos, sin = position_embeddings
        tokens = layer.get_seq_length()
        if attention_mask is not None and (
            attention_mask.dtype != torch.bool
            or attention_mask.shape != (sequences, 1, 1, tokens + 1)
            or not attention_mask.any(-1).all()
        ):
            return None
        if (
            any(t.dtype != x.dtype or not t.is_contiguous() for t in (cos, sin))
            or cos.shape != sin.shape
            or cos.shape not in ((1, 1, module.head_dim), (sequences, 1, module.head_dim))
        ):
            return None
        places = layer.room_for_one_more(sequences, x.dtype)
        if places is None:
            return None
        keys, values = places
        mask = None if attention_mask is None else attention_mask.contiguous()
        out = torch.empty_like(x)
        _C.decode(
            self.norm,
            self.qkv_call,
            self.plain_attention,
            self.rest,
            DTYPES[x.dtype],
            x.data_ptr(),
            sequences,
            cos.data_ptr(),
            sin.data_ptr(),
            len(cos) == 1,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[-2],
            tokens,
            0 if mask is None else mask.data_ptr(),
            out.data_ptr(),
        )
        layer.take_one_more()
        return out
