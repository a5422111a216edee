"""Decoder layers whose small steps run in one or two calls.

Between its attention product and the next one, a decoder layer does a dozen small steps. Called
one by one, they cost more than their arithmetic: each reads and writes memory, allocates and goes
through Python and torch's dispatcher. `place_and_fuse` gives decoder layers of the families that
`smoothquant.models.families` describes a forward that computes

1. the norm and the linears that read it (q, k and v) in one call,
2. the attention by transformers' own module, with its caches, masks and kernels,
3. the rest in one call: o, the residual sum, the norm, the MLP, the residual sum.

For one token per sequence and plain attention, all of it is one call, and so are all layers of a
model (`FusedStack`). Results differ from those of the separate steps in the last bits, by the order
of sums and the approximation of e^x.

The separate steps are used for everything else: gradients, training, GPUs, tracing and compiling,
autocast, classes other than transformers' own, hooks on inner modules (transformers leaves some
after ``output_attentions=True``), and modules that were replaced, for example by adapters.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.huge_pages import move_to_huge_pages
from ..core.tensors import FLOATS
from ..kernels import ops
from ..kernels.control import _C
from ..models.families import DecoderParts, decoder_layers, decoder_parts
from ..models.generation import known_while_generating
from .linear import RETURN_INPUT, QuantizedLinear, W4A4Linear, kernel_choices, precomputed

if TYPE_CHECKING:
    from .cache import GrowingLayer

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
            if parts.plain_attention and stack is not model and _is_original(type(stack)):
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
            for known in (_PARTS, _STATES, _STACKS):
                known.pop(layer, None)


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
        fused = None
        if not args and not self.training and _is_plain_eager(hidden_states):
            fused = _state_of(self)
        if (
            fused is None
            or fused.dtype != hidden_states.dtype
            or hidden_states.shape[-1] != fused.children[fused.parts.o].out_features
        ):
            return super().forward(hidden_states, *args, **kwargs)
        return fused.run(hidden_states, kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        _STATES.pop(self, None)  # its tensors' memory would outlast a move
        return super()._apply(*args, **kwargs)


class FusedStack(_Fused):
    """Mixed into the class of the module whose ``layers`` are decoder layers: it embeds tokens,
    runs the layers one after another, and ends with a norm. For one token per sequence, the layers
    are one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack = None
        is_known = self.float_class.forward is self.known_forward[0]
        if is_known and not args and _is_one_token(kwargs):
            stack = _stack_of(self)
        if stack is None:
            return super().forward(*args, **kwargs)
        return stack.run(self, super().forward, kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        _STACKS.pop(self, None)
        return super()._apply(*args, **kwargs)


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


def _is_one_token(kwargs: Mapping[str, Any]) -> bool:
    """Whether a stack is called for one token per sequence, and for nothing unusual."""
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    return isinstance(given, Tensor) and given.shape[1:2] == (1,) and _is_plain_eager(given)


def _is_plain_eager(x: Tensor) -> bool:
    """Whether nothing but plain eager arithmetic on the CPU is asked for."""
    return (
        _enabled
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not nn.modules.module._has_any_global_hook()
    )


# By module, not in it, because copies and pickles of a module must not hold addresses.
_PARTS: weakref.WeakKeyDictionary[nn.Module, DecoderParts] = weakref.WeakKeyDictionary()
_STATES: weakref.WeakKeyDictionary[nn.Module, tuple[_Source, _Prepared | None]] = (
    weakref.WeakKeyDictionary()
)
_STACKS: weakref.WeakKeyDictionary[nn.Module, _Stack] = weakref.WeakKeyDictionary()


class _Source:
    """The modules and tensors of a layer at one time.

    snapshot: tells whether they are still the same: moving a module sets ``.data``.
    memory: that of the tensors, which may get another while a call in another thread reads this.
    """

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        # where a module or tensor is registered, and under which name
        places: list[tuple[dict[str, Any], str]] = []
        for name in names:
            parent, _, child = name.rpartition(".")
            places.append((layer.get_submodule(parent)._modules, child))
        modules = [children[name] for children, name in places]
        places += [
            (own, name) for m in modules for own in (m._parameters, m._buffers) for name in own
        ]
        tensors = [t for own, name in places if isinstance(t := own[name], Tensor)]
        perms = (m._buffers.get("perm") for m in modules)  # compared with each other, once
        self.memory = [t.untyped_storage() for t in tensors]
        self.snapshot = _C.Snapshot(
            places,
            [m.__dict__ for m in modules],
            list({layer.float_class, *map(type, modules)}),
            tensors,
            [t for t in perms if t is not None and not t.is_inference()],
        )


def _state_of(layer: nn.Module) -> _Prepared | None:
    """The prepared calls of a layer, made anew if a module or tensor was replaced; None if they
    cannot be made or would pass over something."""
    known = _STATES.get(layer)
    if known is None or not known[0].snapshot.is_current():
        parts = _PARTS.get(layer)
        if parts is None or any(_child(layer, name) is None for name in parts.names):
            return None
        activation = _activation(layer, parts)
        source = _Source(layer, parts.names + ((activation,) if activation else ()))
        fused = _prepared(layer, parts)
        if fused is not None:
            fused.memory, fused.snapshot = source.memory, source.snapshot
        known = _STATES[layer] = source, fused
    source, fused = known
    return fused if source.snapshot.is_plain() else None


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
    snapshot: tells whether they still hold.
    """

    parts: DecoderParts
    children: dict[str | None, Any]
    norm: _C.Norm
    qkv: _C.Linear
    rest: _C.Rest
    layer: _C.Layer | None
    dtype: torch.dtype
    memory: list[Any] = field(default_factory=list)
    snapshot: _C.Snapshot | None = None

    @property
    def attention(self) -> Any:
        return self.children[self.parts.attention]

    @property
    def cache_index(self) -> int:
        """Which layer of a cache is the decoder layer's."""
        return getattr(self.attention, "layer_idx", 0)

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states after the layer."""
        from .cache import growing_layer  # it imports transformers

        x = x.contiguous()
        growing_layer(kwargs.get("cache", kwargs.get("past_key_values")), self.cache_index)
        if self.layer is not None and x.dim() == 3 and x.shape[1] == 1:
            decoded = self._decoded(x, **kwargs)
            if decoded is not None:
                return decoded
        o = self.children[self.parts.o]
        linears = [self.children[name] for name in self.parts.qkv]
        sizes = [linear.out_features for linear in linears]
        dtype, rows = DTYPES[x.dtype], x.numel() // x.shape[-1]
        y = x.new_empty((*x.shape[:-1], sum(sizes)))
        _C.norm_linear(self.norm, self.qkv, dtype, x.data_ptr(), rows, y.data_ptr())
        # The attention module calls its linears with whatever it is given: here with x, only for
        # its shape. They answer with what is computed already; o hands its input through.
        values = dict(zip(linears, y.split(sizes, -1), strict=True))
        with precomputed({**values, o: RETURN_INPUT}):
            attended = self.attention(hidden_states=x, **kwargs)[0].contiguous()
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

    def _decoded(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Any = None,
        use_cache: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **unknown: Any,
    ) -> Tensor | None:
        """The hidden states [B, 1, K] after the layer, for one token per sequence; None if an
        argument asks for anything but usual attention."""
        if position_embeddings is None or not _asks_for_nothing(unknown):
            return None
        room = _Room.of(cache or past_key_values, [self], len(x), x.dtype)
        if room is None:
            return None
        mask = attention_mask
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != (len(x), 1, 1, room.seen + 1):
                return None
            mask = mask[:, 0, 0]
        assert self.layer is not None
        out = room.decode([self.layer], x, position_embeddings, mask)
        if out is not None:
            room.take_one_more()
        return out


def _asks_for_nothing(arguments: Mapping[str, Any]) -> bool:
    return all(value is None for value in arguments.values())


class _Room:
    """Room for one more token in some layers of a cache, while nobody else writes to them.

    layers: of the cache; indices: where in it.
    keys: weak references to those of each room. The layers own them: a cache that is reset must not
        stay in memory.
    seen: all tokens in a layer. tokens: those of them that are in its room.
    """

    def __init__(
        self,
        layers: Sequence[GrowingLayer],
        indices: Sequence[int],
        rooms: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.layers, self.indices = layers, indices
        self.keys = [weakref.ref(keys) for keys, _ in rooms]
        self.seen, self.tokens = layers[0].get_seq_length(), layers[0].plain_tokens()
        self.capacity = min(keys.shape[-2] for keys, _ in rooms)
        first = rooms[0][0]
        self.sequences, self.dtype, self.head_dim = len(first), first.dtype, first.shape[-1]
        self.is_inference = any(t.is_inference() for room in rooms for t in room)
        self.caches = _C.Caches(
            [
                (keys.data_ptr(), values.data_ptr(), keys.shape[-2], *layer.block_arguments())
                for layer, (keys, values) in zip(layers, rooms, strict=True)
            ]
        )

    @classmethod
    def of(
        cls, cache: Any, prepared: Sequence[_Prepared], sequences: int, dtype: torch.dtype
    ) -> _Room | None:
        """The room in the layers of a cache that decoder layers use; None if another kind of
        attention or cache is in use."""
        from .cache import growing_layer  # it imports transformers

        if getattr(cache, "offloading", False) or any(
            p.attention.config._attn_implementation != "sdpa" for p in prepared
        ):
            return None
        indices = [p.cache_index for p in prepared]
        layers = [growing_layer(cache, index) for index in indices]
        # in layers that share a cache, the token of one is not written when the next one starts
        known = [layer for layer in layers if layer is not None and layer.is_initialized]
        if len(known) < len(layers) or len(set(indices)) < len(indices):
            return None
        if len({(layer.get_seq_length(), layer.plain_tokens()) for layer in known}) > 1:
            return None
        rooms = []
        for layer, p in zip(known, prepared, strict=True):
            kv_heads = p.children[p.parts.qkv[1]].out_features // p.attention.head_dim
            room = layer.room_for_one_more(sequences, kv_heads, p.attention.head_dim, dtype)
            if room is None:
                return None
            rooms.append(room)
        return cls(known, indices, rooms)

    def is_current(self, cache: Any, sequences: int, dtype: torch.dtype) -> bool:
        """Whether `of` would find the same."""
        from .cache import growing_layer  # it imports transformers

        first, layers = self.indices[0], cache.layers
        return (
            growing_layer(cache, first) is self.layers[0]
            and not getattr(cache, "offloading", False)
            and all(layers[i] is one for i, one in zip(self.indices, self.layers, strict=True))
            and self.tokens < self.capacity
            and self.sequences == sequences
            and self.dtype == dtype
            and (not self.is_inference or torch.is_inference_mode_enabled())
            and all(
                layer.still_has(keys(), self.tokens)
                for layer, keys in zip(self.layers, self.keys, strict=True)
            )
        )

    def take_one_more(self) -> None:
        """Count the token in that was written."""
        for layer in self.layers:
            layer.take_one_more()
        self.seen += 1
        self.tokens += 1

    def decode(
        self,
        layers: list[_C.Layer],
        x: Tensor,
        position: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor | None:
        """The hidden states [B, 1, K] after decoder layers, and keys and values in their room.

        Args:
            layers: as many as the room has.
            position: cosines and sines, in x's dtype [B or 1, 1, head_dim].
            mask: which tokens are seen, bool [B, seen + 1].

        Returns:
            None if that is not what the arguments are, or if a sequence sees no token.
        """
        cos, sin = position
        shape, tensors = cos.shape, position if mask is None else (*position, mask)
        if (
            any(t.dtype != x.dtype or not t.is_contiguous() for t in position)
            or any(t.device.type != "cpu" for t in tensors)
            or shape != sin.shape
            or shape not in ((1, 1, self.head_dim), (len(x), 1, self.head_dim))
            or (mask is not None and not mask.any(-1).all())
        ):
            return None
        mask = None if mask is None else mask.contiguous()
        out = torch.empty_like(x)
        _C.decode(
            layers,
            self.caches,
            self.tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            shape[0] == 1,
            0 if mask is None else mask.data_ptr(),
            DTYPES[x.dtype],
            x.data_ptr(),
            len(x),
            out.data_ptr(),
        )
        return out


class _Stack:
    """The prepared calls of all layers of a stack.

    snapshots: tell whether they still hold.
    result: makes the result of the stack's own forward from its fields; None before the first
        token, which is computed in both ways; False if they differed.
    rooms: in the caches that were used.
    """

    def __init__(self, module: Any, prepared: list[_Prepared]) -> None:
        self.prepared = prepared
        self.calls = [p.layer for p in prepared if p.layer is not None]
        self.dtype = prepared[0].dtype
        self.width = prepared[0].children[prepared[0].parts.o].out_features
        self.result: Any = None
        self.rooms: weakref.WeakKeyDictionary[Any, _Room] = weakref.WeakKeyDictionary()
        layers = module.layers
        places = [(module._modules, "layers")]
        places += [(layers._modules, name) for name in layers._modules]
        own = [layer.__dict__ for layer in layers]
        classes = list({type(layer) for layer in layers})
        self.snapshots = [p.snapshot for p in prepared if p.snapshot is not None]
        self.snapshots.append(_C.Snapshot(places, own, classes, [], []))

    def run(self, module: Any, forward: Any, kwargs: dict[str, Any]) -> Any:
        """What the stack's own forward returns for these arguments."""
        found = self._decoded(module, **kwargs) if self.result is not False else None
        if found is None:
            return forward(**kwargs)
        room, hidden, cache = found
        if self.result is None:  # the layers write the same keys and values to the same places
            result = forward(**kwargs)
            self.result = _maker_of(result, hidden, cache) or False
            return result
        room.take_one_more()
        return self.result(hidden, cache)

    def _decoded(
        self,
        module: Any,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **unknown: Any,
    ) -> tuple[_Room, Tensor, Any] | None:
        """(the room with a token more, the hidden states after the last norm, the cache); None if
        an argument asks for anything but one more token per sequence."""
        past = past_key_values if cache is None else cache
        config = module.config
        if (
            past is None
            or (input_ids is not None and inputs_embeds is not None)
            or not (config.use_cache if use_cache is None else use_cache)
            or not _asks_for_nothing(unknown)
            or not _is_usual(config, len(self.prepared))
        ):
            return None
        x = module.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (
            type(x) is not Tensor
            or (x.dtype, x.device.type) != (self.dtype, "cpu")
            or x.shape[1:] != (1, self.width)
            or not x.is_contiguous()
        ):
            return None
        room = self.rooms.get(past)
        if room is None or not room.is_current(past, len(x), x.dtype):
            room = _Room.of(past, self.prepared, len(x), x.dtype)
            if room is None:
                return None
            self.rooms[past] = room
        mask = attention_mask
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (len(x), room.seen + 1):
                return None
            mask = mask.bool()
        if position_ids is None:
            position_ids = torch.tensor([[room.seen]], device=x.device)
        position = module.rotary_emb(x, position_ids=position_ids)
        hidden = room.decode(self.calls, x, position, mask)
        return None if hidden is None else (room, module.norm(hidden), past)


def _is_usual(config: Any, layers: int) -> bool:
    """Whether a config asks for a stack of so many layers whose tokens see all before them, and for
    nothing but their result."""
    return (
        config.num_hidden_layers == layers
        and config._attn_implementation == "sdpa"
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and not getattr(config, "output_attentions", False)
        and not getattr(config, "output_hidden_states", False)
        and getattr(config, "return_dict", True)
    )


def _maker_of(result: Any, hidden: Tensor, cache: Any) -> Any:
    """A function of hidden states and a cache that makes a result like this one, which belongs to
    these; None if it does not."""
    last = result.get("last_hidden_state") if isinstance(result, Mapping) else None
    if last is None or last.dtype != hidden.dtype:
        return None
    names = [name for name in result if result[name] is cache]
    bits = torch.int32 if hidden.dtype == torch.float32 else torch.int16  # NaN equals itself
    if len(names) != 1 or len(result) != 2 or not torch.equal(last.view(bits), hidden.view(bits)):
        return None
    cls, name = type(result), names[0]
    return lambda hidden, cache: cls(last_hidden_state=hidden, **{name: cache})


def _stack_of(module: Any) -> _Stack | None:
    """The prepared calls of a stack, made anew if one of its layers changed; None if one has
    none."""
    known = known_while_generating()
    if known is None:
        return _checked_stack(module)
    if module not in known:
        stack = _checked_stack(module)
        if stack is None:
            return None
        known[module] = stack
    return known[module]


def _checked_stack(module: Any) -> _Stack | None:
    known = _STACKS.get(module)
    if known is not None and _C.all_hold(known.snapshots):
        return known
    prepared = []
    for layer in module.layers:
        fused = _state_of(layer) if isinstance(layer, FusedLayer) else None
        if fused is None or fused.layer is None:
            return None
        prepared.append(fused)
    if len({p.dtype for p in prepared}) != 1:
        return None
    made = _STACKS[module] = _Stack(module, prepared)
    return made if _C.all_hold(made.snapshots) else None
