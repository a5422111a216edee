"""Decoder layers whose small steps run in one or two calls.

Between its attention product and the next one, a decoder layer does a dozen small steps. Called
one by one, they cost more than their arithmetic: each reads and writes memory, allocates and goes
through Python and torch's dispatcher. `place_and_fuse` gives decoder layers of the families that
`smoothquant.models.families` describes a forward that computes

1. the norm and the linears that read it (q, k and v) in one call,
2. the attention by transformers' own module, with its caches, masks and kernels,
3. the rest in one call: o, the residual sum, the norm, the MLP, the residual sum.

For one token per sequence and plain attention, all of it is one call, and so are all layers of a
model: each but the last notes what it has to do and returns its input. Results differ from those of
the separate steps in the last bits, by the order of sums and the approximation of e^x.

The separate steps are used for everything else: gradients, training, GPUs, tracing and compiling,
autocast, classes other than transformers' own, hooks on inner modules (transformers leaves some
after ``output_attentions=True``), and modules that were replaced, for example by adapters.
"""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.huge_pages import move_to_huge_pages
from ..core.tensors import FLOATS
from ..kernels import ops
from ..kernels.control import _C
from ..models.families import DecoderParts, decoder_layers, decoder_parts
from .linear import RETURN_INPUT, QuantizedLinear, W4A4Linear, kernel_choices, precomputed

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # mq_dtype
MOST_HEAD_DIM = 512  # of mq_attend and mq_rotary
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "ReLU": "relu"}

_enabled = os.environ.get("MIXEDQUANT_FUSED_LAYERS", "1") != "0"


def use_fused_layers(enabled: bool) -> None:
    """Turn the fused decoder layers of all models on or off. They are on, unless the environment
    variable ``MIXEDQUANT_FUSED_LAYERS`` is 0 at import."""
    global _enabled
    _enabled = enabled


def place_and_fuse(model: nn.Module) -> None:
    """Prepare a quantized model for speed on the CPU; results change only in the last bits.

    Moves the quantized layers' tensors to huge pages, and gives the decoder layers of known
    families their fused forward.
    """
    runs: list[list[Tensor]] = []
    if parts := decoder_parts(model):
        for name in decoder_layers(model):
            layer = model.get_submodule(name)
            runs += [*_runs(layer, parts.qkv), *_runs(layer, parts.gate_up)]
            _mix_in(FusedLayer, layer)
            _PARTS[layer] = parts
            stack = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            # The model itself keeps its class: users compare it.
            if stack is not model and _is_original(type(stack)):
                _mix_in(FusedStack, stack)
    placed = {id(t) for run in runs for t in run}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    rest = [t for m in packed for t in m.buffers(recurse=False) if id(t) not in placed]
    move_to_huge_pages([*runs, *([t] for t in rest)])


def unfuse(model: nn.Module) -> None:
    """Give decoder layers the class that they had before `place_and_fuse`."""
    for layer in model.modules():
        if isinstance(layer, _Fused):
            layer.__class__ = layer.float_class
            _PARTS.pop(layer, None)
            _STATES.pop(layer, None)


def _runs(layer: nn.Module, names: Sequence[str]) -> list[list[Tensor]]:
    """The packed tensors of linears that can be one call if these follow each other in memory."""
    children = [_child(layer, name) for name in names]
    linears = [m for m in children if type(m) is W4A4Linear]
    if len(linears) < len(children):
        return []
    parts = (*ops.PACKED, "bias")
    buffers = [[linear._buffers[part] for linear in linears] for part in parts]
    return [[t for t in run if t is not None] for run in buffers]


class _Fused(nn.Module):
    """Mixed into the classes of modules by `place_and_fuse`."""

    float_class: Any  # the class before
    known_forward: tuple[Any]  # its forward when the module was fused

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; its base can be found by name.
        reduced: Any = super().__reduce_ex__(protocol)
        mixin = FusedLayer if isinstance(self, FusedLayer) else FusedStack
        return (_new_module, (mixin, self.float_class, _PARTS.get(self)), *reduced[2:])


