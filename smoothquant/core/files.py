"""Files and folders that appear whole or not at all.

Both are written beside their place under another name, `.<name>.<random>.tmp`, flushed to the disk
and renamed. A process that is killed leaves at most that other name behind.
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
    """Yield an empty file to write, which takes the place of `path` when the block ends.

    Folders on the way are made. An exception leaves `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path)
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers let only the owner read
        _flush(partial)
        os.replace(partial, path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes the place of `folder` when the block ends.

    Without `overwrite`, OSError if `folder` is there by then and not empty. An exception leaves
    `folder` as it was.
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
    # so that the names in it survive a power cut; not every system lets a folder be opened
    with suppress(OSError):
        _flush(folder)
