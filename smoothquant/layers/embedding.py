"""Embeddings that look their rows up in a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.tables import embedding_scale
from .linear import QuantizedLinear


class QuantizedEmbedding(nn.Module):
    """Replaces an nn.Embedding; dequantizes the rows that are asked for.

    Args:
        embedding: an embedding for which `models.tables.unlike_embedding` finds no fault. Its sizes
            and its factor are taken over, not its weight.
        packed: the weight, as a linear with embedding_dim inputs and num_embeddings outputs. A tied
            output head is this very module, so that the weight is stored once.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as in nn.Embedding.
        embed_scale: what the rows are multiplied by, or None.
        rounds_scale: round embed_scale to the dtype first.
    """

    like: Tensor

    def __init__(self, embedding: nn.Embedding, packed: QuantizedLinear) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.embed_scale, self.rounds_scale = embedding_scale(embedding)
        self.packed = packed
        # The dtype of the rows, which follows casts of the model.
        like = torch.empty(0, dtype=embedding.weight.dtype, device=embedding.weight.device)
        self.register_buffer("like", like, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight that rows are taken from, [num_embeddings, embedding_dim].

        Dequantized on every access.
        """
        return self.packed.dequantize().to(self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids, int64 or int32 [...], -> [..., embedding_dim] in the model's dtype.

        Raises:
            ValueError: an id is outside [0, num_embeddings); on CUDA, its row is NaN.
            TypeError: ids are neither int32 nor int64.
        """
        if input.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"token ids must be int32 or int64; got {input.dtype}")
        ids = input.to(self.packed.perm.device, torch.int64)
        rows = self.packed.rows(ids).to(input.device, self.like.dtype)
        if self.embed_scale is None:
            return rows
        if self.rounds_scale:
            return rows * torch.full((), self.embed_scale, dtype=rows.dtype, device=rows.device)
        return rows * self.embed_scale

    def restored(self, embedding: Any, weight: nn.Parameter) -> nn.Embedding:
        """A float embedding with this weight.

        Args:
            embedding: one of the original class, perhaps on meta; None makes an nn.Embedding.
        """
        if embedding is None:
            size = (self.num_embeddings, self.embedding_dim)
            embedding = nn.Embedding(*size, self.padding_idx, device="meta")
        embedding.weight = weight
        if "embed_scale" in embedding._buffers:
            scale = torch.tensor(self.embed_scale, dtype=weight.dtype, device=weight.device)
            embedding.embed_scale = scale
        return embedding

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{scale}"