class FusedLayer(_Fused):
    """Mixed into the class of a decoder layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls = _calls_of(self)
        waiting = bool(calls.steps)
        if waiting and hidden_states is not calls.x:
            raise RuntimeError(
                f"{type(self).__name__} got other hidden states than the layer before it returned; "
                "call smoothquant.layers.decoder.use_fused_layers(False)"
            )
        fused = None
        if not args and not self.training and (waiting or _takes(hidden_states)):
            fused = _state_of(self)
        if (
            fused is None
            or fused.dtype != hidden_states.dtype
            or hidden_states.shape[-1] != fused.children[fused.parts.o].out_features
        ):
            return super().forward(calls.finish(hidden_states), *args, **kwargs)
        return fused.run(hidden_states, kwargs, calls, is_last=calls.layers[-1] is self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        _STATES.pop(self, None)  # its tensors' memory would outlast a move
        return super()._apply(*args, **kwargs)


class FusedStack(_Fused):
    """Mixed into the class of the module whose ``layers`` are decoder layers: it runs them one
    after another, and does nothing with what one hands to the next."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_known = self.float_class.forward is self.known_forward[0]
        if torch.compiler.is_compiling() or not _enabled or not is_known:
            return super().forward(*args, **kwargs)
        config: Any = self.config
        modules: Any = self._modules["layers"]
        layers: Any = list(modules)[: getattr(config, "num_hidden_layers", None)]
        outer = getattr(_running, "calls", None)
        calls = _running.calls = _Calls(layers)
        try:
            result = super().forward(*args, **kwargs)
        finally:
            _running.calls = outer
        if calls.steps:
            raise RuntimeError(f"{type(self).__name__} did not run its last decoder layer")
        return result


_running = threading.local()  # calls: those of the FusedStack that runs in a thread, or None


