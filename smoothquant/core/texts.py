"""The bundled texts, and texts from files: plain lines, JSON lines (also compressed), parquet."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
WIKITEXT_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20


def wikitext(split: str) -> list[str]:
    """The rows of the bundled WikiText-2 raw.

    They equal those of the Hugging Face dataset `wikitext`, `wikitext-2-raw-v1`: one per line of
    the file, with its newline, or "" for a blank line.

    Args:
        split: "test" (4,358 rows) or "validation" (3,760 rows).

    Raises:
        ValueError: there is no such split.
    """
    if split not in WIKITEXT_FILES:
        raise ValueError(f"split must be one of {sorted(WIKITEXT_FILES)}; got {split!r}")
    return list(line_rows(DATA / "wikitext-2-raw" / WIKITEXT_FILES[split]))


def read_texts(source: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    """Yield the texts of a local file, several files or an iterable.

    Args:
        source: a path, a list or tuple of existing paths (read in that order), or any other
            iterable of str. The suffix of a path decides the format:

            - .txt and .raw: one text per line, newline included. A blank line is an empty text, as
              in the WikiText datasets.
            - .jsonl and .json: one object per line, with a string "text".
            - .jsonl.zst: the same, compressed (needs the package zstandard).
            - .parquet: a string column "text" (needs pyarrow).

    Raises:
        ValueError: the file does not exist, cannot be read, has an unknown suffix or the wrong
            content. The message names the file, and the line if the format has lines.
        TypeError: the iterable yields something that is not a str.
        RuntimeError: the package that reads this format is not installed.

    Paths are checked when this function is called, contents while they are read.
    """
    if isinstance(source, (str, os.PathLike)):
        return _texts_of_file(Path(source))
    if not isinstance(source, Iterable):
        raise TypeError(f"source must be a path or an iterable of str; got {source!r}")
    if isinstance(source, (list, tuple)) and source and all(map(_is_file, source)):
        files = [_texts_of_file(Path(path)) for path in source]
        return (text for file in files for text in file)
    return _checked_texts(source)


def line_rows(path: str | os.PathLike) -> Iterator[str]:
    """Yield one text per line of a UTF-8 file: the line with its newline, "" if it is blank."""
    # Split at b"\n" only: str.splitlines also splits at characters that occur within rows.
    with open(path, "rb") as lines:
        for line in _decoded(lines):
            yield line if line.strip() else ""


def _is_file(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.path.isfile(path)


def _texts_of_file(path: Path) -> Iterator[str]:
    suffix = next((suffix for suffix in _READERS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"source must end in one of {', '.join(_READERS)}; got {str(path)!r}")
    if not _is_file(path):
        fault = "not a file" if os.path.exists(path) else "no such file"
        raise ValueError(f"source: {fault}: {str(path)!r}")
    reader, package = _READERS[suffix]
    if package and importlib.util.find_spec(package) is None:
        raise RuntimeError(
            f"reading {str(path)!r} needs the Python package {package}; "
            f"install it with: pip install {package}"
        )
    return _naming_errors(path, reader(path))


def _naming_errors(path: Path, texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts; an error while reading becomes a ValueError that names the file."""
    try:
        yield from texts
    except (OSError, ValueError) as error:
        raise ValueError(f"source: {str(path)!r}: {error}") from error


def _checked_texts(source: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(source):
        if not isinstance(text, str):
            raise TypeError(f"source must yield str; item {index} is {type(text).__name__}")
        try:
            text.encode()  # the tokenizer fails on a lone surrogate without saying where
        except UnicodeEncodeError as error:
            raise ValueError(f"source: item {index}: {error}") from error
        yield text


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number}: not UTF-8: {error}") from error


def _json_texts(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(_decoded(lines), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError('not an object with a string "text"')
            row["text"].encode()  # JSON escapes can spell lone surrogates
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        yield row["text"]


def _read_json_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as lines:
        yield from _json_texts(lines)


def _read_compressed_json_lines(path: Path) -> Iterator[str]:
    yield from _json_texts(_decompressed_lines(path))


def _decompressed_lines(path: Path) -> Iterator[bytes]:
    import zstandard

    rest, frame = b"", None
    with open(path, "rb") as file:
        data = file.read(READ_BYTES)
        while data:
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            except zstandard.ZstdError as error:
                raise ValueError(f"not zstandard data: {error}") from error
            yield from (line + b"\n" for line in lines)
            data = frame.unused_data or file.read(READ_BYTES)
    if frame is None or not frame.eof:
        raise ValueError("the zstandard data ends too early")
    if rest:
        yield rest


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError('no column "text"')
            for batch in file.iter_batches(columns=["text"]):
                for row, text in enumerate(batch.column("text").to_pylist()):
                    if not isinstance(text, str):
                        raise ValueError(
                            f'column "text": expected a string, got {text!r} (row {row})'
                        )
                    yield text
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


# Suffix -> (reader, the package it needs)
_READERS: dict[str, tuple[Callable[[Path], Iterator[str]], str | None]] = {
    ".txt": (line_rows, None),
    ".raw": (line_rows, None),
    ".jsonl": (_read_json_lines, None),
    ".json": (_read_json_lines, None),
    ".jsonl.zst": (_read_compressed_json_lines, "zstandard"),
    ".parquet": (_read_parquet, "pyarrow"),
}
