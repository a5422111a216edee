"""Cut texts into blocks of tokens."""

from __future__ import annotations

import os
import random
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import MixedQuantConfig, check_integer
from ..core.texts import read_texts
from ..models.loading import load_tokenizer, text_tokenizer

# Tokens per block of `config.calibration`.
CALIBRATION_BLOCK = 1024

# Texts are tokenized in pieces of about this many characters. A large corpus is then read only as
# far as needed, and a block does not depend on how many blocks are requested.
TOKENIZE_CHARACTERS = 1 << 20


def token_blocks(
    texts: Iterable[str], tokenizer: Any, num_blocks: int | None, block_size: int
) -> list[Tensor]:
    """Cut texts into full, non-overlapping blocks of tokens, in order.

    The texts are joined by blank lines and tokenized as one document, with special tokens only at
    the very beginning. A block depends only on the text before its end: a larger `num_blocks` gives
    the same blocks followed by more.

    Args:
        texts: the texts. Empty ones are kept, as in the evaluation protocol.
        tokenizer: a transformers tokenizer or a processor that has one.
        num_blocks: maximum number of blocks, or None for all. If the texts are too short, there are
            fewer blocks and a warning.
        block_size: tokens per block, >= 1.

    Returns:
        A list of int64 tensors [1, block_size].

    Raises:
        ValueError: a count is below 1, or the texts do not fill one block.
        TypeError: `texts` is a single string or a path, or a count is not an integer.
    """
    if num_blocks is not None:
        check_integer("num_blocks", num_blocks, 1)
    check_integer("block_size", block_size, 1)
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(
            f"texts must be an iterable of texts, not a single text or a path; got {texts!r:.60}"
        )
    tokenizer = text_tokenizer(tokenizer)
    token_ids = array("q")  # a list of Python integers takes four times the memory
    for piece in _pieces(texts):
        special = not token_ids
        token_ids.extend(tokenizer(piece, add_special_tokens=special, verbose=False).input_ids)
        if num_blocks is not None and len(token_ids) >= num_blocks * block_size:
            break
    available = len(token_ids) // block_size
    if available == 0:
        raise ValueError(
            f"block_size: texts have {len(token_ids)} tokens, less than one block of {block_size}"
        )
    if num_blocks is None:
        num_blocks = available
    elif available < num_blocks:
        warnings.warn(
            f"texts fill only {available} blocks of {block_size} tokens; {num_blocks} were "
            "requested",
            stacklevel=2,
        )
        num_blocks = available
    ids = torch.frombuffer(token_ids[: num_blocks * block_size], dtype=torch.int64)
    return list(ids.clone().view(num_blocks, 1, block_size))


def draw_blocks(
    texts: Iterable[str], tokenizer: Any, num_blocks: int, block_size: int, seed: int
) -> list[Tensor]:
    """Draw blocks of `token_blocks` at random from the whole of the texts, in text order.

    Each block is running text, and together they cover many texts.

    Raises:
        ValueError: the texts fill fewer than `num_blocks` blocks; also as `token_blocks`.
    """
    blocks = token_blocks(texts, tokenizer, None, block_size)
    if num_blocks > len(blocks):
        raise ValueError(
            f"calibration blocks must be at most {len(blocks)}, the number of blocks of "
            f"{block_size} tokens in the texts; got {num_blocks}"
        )
    drawn = random.Random(seed).sample(range(len(blocks)), num_blocks)
    return [blocks[index] for index in sorted(drawn)]


def calibration_batches(model: nn.Module, tokenizer: Any, config: MixedQuantConfig) -> list[Tensor]:
    """Draw the token blocks of ``config.calibration``, which must be set: int64 [1, T] each.

    Raises:
        ValueError: the texts have fewer than ``config.calibration_tokens`` tokens, or `tokenizer`
            is None; also as `read_texts`.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is required to calibrate on config.calibration; got None")
    assert config.calibration is not None
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    size = min(CALIBRATION_BLOCK, config.calibration_tokens, positions or CALIBRATION_BLOCK)
    count = config.calibration_tokens // size
    return draw_blocks(read_texts(config.calibration), tokenizer, count, size, config.seed)


def chosen_batches(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping | None,
    batches: Sequence[Tensor] | None,
    tokenizer: Any,
) -> Sequence[Tensor] | None:
    """The batches to calibrate on.

    These are the given batches, or else, if calibration needs any, the blocks of
    ``config.calibration``; None if neither applies.

    Args:
        tokenizer: the model's tokenizer, or the name or folder to load it from.
    """
    needs_batches = batches is None and (stats is None or bool(config.needs_tokens))
    if not needs_batches or config.calibration is None:
        return batches
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = load_tokenizer(tokenizer)
        except ValueError as error:
            raise ValueError(f"config.calibration needs a tokenizer, but {error}") from error
    return calibration_batches(model, tokenizer, config)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    characters, separator = 0, ""
    for text in texts:
        piece.append(text)
        characters += len(text)
        if characters >= TOKENIZE_CHARACTERS:
            yield separator + "\n\n".join(piece)
            piece, characters, separator = [], 0, "\n\n"
    if piece:
        yield separator + "\n\n".join(piece)
