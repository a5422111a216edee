"""A key-value cache that grows in place. transformers' DynamicCache copies all keys and values for
every token, which for long texts takes longer than the token's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of larger tensors, at whose end new ones are
    written. Values that were returned before never change."""

    _room: tuple[Tensor, Tensor] | None = None
    _used = 0  # tokens in it

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), key_states.shape[-2]
        if not self._has_room(old, new, key_states):
            self._room = (
                _with_room(self.keys, old, key_states),
                _with_room(self.values, old, value_states),
            )
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., old : old + new, :] = states
        self._used = old + new
        self.keys, self.values = (room[..., : old + new, :] for room in self._room)
        return self.keys, self.values

    def _has_room(self, old: int, new: int, states: Tensor) -> bool:
        """Whether keys and values are still the views that the last update made: all that was
        written, of the same sequences."""
        if self._room is None or old != self._used or torch.is_grad_enabled():
            return False
        keys, values = self._room
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch refuses to write to it
        return (
            self.keys.data_ptr() == keys.data_ptr()
            and self.values.data_ptr() == values.data_ptr()
            and self.keys.stride() == keys.stride()
            and states.shape[:-2] == keys.shape[:-2]
            and old + new <= keys.shape[-2]
        )


def _with_room(past: Tensor, length: int, states: Tensor) -> Tensor:
    """A tensor for the past, the new states, and as much again as a quarter of both."""
    total = length + states.shape[-2]
    shape = (*states.shape[:-2], total + max(LEAST_ROOM, total // 4), states.shape[-1])
    room = states.new_empty(shape, dtype=past.dtype if length else None)
    if length:
        room[..., :length, :] = past
    return room


def grow_in_place(cache: Any, index: int) -> None:
    """Make a layer of a transformers cache a GrowingLayer, if it is a plain DynamicLayer."""
    layers = getattr(cache, "layers", ())
    if index < len(layers) and type(layers[index]) is DynamicLayer:
        layers[index].__class__ = GrowingLayer
