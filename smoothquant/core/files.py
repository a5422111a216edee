"""Atomic writes: a file or folder appears complete or not at all.

It is written under a temporary name in the same folder, `.<name>.<random>.tmp`, flushed to the disk
and renamed. A killed process leaves at most the temporary file or folder behind.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty file to write; it replaces `path` when the block ends.

    Creates missing parent folders. An exception leaves `path` unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path)
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers make the file readable by its owner only
        _flush(partial)
        os.replace(partial, path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `folder` when the block ends.

    An exception leaves `folder` unchanged.

    Raises:
        OSError: `folder` exists and is not empty when the block ends, and `overwrite` is False.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(folder)
    partial.mkdir()
    try:
        yield partial
        publish_folder(partial, folder, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Flush a folder to the disk and rename it to `folder`, as `atomic_folder` does."""
    replaced = _sibling(folder)
    mode = partial.stat().st_mode & 0o666
    try:
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _flush(path)
            else:
                _flush_folder(path)
        _flush_folder(partial)
        if overwrite and folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        _flush_folder(folder.parent)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # Makes renames survive a power cut. Some systems cannot open folders.
    with suppress(OSError):
        _flush(folder)
