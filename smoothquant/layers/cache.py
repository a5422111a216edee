"""Key-value caches: one that grows in place, and one in INT8 or INT4.

transformers' DynamicCache copies all keys and values for every token, which for long texts takes
longer than the token's weights. `GrowingLayer` writes them into spare room instead.

`QuantizedKVCache` stores all but the most recent tokens as codes. The channels of keys differ in
size much more than the tokens do, so keys share a scale along the tokens of a block, and values
along channels (KIVI, Liu et al., 2024). The most recent tokens stay as they are: attention weighs
them most, and a block of keys cannot be quantized before it is full.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..core.tensors import FLOATS

LEAST_ROOM = 64  # tokens
BLOCK = 32  # tokens that are quantized together: MQ_KV_BLOCK
RECENT = 32  # at least so many of the last tokens stay as they are
GROUP = 32  # at most so many channels of a value share a scale
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
NO_BLOCKS = (0, 0, 0, 0, 0, 0, 0)


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of larger tensors, at whose end new ones are
    written. Values that were returned before never change."""

    _keys: Tensor | None = None  # None: before the first update, or views that nobody asked for yet
    _values: Tensor | None = None
    _room: tuple[Tensor, Tensor] | None = None
    _used = 0  # tokens in it
    _owner = 0  # the id of the layer that writes to it; a shallow copy shares it but may not

    @property
    def keys(self) -> Any:  # Tensor, or None before the first update
        if self._keys is None and self._room is not None:
            self._keys = self._room[0][..., : self._used, :]
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys
        self._room = None if keys is None else self._room

    @property
    def values(self) -> Any:
        if self._values is None and self._room is not None:
            self._values = self._room[1][..., : self._used, :]
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values
        self._room = None if values is None else self._room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.plain_tokens(), key_states.shape[-2]
        if old and self.keys.shape[:-2] != key_states.shape[:-2]:
            return super().update(key_states, value_states, *args, **kwargs)  # which refuses them
        if not self._has_room(old, new, key_states):
            self._make_room(old, new, key_states, value_states)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., old : old + new, :] = states
        self._take(old + new)
        return self.keys, self.values

    def plain_tokens(self) -> int:
        """The number of tokens in keys and values."""
        return self._used if self._has_no_views() else DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        return self.plain_tokens()

    def _has_no_views(self) -> bool:
        """Whether nobody can have changed keys or values since the last update."""
        return self._room is not None and self._keys is None and self._values is None

    def block_arguments(self) -> tuple[int, int, int, int, int, int, int]:
        """Where the tokens before those are, for _C.decode: addresses of the blocks of keys and of
        values, bytes from one head to the next in each, the number of blocks, bits, group size."""
        return NO_BLOCKS

    def room_for_one_more(
        self, sequences: int, heads: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values [sequences, heads, capacity, size] with room for a token after the
        present ones; None if the present ones are of other shapes."""
        keys, values = self.keys, self.values
        if (
            keys.shape != (sequences, heads, self.plain_tokens(), size)
            or keys.shape != values.shape
            or {keys.dtype, values.dtype} != {dtype}
            or {keys.device.type, values.device.type} != {"cpu"}
        ):
            return None
        length = self.plain_tokens()
        if not self._has_room(length, 1, keys):
            self._make_room(length, 1, keys, values)
        self._take(length)
        return self._room

    def still_has(self, keys: Tensor | None, tokens: int) -> bool:
        """Whether `room_for_one_more` would return the room with these keys, for a token after so
        many."""
        return (
            self._has_no_views()
            and self._room is not None
            and self._room[0] is keys
            and self._used == tokens
            and self._owner == id(self)
        )

    def take_one_more(self) -> None:
        """Count in the token that was written into that room."""
        self._take(self._used + 1)

    def _take(self, length: int) -> None:
        self._used = length
        self._keys = self._values = None

    def _make_room(self, old: int, new: int, keys: Tensor, values: Tensor) -> None:
        """Room for the present tokens and new ones of the shape of keys and values."""
        self._room = (
            _with_room(self.keys, old, new, keys),
            _with_room(self.values, old, new, values),
        )
        self._owner = id(self)

    def _has_room(self, old: int, new: int, states: Tensor) -> bool:
        """Whether keys and values are still the views that the last update made: all that was
        written, of the same sequences."""
        if self._room is None or self._owner != id(self) or old != self._used:
            return False
        keys, values = self._room
        if torch.is_grad_enabled() or keys.requires_grad or values.requires_grad:
            return False  # a backward pass may need what was written
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch refuses to write to it
        return (
            states.shape[:-2] == keys.shape[:-2]
            and old + new <= keys.shape[-2]
            and (self._keys is None or _is_start(self._keys, keys))
            and (self._values is None or _is_start(self._values, values))
        )


def _is_start(part: Tensor, room: Tensor) -> bool:
    return part.data_ptr() == room.data_ptr() and part.stride() == room.stride()


def _with_room(past: Tensor, length: int, new: int, states: Tensor) -> Tensor:
    """A tensor for the past, so many new states, and as much again as a quarter of both."""
    total = length + new
    shape = (*states.shape[:-2], total + max(LEAST_ROOM, total // 4), states.shape[-1])
    room = states.new_empty(shape, dtype=past.dtype if length else None)
    if length:
        room[..., :length, :] = past
    return room


def growing_layer(cache: Any, index: int) -> GrowingLayer | None:
    """A layer of a transformers cache that grows in place, as a plain DynamicLayer does from now
    on; None for any other."""
    layers = getattr(cache, "layers", ())
    if index >= len(layers) or type(cache).update is not Cache.update or "update" in vars(cache):
        return None  # none, or a cache that does more
    layer = layers[index]
    if type(layer) is DynamicLayer:
        layer.__class__ = GrowingLayer
        own = vars(layer)
        own["_keys"], own["_values"] = own.pop("keys"), own.pop("values")
    return layer if type(layer) in (GrowingLayer, QuantizedLayer) else None


class QuantizedLayer(GrowingLayer):
    """A GrowingLayer of the most recent tokens, and codes of those before.

    A block of BLOCK tokens is quantized as soon as RECENT others follow it. Nothing that was
    returned before changes by that.

    Attributes:
        blocks: all blocks of keys and of values, uint8 [sequences, heads, blocks, bytes]; for the
            bytes see mq_kv_blocks in csrc/mixedquant.h. Never written to: copies share them.
    """

    blocks: tuple[Tensor, Tensor] | None = None
    _alike: tuple[Any, ...] | None = None  # what the states of all tokens have in common

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states of new tokens, [sequences, heads, tokens, head_dim].

        Returns:
            The keys and values of all tokens in their dtype: dequantized, then those that are
            stored as they were given, which the new ones still are.

        Raises:
            ValueError: the states need gradients, which codes do not have; or they are of another
                dtype or shape than those before.
        """
        self._check(key_states, value_states)
        states = super().update(key_states, value_states, *args, **kwargs)
        if self.blocks is not None:
            past = self._unpacked(*self.blocks)
            keys, values = (torch.cat(both, -2) for both in zip(past, states, strict=True))
            states = keys, values
        self._quantize_old()
        return states

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError(
                "key_states must not need gradients, which a quantized cache does not have; call "
                "the model under torch.no_grad()"
            )
        if keys.dtype not in FLOATS or keys.dim() != 4:
            raise ValueError(
                "key_states must be float32, float16 or bfloat16 [sequences, heads, tokens, "
                f"head_dim]; got {keys.dtype} {list(keys.shape)}"
            )
        alike = (keys.dtype, *keys.shape[:2], keys.shape[3], values.shape[3])
        if values.dtype != keys.dtype or values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"value_states must be like key_states, {keys.dtype} {list(keys.shape)}; got "
                f"{values.dtype} {list(values.shape)}"
            )
        if self.get_seq_length() and alike != self._alike:
            names = "(dtype, sequences, heads, head_dim of keys, head_dim of values)"
            raise ValueError(
                f"key_states must be like those in the cache, {names} = {self._alike}; got {alike}"
            )
        self._alike = alike

    def get_seq_length(self) -> int:
        return self.stored_tokens()

    def stored_tokens(self) -> int:
        return self.plain_tokens() + (BLOCK * self.blocks[0].shape[2] if self.blocks else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, spare room included."""
        tensors = (self.keys, self.values, *(self._room or ()), *(self.blocks or ()))
        storages = [t.untyped_storage() for t in tensors if t is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def room_for_one_more(
        self, sequences: int, heads: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        if self._alike != (dtype, sequences, heads, size, size):
            return None
        return super().room_for_one_more(sequences, heads, size, dtype)

    def block_arguments(self) -> tuple[int, int, int, int, int, int, int]:
        if self.blocks is None:
            return NO_BLOCKS
        keys, values = self.blocks
        group = group_size(self.values.shape[-1])
        addresses = keys.data_ptr(), values.data_ptr()
        return *addresses, keys.stride(1), values.stride(1), keys.shape[2], self.bits, group

    def take_one_more(self) -> None:
        super().take_one_more()
        self._quantize_old()

    def _quantize_old(self) -> None:
        count = (self.plain_tokens() - RECENT) // BLOCK
        if count <= 0:
            return
        end = count * BLOCK
        keys = pack_keys(self.keys[..., :end, :], self.bits)
        values = pack_values(self.values[..., :end, :], self.bits)
        if self.blocks is not None:  # rarely enough that copying the others takes no time
            keys, values = (
                torch.cat((self.blocks[0], keys), 2),
                torch.cat((self.blocks[1], values), 2),
            )
        self.blocks = keys, values
        self._keep(lambda t: t[..., end:, :].clone())

    def _unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of some blocks, [sequences, heads, tokens, head_dim]."""
        return (
            unpack_keys(keys, self.keys.shape[-1], self.bits, self.keys.dtype),
            unpack_values(values, self.values.shape[-1], self.bits, self.values.dtype),
        )

    def _keep(self, part: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values, self._room = part(self.keys), part(self.values), None

    def reset(self) -> None:
        self.keys = self.values = self.blocks = self._room = None
        self.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        What is left of a block keeps its dequantized values, and is quantized anew when it is full
        again.

        Args:
            tokens_to_remove: minus their number; or, if positive, the number of tokens to keep.
        """
        length = self.get_seq_length()
        removed = min(
            -tokens_to_remove if tokens_to_remove < 0 else length - tokens_to_remove, length
        )
        if tokens_to_remove == 0 or removed <= 0:
            return
        missing = removed - self.plain_tokens()
        if missing > 0 and self.blocks is not None:
            kept = self.blocks[0].shape[2] - -(-missing // BLOCK)
            self.keys, self.values = self._unpacked(*(t[:, :, kept:] for t in self.blocks))
            self._keep_blocks(lambda t: t[:, :, :kept])
            removed = missing
        end = self.plain_tokens() - removed
        self._keep(lambda t: t[..., :end, :].clone())

    def _keep_blocks(self, part: Callable[[Tensor], Tensor]) -> None:
        if self.blocks is not None:
            keys, values = (part(t).contiguous() for t in self.blocks)
            self.blocks = (keys, values) if keys.shape[2] else None

    def _select(self, sequences: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self._keep(sequences)
            self._keep_blocks(sequences)
            self._alike = (
                (self._alike[0], len(self.keys), *self._alike[2:]) if self._alike else None
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda t: t[indices])


class QuantizedSlidingLayer(QuantizedLayer, DynamicSlidingWindowLayer):
    """A QuantizedLayer that forgets the blocks that have left a sliding window."""

    def __init__(self, bits: int, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.bits = bits

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As QuantizedLayer.update, but returns only the last sliding_window - 1 of the tokens
        before the new ones."""
        states = super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        self.cumulative_length += new
        if not getattr(self, "record_past", False):
            self._forget()
        visible = self.sliding_window - 1 + new
        return states[0][..., -visible:, :], states[1][..., -visible:, :]

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        left = max(0, min(left, length))
        if self.stored_tokens() - (length - left) < min(left, self.sliding_window - 1):
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that have left the sliding window of "
                f"{self.sliding_window}; call activate_past_recording() before they do"
            )
        super().crop(left - length)
        self.cumulative_length = left
        self._forget()

    def _forget(self) -> None:
        count = (self.stored_tokens() - self.sliding_window + 1) // BLOCK
        if count > 0:
            self._keep_blocks(lambda t: t[:, :, count:].clone())


class QuantizedKVCache(Cache):
    """A key-value cache in INT8 or INT4, for long contexts in less memory.

    Give it to `generate`, or to a model's forward, as ``past_key_values`` (``cache`` in newer
    versions of transformers). Use a new one, or `reset`, for every text.

    The last 32 to 63 tokens stay in the model's dtype. Those before are quantized in blocks of 32
    tokens, with a scale and an offset, both in the model's dtype, per channel of a block of keys,
    and per 32 channels of a token's values (the largest divisor of head_dim up to 32; all of them
    if that is below 8). No value moves by more than half a scale, but for rounding to the
    model's dtype. Values that share a scale are all NaN if one of them is NaN or Inf, or
    if they span more than float32 can hold. New tokens attend to
    each other before they are quantized.

    Every attention function of transformers reads it, because `update` returns dequantized keys
    and values. On the CPU, fused decoder layers read the codes themselves to decode one token per
    sequence.

    Args:
        config: the model's config (or that of a model that contains a decoder).
        bits: 8 or 4.

    Raises:
        ValueError: `bits` is neither; the model is an encoder-decoder; or a layer keeps something
            else than keys and values, or the states of a linear attention, which stay as they are.
    """

    def __init__(self, config: Any, bits: int = 8) -> None:
        if type(bits) is not int or bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8; got {bits!r}")
        if getattr(config, "is_encoder_decoder", False):  # it keeps two caches in one
            raise ValueError(
                "config must not be an encoder-decoder model's; got that of a "
                f"{type(config).__name__}"
            )
        super().__init__(
            layers=[_quantized(layer, bits) for layer in DynamicCache(config=config).layers]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all keys and values, scales and spare room included."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)


def _quantized(layer: Any, bits: int) -> Any:
    if type(layer) is DynamicLayer:
        return QuantizedLayer(bits)
    if type(layer) is DynamicSlidingWindowLayer:
        return QuantizedSlidingLayer(bits, layer.sliding_window)
    if isinstance(layer, DynamicLayer):
        raise ValueError(
            f"config has a layer with a {type(layer).__name__}, which cannot be quantized; use "
            "transformers' DynamicCache"
        )
    return layer  # without keys and values


def cache_argument(model: torch.nn.Module) -> str:
    """The name of the cache among the arguments of a model's forward and of `generate`, which
    depends on the version of transformers."""
    parameters = inspect.signature(inspect.unwrap(model.forward)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def group_size(head_dim: int) -> int:
    """The number of channels of a value that share a scale: the largest divisor of head_dim up to
    GROUP, or head_dim if that is below 8."""
    most = max(g for g in range(1, min(GROUP, head_dim) + 1) if head_dim % g == 0)
    return most if most >= 8 else head_dim


def pack_keys(keys: Tensor, bits: int) -> Tensor:
    """Keys [..., blocks * BLOCK, head_dim] as bytes, uint8 [..., blocks, bytes]."""
    return _packed(*_quantize(keys.unflatten(-2, (-1, BLOCK)), -2, bits), bits)


def unpack_keys(packed: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    codes, scales, zeros = _parts(packed, head_dim, head_dim, bits, dtype)
    values = codes.float() * scales.unsqueeze(-2) + zeros.unsqueeze(-2)
    return values.to(dtype).flatten(-3, -2)


def pack_values(values: Tensor, bits: int) -> Tensor:
    """Values [..., blocks * BLOCK, head_dim] as bytes, uint8 [..., blocks, bytes]."""
    groups = values.unflatten(-1, (-1, group_size(values.shape[-1])))
    codes, scales, zeros = _quantize(groups.unflatten(-3, (-1, BLOCK)), -1, bits)
    return _packed(codes.flatten(-2), scales, zeros, bits)


def unpack_values(packed: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    groups = head_dim // group_size(head_dim)
    codes, scales, zeros = _parts(packed, head_dim, BLOCK * groups, bits, dtype)
    codes = codes.unflatten(-1, (groups, -1)).float()
    scales, zeros = (t.unflatten(-1, (BLOCK, groups)).unsqueeze(-1) for t in (scales, zeros))
    return (codes * scales + zeros).to(dtype).flatten(-2).flatten(-3, -2)


def _quantize(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of x, with a scale and a zero (the value of code 0) in x's dtype for all values
    along dim."""
    levels = float(2**bits - 1)
    zero, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    span = high.float() - zero.float()
    wanted = span / levels
    scale = wanted.to(x.dtype)
    if x.dtype != torch.float32:  # round up, so that the codes reach `high`
        up = (scale.view(torch.int16) + 1).view(x.dtype)
        scale = torch.where(scale.float() < wanted, up, scale)
    scale = torch.where(wanted < SMALLEST_NORMAL, 0, scale)
    scale = torch.where(span.isfinite(), scale, float("nan"))
    step = scale.float()
    usable = step >= SMALLEST_NORMAL
    inverse = torch.where(usable, 1 / step, 0)
    # ... but no value is beyond the largest of the dtype
    beyond = zero.float() + step * levels > torch.finfo(x.dtype).max
    codes = torch.where(usable, x.float() - zero.float(), 0) * inverse
    codes = codes.round().clamp(min=0).minimum(levels - beyond.float())
    return codes.to(torch.uint8), scale, zero


def _packed(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    if bits == 4:
        half = -(-codes.shape[-1] // 2)
        padded = torch.nn.functional.pad(codes, (0, 2 * half - codes.shape[-1]))
        codes = padded[..., :half] | padded[..., half:] << 4
    start = codes.dim() - 2
    parts = (codes, scales.contiguous().view(torch.uint8), zeros.contiguous().view(torch.uint8))
    return torch.cat([part.flatten(start) for part in parts], -1)


def _parts(
    packed: Tensor, head_dim: int, scales: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes [..., BLOCK, head_dim] of blocks, and so many scales and zeros [..., scales] in
    float32."""
    row = head_dim if bits == 8 else -(-head_dim // 2)
    codes, rest = packed.split([BLOCK * row, packed.shape[-1] - BLOCK * row], -1)
    codes = codes.unflatten(-1, (BLOCK, row))
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)[..., :head_dim]
    scale, zero = rest.contiguous().view(dtype).float().split(scales, -1)
    return codes, scale, zero
