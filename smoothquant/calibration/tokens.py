"""Texts as blocks of tokens."""

from __future__ import annotations

import os
import random
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.config import MixedQuantConfig, check_integer
from ..core.texts import read_texts

# Tokens of a block that a config's calibration texts are cut into.
CALIBRATION_BLOCK = 1024

# Texts are tokenized in pieces of about this many characters, so that a large corpus is read only
# as far as needed and a block does not depend on how many blocks are asked for.
TOKENIZE_CHARACTERS = 1 << 20


def token_blocks(
    texts: Iterable[str], tokenizer, num_blocks: int | None, block_size: int
) -> list[Tensor]:
    """Cut texts into full blocks of tokens, in order, without overlap.

    The texts are joined by a blank line and tokenized like a document, special tokens at the very
    beginning only. A block depends only on the texts up to it, so asking for more blocks gives the
    same ones first.

    Args:
        texts: texts; empty ones are kept, as in the evaluation protocol.
        tokenizer: a transformers tokenizer.
        num_blocks: how many blocks at most; None for all that the texts give. Fewer texts than
            needed give fewer blocks and a warning.
        block_size: tokens per block, >= 1.

    Returns:
        list of int64 [1, block_size].

    Raises:
        ValueError: a count below 1, or not even one full block. TypeError: texts is a str, whose
            characters are no texts, or a count is no integer.
    """
    if num_blocks is not None:
        check_integer("num_blocks", num_blocks, 1)
    check_integer("block_size", block_size, 1)
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(f"texts must be an iterable of texts, not one or a path; got {texts!r:.60}")
    token_ids = array("q")  # a list of Python's integers takes four times the memory
    for piece in _pieces(texts):
        special = not token_ids
        token_ids.extend(tokenizer(piece, add_special_tokens=special, verbose=False).input_ids)
        if num_blocks is not None and len(token_ids) >= num_blocks * block_size:
            break
    available = len(token_ids) // block_size
    if available == 0:
        raise ValueError(
            f"block_size: texts hold {len(token_ids)} tokens, less than one block of {block_size}"
        )
    if num_blocks is None:
        num_blocks = available
    elif available < num_blocks:
        warnings.warn(
            f"texts hold {available} blocks of {block_size} tokens; {num_blocks} were asked for",
            stacklevel=2,
        )
        num_blocks = available
    ids = torch.frombuffer(token_ids[: num_blocks * block_size], dtype=torch.int64)
    return list(ids.clone().view(num_blocks, 1, block_size))


def draw_blocks(
    texts: Iterable[str], tokenizer, num_blocks: int, block_size: int, seed: int
) -> list[Tensor]:
    """Blocks of `token_blocks`, drawn by a seed from all over the texts, in the texts' order:
    running text inside of a block, many texts across blocks.

    Raises:
        ValueError: the texts give fewer than `num_blocks`, or as `token_blocks`.
    """
    every = token_blocks(texts, tokenizer, None, block_size)
    if num_blocks > len(every):
        raise ValueError(
            f"calibration blocks must be at most the {len(every)} of {block_size} tokens in the "
            f"texts; got {num_blocks}"
        )
    chosen = random.Random(seed).sample(range(len(every)), num_blocks)
    return [every[index] for index in sorted(chosen)]


def calibration_batches(model: nn.Module, tokenizer, config: MixedQuantConfig) -> list[Tensor]:
    """The token blocks that ``config.calibration`` stands for: int64 [1, T] each.

    Raises:
        ValueError: there are fewer than ``config.calibration_tokens`` tokens, or no tokenizer was
            given; as `read_texts`.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be given to calibrate on config.calibration; got None")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    size = min(CALIBRATION_BLOCK, config.calibration_tokens, positions or CALIBRATION_BLOCK)
    count = config.calibration_tokens // size
    return draw_blocks(read_texts(config.calibration), tokenizer, count, size, config.seed)


def chosen_batches(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping | None,
    batches: Sequence[Tensor] | None,
    tokenizer,
) -> Sequence[Tensor] | None:
    """The batches to calibrate on: those given, else the ones that ``config.calibration`` stands
    for where they are needed, else None. tokenizer: the model's, or where to load it from."""
    is_needed = batches is None and (stats is None or bool(config.needs_tokens))
    if not is_needed or config.calibration is None:
        return batches
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    return calibration_batches(model, tokenizer, config)


def load_tokenizer(name_or_folder: str | os.PathLike):
    """The tokenizer that was saved with a model, to calibrate on texts.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
        if tokenizer.vocab_size:
            return tokenizer
        error: object = "there is none"  # transformers makes one up then
    except (OSError, ValueError) as loading:
        error = loading
    raise ValueError(
        f"config.calibration needs the tokenizer of {str(name_or_folder)!r}, which cannot be "
        f"loaded: {error}; load the model without quantization_config and call "
        "smoothquant.quantize(model, config, tokenizer=...)"
    )


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