class _Calls:
    """The calls of a stack's layers that wait for the last one, to become a single call.

    steps: arguments of `_C.decode`.
    x: hidden states [B, 1, K] before the first of them; each of these layers returned x.
    tokens, given, addresses: what the last layer had in its cache, its mask and position
        embeddings, and where these are. Others of the same stack mostly have the same.
    caches: the layers of the cache, which count the token in once it is written.
    memory: what the steps point to.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.steps: list[tuple[Any, ...]] = []
        self.x: Tensor | None = None
        self.tokens = -1
        self.given: tuple[Any, Any] = (None, None)
        self.addresses: tuple[Any, ...] = ()
        self.caches: list[Any] = []
        self.memory: list[Any] = []

    def may_wait(self) -> bool:
        """Whether nobody looks at what a layer returns but the next layer."""
        return all(
            isinstance(layer, FusedLayer)
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
            and "forward" not in layer.__dict__
            for layer in self.layers
        )

    def finish(self, x: Tensor) -> Tensor:
        """The hidden states after all layers that wait; x if none does."""
        if not self.steps:
            return x
        out = torch.empty_like(x)
        steps, self.steps = self.steps, []
        _C.decode(steps, DTYPES[x.dtype], x.data_ptr(), len(x), out.data_ptr())
        for layer in self.caches:
            layer.take_one_more()
        self.caches, self.memory, self.tokens = [], [], -1
        return out


def _calls_of(layer: nn.Module) -> _Calls:
    """The calls of the stack that runs, or of a layer that runs by itself."""
    calls: _Calls | None = getattr(_running, "calls", None)
    if calls is not None and (calls.steps or layer in calls.layers):
        return calls
    return _Calls([layer])


def _mix_in(mixin: type[_Fused], module: nn.Module) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _fused_class(mixin, type(module))


def _fused_class(mixin: type, base: Any) -> Any:
    if base not in _CLASSES:
        members = {
            "__module__": base.__module__,
            "float_class": base,
            "known_forward": (base.forward,),  # in a tuple, or it would be a method
        }
        _CLASSES[base] = type(base.__name__, (mixin, base), members)
    return _CLASSES[base]


_CLASSES: dict[type, type] = {}


def _new_module(mixin: type, base: type, parts: DecoderParts | None) -> nn.Module:
    module: nn.Module = nn.Module.__new__(_fused_class(mixin, base))
    if parts is not None:
        _PARTS[module] = parts
    return module


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
        and torch.autograd.forward_ad._current_level < 0
        and not nn.modules.module._has_any_global_hook()
    )


# By layer, not in it, because copies and pickles of a layer must not hold addresses.
_PARTS: weakref.WeakKeyDictionary[nn.Module, DecoderParts] = weakref.WeakKeyDictionary()
_STATES: weakref.WeakKeyDictionary[nn.Module, tuple[_Source, _Prepared | None]] = (
    weakref.WeakKeyDictionary()
)


class _Source:
    """The modules and tensors of a layer at one time, with what finds them again quickly."""

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        # where a module or tensor is registered, and under which name
        self.places: list[tuple[dict[str, Any], str]] = []
        for name in names:
            parent, _, child = name.rpartition(".")
            self.places.append((layer.get_submodule(parent)._modules, child))
        modules = [places[name] for places, name in self.places]
        self.attributes = [m.__dict__ for m in modules]
        self.forwards = [(c, c.forward) for c in {layer.float_class, *map(type, modules)}]
        self.places += [
            (places, name)
            for m in modules
            for places in (m._parameters, m._buffers)
            for name in places
        ]
        self.objects = [places[name] for places, name in self.places]
        self.tensors = [t for t in self.objects if isinstance(t, Tensor)]
        self.addresses = [t.data_ptr() for t in self.tensors]
        # Which are compared with each other, once
        perms = (m._buffers.get("perm") for m in modules)
        self.perms = [t for t in perms if t is not None and not t.is_inference()]
        self.versions = [t._version for t in self.perms]
        # A tensor may get other memory while a call in another thread reads this.
        self.memory = [t.untyped_storage() for t in self.tensors]

    def is_overridden(self) -> bool:
        """Whether a module has hooks, or a forward of its own, as some libraries give it."""
        for own in self.attributes:
            if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return True
        return False

    def is_current(self) -> bool:
        """Whether the layer still consists of the same modules and tensors, at the same addresses:
        moving a module sets ``.data``."""
        try:
            objects = [places[name] for places, name in self.places]
        except KeyError:
            return False
        return (
            all(map(operator.is_, objects, self.objects))
            and [t.data_ptr() for t in self.tensors] == self.addresses
            and [t._version for t in self.perms] == self.versions
            and all(c.forward is forward for c, forward in self.forwards)
        )


def _state_of(layer: nn.Module) -> _Prepared | None:
    """The prepared calls of a layer, made anew if a module or tensor was replaced; None if they
    cannot be made or would pass over something."""
    known = _STATES.get(layer)
    if known is None or not known[0].is_current():
        parts = _PARTS.get(layer)
        if parts is None or any(_child(layer, name) is None for name in parts.names):
            return None
        activation = _activation(layer, parts)
        source = _Source(layer, parts.names + ((activation,) if activation else ()))
        fused = _prepared(layer, parts)
        if fused is not None:
            fused.memory = source.memory
        known = _STATES[layer] = source, fused
    source, fused = known
    return None if source.is_overridden() else fused


def _child(layer: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = layer
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def _activation(layer: nn.Module, parts: DecoderParts) -> str | None:
    """The path of the MLP's activation, if that is a module."""
    paths = (f"{parts.mlp}.{name}" for name in ("act_fn", "activation_fn"))
    return next((path for path in paths if _child(layer, path) is not None), None)


