"""Cut texts into blocks of tokens."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import WEIGHTS, WIKITEXT, MixedQuantConfig, check_integer
from ..core.messages import naming
from ..core.texts import read_texts, wikitext
from ..models.loading import load_tokenizer, text_tokenizer
from ..models.modules import is_transformers_model
from ..models.running import check_token_ids, max_positions, runs_on_tokens

logger = logging.getLogger("smoothquant")

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
    token_ids = _token_ids(
        texts, tokenizer, None if num_blocks is None else num_blocks * block_size
    )
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
    return _blocks(token_ids[: num_blocks * block_size], block_size)


def _token_ids(texts: Iterable[str], tokenizer: Any, enough: int | None = None) -> array[int]:
    """The tokens of the texts; of the first texts with `enough` tokens, if there are so many."""
    token_ids = array("q")  # a list of Python integers takes four times the memory
    for piece in _pieces(texts):
        special = not token_ids
        token_ids.extend(tokenizer(piece, add_special_tokens=special, verbose=False).input_ids)
        if enough is not None and len(token_ids) >= enough:
            break
    return token_ids


def _blocks(token_ids: array[int], size: int) -> list[Tensor]:
    """All full blocks, int64 [1, size] each."""
    count = len(token_ids) // size
    ids = torch.frombuffer(token_ids, dtype=torch.int64)[: count * size]
    return list(ids.clone().view(count, 1, size))


def _drawn(blocks: Sequence[Tensor], count: int, seed: int) -> list[Tensor]:
    """`count` of the blocks at random, in text order."""
    drawn = random.Random(seed).sample(range(len(blocks)), count)
    return [blocks[index] for index in sorted(drawn)]


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
            f"num_blocks must be at most {len(blocks)}, the number of blocks of "
            f"{block_size} tokens in the texts; got {num_blocks}"
        )
    return _drawn(blocks, num_blocks, seed)


def calibration_batches(model: nn.Module, tokenizer: Any, config: MixedQuantConfig) -> list[Tensor]:
    """Draw the token blocks of ``config.calibration``: int64 [1, T] each.

    Raises:
        ValueError: ``config.calibration`` is "weights", its texts have fewer than
            ``config.calibration_tokens`` tokens, or the tokenizer gives token ids that the model
            does not have; also as `read_texts`.
    """
    if config.calibration == WEIGHTS:
        raise ValueError(f"calibration={WEIGHTS!r} has no tokens to draw")
    positions = max_positions(model) or CALIBRATION_BLOCK
    size = min(CALIBRATION_BLOCK, config.calibration_tokens, positions)
    texts: Iterable[str]
    with naming(source="calibration"):
        if config.calibration in (None, WIKITEXT):
            texts = wikitext("validation")
        else:
            texts = read_texts(config.calibration)  # type: ignore[arg-type]
        token_ids = _token_ids(texts, tokenizer)
    if len(token_ids) < size * (config.calibration_tokens // size):
        most = len(token_ids) // size * size or len(token_ids)
        raise ValueError(
            f"calibration_tokens must be at most {most}, the number of tokens in the calibration "
            f"texts; got {config.calibration_tokens}"
        )
    check_token_ids(model, torch.tensor(max(token_ids)))
    return _drawn(_blocks(token_ids, size), config.calibration_tokens // size, config.seed)


def chosen_batches(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping | None,
    batches: Sequence[Tensor] | None,
    tokenizer: Any,
) -> tuple[Sequence[Tensor] | None, MixedQuantConfig]:
    """The batches to calibrate on: the given ones, or those of ``config.calibration`` if needed.

    Args:
        tokenizer: the model's tokenizer, or the name or folder to load it from; None looks where
            the model was loaded from.

    Returns:
        The batches, or None if there is nothing to calibrate or no text to do so; and the config,
        whose field calibration then says what was chosen if it was None.

    Raises:
        ValueError: the config names texts or needs tokens, and there is no tokenizer for them; also
            as `calibration_batches`.
    """
    if batches is not None or (stats is not None and not config.needs_tokens):
        return batches, config
    if config.calibration is None:
        choice, found = default_calibration(model, tokenizer)
        if choice == WIKITEXT:
            tokenizer = found
            logger.warning(
                "calibrating on %d tokens of the bundled WikiText-2 validation text; calibration= "
                "takes your own texts",
                config.calibration_tokens,
            )
        elif config.needs_tokens:
            raise ValueError(f"{config.needs_tokens} needs calibration tokens, but {found}")
        else:
            logger.warning("not calibrated: %s", found)
        config = dataclasses.replace(config, calibration=choice)
    elif config.calibration != WEIGHTS:
        if is_transformers_model(model) and not runs_on_tokens(model):
            raise ValueError(
                f"calibration must be {WEIGHTS!r}, or give stats: {type(model).__name__} does not "
                "run on token ids alone"
            )
        try:
            tokenizer = _tokenizer(model, tokenizer)
        except ValueError as error:
            raise ValueError(f"config.calibration needs a tokenizer, but {error}") from error
    if config.calibration == WEIGHTS:
        return None, config
    return calibration_batches(model, tokenizer, config), config


def default_calibration(model: nn.Module, tokenizer: Any) -> tuple[str, Any]:
    """What ``calibration=None`` stands for: "wikitext2" and the model's tokenizer, or "weights" and
    the reason."""
    if not runs_on_tokens(model):
        return WEIGHTS, f"{type(model).__name__} does not run on token ids alone"
    try:
        return WIKITEXT, _tokenizer(model, tokenizer)
    except ValueError as error:
        return WEIGHTS, f"{error}; calibrate by quantize() with tokenizer=, batches= or stats="


def _tokenizer(model: nn.Module, tokenizer: Any) -> Any:
    """The given tokenizer, or the one loaded from the given or the model's own name or folder.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    place = tokenizer or getattr(model, "name_or_path", "")
    if not place:
        raise ValueError("tokenizer is None, and the model does not say where it was loaded from")
    return load_tokenizer(place)


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
