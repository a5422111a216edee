"""Keeps the most accurate model of a sweep in a folder, and lets it write a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .grid import Cell
from .rows import Row, is_packed

CELL = "cell.json"  # what the model in the folder was made from
PROMPT = "The capital of France is"
NEW_TOKENS = 24


def best_row(rows: list[Row]) -> Row | None:
    """The packed model of lowest perplexity; None if there is none."""
    return min(filter(is_packed, rows), key=lambda row: row.result["perplexity"], default=None)


def is_kept(folder: Path) -> bool:
    """Whether a sweep kept its best model in the folder, so that another may replace it."""
    return (folder / CELL).is_file()


def keep(
    row: Row, folder: Path, model: Callable[[Cell], Any], tokenizer: Callable[[], Any]
) -> None:
    """Save a row's model with its tokenizer and measured numbers, unless the folder has it already.

    Args:
        row: a row of a packed model.
        folder: replaced if it is one that a sweep has kept.
        model, tokenizer: called if the model has to be saved.

    Raises:
        ValueError: the folder holds something else.
        OSError: writing failed.
    """
    from smoothquant.checkpoints.folder import is_quantized_folder, save_quantized
    from smoothquant.core.files import atomic_file

    cell = row.cell
    assert cell is not None
    stamp = folder / CELL
    if (
        is_quantized_folder(folder)
        and stamp.is_file()
        and stamp.read_text(encoding="utf-8") == cell.to_json()
    ):
        return
    windows = f"{row.result['windows']} windows of {row.result['seqlen']:,} tokens"
    dataset = f"WikiText-2 test, {windows}"
    measured = {f"{name}, {dataset}": row.result[name] for name in ("perplexity", "kl", "top1")}
    save_quantized(
        model(cell),
        folder,
        tokenizer(),
        overwrite=is_kept(folder),
        evaluation={name: value for name, value in measured.items() if value is not None},
    )
    with atomic_file(stamp) as partial:
        partial.write_text(cell.to_json(), encoding="utf-8")


def sentence(folder: Path) -> str | None:
    """How the model in a folder completes the sentence that `PROMPT` begins; None if it generates
    no text."""
    from smoothquant.bundled import load_model

    model, tokenizer = load_model(folder)
    if tokenizer is None or not model.can_generate():
        return None
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    end = re.search(r"[.!?](?=\s|$)", text)
    return text[: end.end()] if end else text
