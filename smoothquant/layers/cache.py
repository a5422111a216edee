"""A key-value cache that grows in place. transformers' DynamicCache copies all keys and values for
every token, which for long texts takes longer than the token's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of larger tensors, at whose end new ones are
    written. Values that were returned before never change."""

    keys: Any  # Tensor, or None before the first update
    values: Any
    _room: tuple[Tensor, Tensor] | None = None
    _used = 0  # tokens in it
    _owner = 0  # the id of the layer that writes to it; a shallow copy shares it but may not

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), key_states.shape[-2]
        if old and self.keys.shape[:-2] != key_states.shape[:-2]:
            return super().update(key_states, value_states, *args, **kwargs)  # which refuses them
        if not self._has_room(old, new, key_states):
            self._make_room(old, new, key_states, value_states)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., old : old + new, :] = states
        self._take(old + new)
        return self.keys, self.values

    def room_for_one_more(
        self, sequences: int, heads: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values [sequences, heads, capacity, size] with room for a token after the
        present ones; None if the present ones are of other shapes."""
        keys, values = self.keys, self.values
        if (
            keys.shape != (sequences, heads, self.get_seq_length(), size)
            or keys.shape != values.shape
            or {keys.dtype, values.dtype} != {dtype}
            or {keys.device.type, values.device.type} != {"cpu"}
        ):
            return None
        length = self.get_seq_length()
        if not self._has_room(length, 1, keys):
            self._make_room(length, 1, keys, values)
            self._take(length)
        return self._room

    def take_one_more(self) -> None:
        """Count in the token that was written into that room."""
        self._take(self._used + 1)

    def _take(self, length: int) -> None:
        assert self._room is not None
        self._used = length
        self.keys, self.values = (room[..., :length, :] for room in self._room)

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
            self.keys.data_ptr() == keys.data_ptr()
            and self.values.data_ptr() == values.data_ptr()
            and self.keys.stride() == keys.stride()
            and states.shape[:-2] == keys.shape[:-2]
            and old + new <= keys.shape[-2]
        )


def _with_room(past: Tensor, length: int, new: int, states: Tensor) -> Tensor:
    """A tensor for the past, so many new states, and as much again as a quarter of both."""
    total = length + new
    shape = (*states.shape[:-2], total + max(LEAST_ROOM, total // 4), states.shape[-1])
    room = states.new_empty(shape, dtype=past.dtype if length else None)
    if length:
        room[..., :length, :] = past
    return room


def growing_layer(cache: Any, index: int) -> GrowingLayer | None:
    """A layer of a transformers cache, which becomes a GrowingLayer if it is a plain DynamicLayer;
    None if it is neither."""
    layers = getattr(cache, "layers", ())
    if index >= len(layers) or type(cache).update is not Cache.update or "update" in vars(cache):
        return None  # none, or a cache that does more
    if type(layers[index]) is DynamicLayer:
        layers[index].__class__ = GrowingLayer
    return layers[index] if type(layers[index]) is GrowingLayer else None