def _prepared(layer: nn.Module, parts: DecoderParts) -> _Prepared | None:
    """The prepared calls; None if a part is not what they can compute."""
    children: dict[str | None, Any] = {name: _child(layer, name) for name in parts.names}
    norms: dict[str | None, Any] = {}
    for name in parts.norms:
        norms[name] = _norm(children[name], parts.norm_offset)
    linears = [
        _linear([children[name] for name in names])
        for names in (parts.qkv, (parts.o,), parts.gate_up, (parts.down,))
    ]
    function = _child(layer, _activation(layer, parts) or "")
    activation = ACTIVATIONS.get(type(function).__name__)
    if activation is None or None in norms.values() or None in linears:
        return None
    own_code = [layer.float_class, type(function)]  # type: ignore[list-item]
    own_code += [type(children[name]) for name in (parts.attention, parts.mlp, *parts.norms)]
    if not all(map(_is_original, own_code)):
        return None
    dtypes = {norm.dtype for norm in norms.values()}
    if len(dtypes) > 1:
        return None
    qkv, o, gate_up, down = (linear for linear in linears if linear is not None)
    calls = {name: norm.call for name, norm in norms.items()}
    norm = calls[parts.attention_norm]
    rest = _C.Rest(
        o,
        calls.get(parts.attention_post),
        calls[parts.mlp_norm],
        gate_up,
        activation,
        down,
        calls.get(parts.mlp_post),
    )
    attention = _attention(parts, children)
    return _Prepared(
        parts=parts,
        children=children,
        norm=norm,
        qkv=qkv,
        rest=rest,
        layer=None if attention is None else _C.Layer(norm, qkv, attention, rest),
        kv_heads=0 if attention is None else attention.kv_heads,
        dtype=dtypes.pop(),
    )


