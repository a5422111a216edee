"""Atomic writes: a file or folder appears complete or not at all.

It is written under a temporary name in the same folder, `.<name>.<random>.tmp`, flushed to the disk
and renamed. A folder that is replaced is exchanged with the new one in one step. Where the system
has no such step, it is first renamed to `.<name>.replaced`; if the process is killed before the new
one has taken its place, `restore_folder` brings it back.

A killed process leaves at most the temporary file or folder behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MOST_NAME_BYTES = 255


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty file to write; it replaces `path` when the block ends.

    Creates missing parent folders. An exception leaves `path` unchanged.

    Raises:
        OSError: as `disk_errors`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path)
    try:
        with disk_errors(path):
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
        FileExistsError: `folder` exists and is not empty when the block ends, and `overwrite` is
            False.
        OSError: as `disk_errors`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(folder)
    try:
        with disk_errors(folder):
            partial.mkdir()
            yield partial
            publish_folder(partial, folder, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Flush a folder to the disk and rename it to `folder`, as `atomic_folder` does."""
    mode = partial.stat().st_mode & 0o666
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            _flush(path)
        else:
            _flush_folder(path)
    _flush_folder(partial)
    if overwrite:
        # The old folder must not take the name of `partial`, from which a caller may resume.
        staged = _sibling(folder)
        partial.rename(staged)
        try:
            _replace(staged, folder)
        except BaseException:
            staged.rename(partial)
            raise
        shutil.rmtree(staged, ignore_errors=True)  # what was replaced, if they were exchanged
    else:
        _rename(partial, folder)
    _flush_folder(folder.parent)


def restore_folder(folder: Path) -> None:
    """Bring back a folder whose replacement was interrupted; do nothing otherwise."""
    # Nothing was replaced, or the replacement is in its place, or the path has no name ("/").
    with suppress(OSError, ValueError):
        hidden_sibling(folder, "replaced").rename(folder)


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "folder already exists", str(folder)) from error
        raise


def _replace(partial: Path, folder: Path) -> None:
    """Rename a folder, in place of another one if there is any; others may do so meanwhile."""
    replaced = hidden_sibling(folder, "replaced")
    while True:
        restore_folder(folder)
        try:
            if _exchange(partial, folder):
                return
            shutil.rmtree(replaced, ignore_errors=True)
            _rename(folder, replaced)
        except FileNotFoundError:  # nothing to replace
            pass
        except FileExistsError:  # another process is at this point
            continue
        try:
            _rename(partial, folder)
        except FileExistsError:  # another process was faster
            continue
        except BaseException:
            restore_folder(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        return


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system cannot."""
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    if rename(*paths, RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


# safetensors reports errors of the system as text.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise every error of the disk while `path` is written as OSError.

    Raises:
        OSError: with the error's number and path; if the disk is full, with the free bytes.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full or "bytes are free" in str(error):
            raise
        raise _disk_error(error.errno, error.filename or path) from error
    except SafetensorError as error:
        found = SYSTEM_ERROR.search(str(error))
        if not found:
            raise
        raise _disk_error(int(found[1]), path) from error


def _disk_error(number: int | None, path: Any) -> OSError:
    free = _free(path)
    return OSError(
        number, f"{os.strerror(number or errno.EIO)} ({free:,} bytes are free)", str(path)
    )


def _free(path: str | os.PathLike) -> int:
    """The free bytes on the disk of a path that may not exist yet."""
    return shutil.disk_usage(next(p for p in Path(path).absolute().parents if p.exists())).free


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system frees it if the process dies.

    Raises:
        RuntimeError: another process or thread holds it; with `message`.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise RuntimeError(f"{message} ({path} is locked)") from error
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            break  # some network file systems have none
        os.close(descriptor)  # its last holder has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def hidden_sibling(path: Path, suffix: str) -> Path:
    """`.<name>.<suffix>` beside `path`, with the name cut to what a file name may have."""
    name = os.fsdecode(os.fsencode(path.name)[: MOST_NAME_BYTES - len(suffix) - 2])
    return path.with_name(f".{name}.{suffix}")


def _sibling(path: Path) -> Path:
    return hidden_sibling(path, f"{uuid.uuid4().hex}.tmp")


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