def _attention(parts: DecoderParts, children: Mapping[str | None, Any]) -> Any:
    """The attention of one token per sequence; None if it is not a plain one."""
    module = children[parts.attention]
    size, scale = getattr(module, "head_dim", 0), getattr(module, "scaling", None)
    if not parts.plain_attention or len(parts.qkv) != 3 or not isinstance(scale, float):
        return None
    widths = [children[name].out_features for name in parts.qkv]
    if size < 2 or size % 2 or size > MOST_HEAD_DIM or any(n % size for n in widths):
        return None
    q, k, v = (n // size for n in widths)
    return _C.Attention(q, k, size, scale) if k == v and q % k == 0 else None


def _is_original(cls: Any) -> bool:
    """Whether a class and its forward are transformers' or torch's own."""
    return (
        cls.__module__.startswith(("transformers.models.", "transformers.activations", "torch.nn."))
        and cls.forward.__module__ == cls.__module__
    )


class _Norm(NamedTuple):
    call: _C.Norm
    dtype: torch.dtype


def _norm(module: nn.Module | None, offset: float) -> _Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    if weight.dtype not in FLOATS or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    return _Norm(_C.Norm(weight.numel(), weight.data_ptr(), eps, offset), weight.dtype)


def _linear(modules: Sequence[nn.Module | None]) -> _C.Linear | None:
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
        for a, b in zip((*one._packed(), one.bias), (*other._packed(), other.bias), strict=True):
            if a is None or b is None:
                if a is not b:
                    return None
            elif a.dtype != b.dtype or a.data_ptr() + a.nbytes != b.data_ptr():
                return None
    bias = first.bias
    if bias is not None and bias.dtype not in FLOATS:
        return None
    salient_scales = first.salient_scales
    return _C.Linear(
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


@dataclass
class _Prepared:
    """The prepared calls of one layer.

    layer: all of it for one token per sequence; None if its attention is not a plain one.
    memory: what they point to, kept alive.
    """

    parts: DecoderParts
    children: dict[str | None, Any]
    norm: _C.Norm
    qkv: _C.Linear
    rest: _C.Rest
    layer: _C.Layer | None
    kv_heads: int
    dtype: torch.dtype
    memory: list[Any] = field(default_factory=list)

    def run(self, x: Tensor, kwargs: dict[str, Any], calls: _Calls, *, is_last: bool) -> Tensor:
        """The hidden states after the layer, or x if it waits for the next one."""
        from .cache import growing_layer  # it imports transformers

        module, o = self.children[self.parts.attention], self.children[self.parts.o]
        past = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = growing_layer(past, getattr(module, "layer_idx", 0))
        x = x.contiguous()
        if layer is not None and self.layer and x.dim() == 3 and x.shape[1] == 1:
            step = self._step(x, layer, calls, **kwargs)
            if step is not None:
                waits = not is_last and (bool(calls.steps) or calls.may_wait())
                calls.x = x
                calls.steps.append(step)
                return x if waits else calls.finish(x)
        x = calls.finish(x)
        linears = [self.children[name] for name in self.parts.qkv]
        sizes = [linear.out_features for linear in linears]
        dtype, rows = DTYPES[x.dtype], x.numel() // x.shape[-1]
        y = x.new_empty((*x.shape[:-1], sum(sizes)))
        _C.norm_linear(self.norm, self.qkv, dtype, x.data_ptr(), rows, y.data_ptr())
        # The attention module calls its linears with whatever it is given: here with x, only for
        # its shape. They answer with what is computed already; o hands its input through.
        values = dict(zip(linears, y.split(sizes, -1), strict=True))
        with precomputed({**values, o: RETURN_INPUT}):
            attended = module(hidden_states=x, **kwargs)[0].contiguous()
        if attended.dtype != x.dtype or attended.shape != (*x.shape[:-1], o.in_features):
            return self._rest_by_steps(x, attended)
        out = torch.empty_like(x)
        self.rest.run(dtype, attended.data_ptr(), x.data_ptr(), rows, out.data_ptr())
        return out

    def _rest_by_steps(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention product, for an attention function of another dtype or
        shape."""

        def norm(name: str | None, y: Tensor) -> Tensor:
            return y if name is None else self.children[name](y)

        parts = self.parts
        h = x + norm(parts.attention_post, self.children[parts.o](attended))
        y = self.children[parts.mlp](norm(parts.mlp_norm, h))
        return h + norm(parts.mlp_post, y)

    def _step(
        self,
        x: Tensor,
        layer: Any,
        calls: _Calls,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Any = None,
        use_cache: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **unknown: Any,
    ) -> tuple[Any, ...] | None:
        """The layer's step of `_C.decode` for one token per sequence; None if an argument asks for
        anything but usual attention."""
        module: Any = self.children[self.parts.attention]
        if (
            layer in calls.caches  # the token of another decoder layer is not written yet
            or any(value is not None for value in unknown.values())
            or position_embeddings is None
            or module.config._attn_implementation != "sdpa"
            or module.training
            or not layer.is_initialized
            or getattr(cache or past_key_values, "offloading", False)
        ):
            return None
        sequences, tokens = len(x), layer.get_seq_length()
        given = attention_mask, position_embeddings
        if tokens != calls.tokens or not all(map(operator.is_, given, calls.given)):
            mask, (cos, sin) = attention_mask, position_embeddings
            if mask is not None and (
                mask.dtype != torch.bool
                or mask.shape != (sequences, 1, 1, tokens + 1)
                or not mask.any(-1).all()
            ):
                return None
            if (
                any(t.dtype != x.dtype or not t.is_contiguous() for t in (cos, sin))
                or cos.shape != sin.shape
                or cos.shape not in ((1, 1, module.head_dim), (sequences, 1, module.head_dim))
            ):
                return None
            mask = None if mask is None else mask.contiguous()
            calls.memory.append((mask, given))
            calls.tokens, calls.given = tokens, given
            calls.addresses = (
                cos.data_ptr(),
                sin.data_ptr(),
                len(cos) == 1,
                0 if mask is None else mask.data_ptr(),
            )
        places = layer.room_for_one_more(sequences, self.kv_heads, module.head_dim, x.dtype)
        if places is None:
            return None
        keys, values = places
        calls.memory.append((self, places))
        calls.caches.append(layer)
        pointers = keys.data_ptr(), values.data_ptr()
        sizes = keys.shape[-2], layer.plain_tokens()
        return (self.layer, *calls.addresses, *pointers, *sizes, layer.block_arguments())
