"""Which worker computes which cell: files on a file system that all workers share, no server.

A claim is a file `<key>.<n>` that only one process can create, with its owner in it from the start.
While the owner works, a thread sets the file's time again and again; where that stops, the owner is
gone and another worker takes over by creating `<key>.<n + 1>`, which again only one can.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_SECONDS = 60.0
BEATS = 6  # heartbeats in that time


class Claims:
    """The claims in a folder, as one worker sees them.

    Args:
        folder: on a file system that all workers share; made when needed.
        stale_seconds: how long a claim without a heartbeat still counts.
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.stale_seconds = folder, stale_seconds
        self._seen: dict[Path, tuple[int, float]] = {}  # last heartbeat, when it was first seen

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the block may compute the cell; its claim ends with the block.

        A cell may have been finished between the last look at the store and the claim: look again.

        Raises:
            RuntimeError: the folder cannot be written to.
        """
        path = self._create(key)
        if path is None:
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            self._release(path)

    def clear(self, keys: Iterable[str]) -> None:
        """Remove what is left of claims on finished cells, whose owners ended before they could."""
        finished = set(keys)
        for path in self.folder.glob("*.*"):
            if path.name.split(".")[0] in finished:
                path.unlink(missing_ok=True)

    def _create(self, key: str) -> Path | None:
        path = self._path(key, 0)
        while path.exists():
            if self._alive(path):
                return None
            path = self._next(path)
        try:
            return path if self._write(path) else None
        except OSError as error:
            raise RuntimeError(
                f"output: cannot write to {self.folder} ({error}); finished cells are kept, the "
                "same command goes on from there"
            ) from error

    def _write(self, path: Path) -> bool:
        self.folder.mkdir(exist_ok=True)
        owner = json.dumps({"process": os.getpid(), "place": _place()})
        descriptor, draft = tempfile.mkstemp(
            prefix=f"{path.stem}.", suffix=".draft", dir=self.folder
        )
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(owner)
            os.chmod(draft, 0o644)  # mkstemp makes files private
            return _create_from(draft, owner, path)
        except FileNotFoundError:  # the cell is finished, and `clear` took the draft
            return False
        finally:
            Path(draft).unlink(missing_ok=True)

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}"

    def _next(self, path: Path) -> Path:
        return self._path(path.stem, int(path.suffix[1:]) + 1)

    def _alive(self, path: Path) -> bool:
        try:
            # opened first, for a network file system looks up the time anew then
            with open(path, encoding="utf-8") as file:
                text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return True  # it has just ended: look again later
        if _is_gone(text):
            return False
        now = time.monotonic()
        # Clocks of machines differ: only the time between two looks of this one counts.
        known, since = self._seen.get(path, (None, now))
        if known != beat:
            self._seen[path] = beat, now
            return True
        return now - since < self.stale_seconds

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.stale_seconds / BEATS):
            with suppress(OSError):  # the file system may be away for a moment
                os.utime(path)

    def _release(self, path: Path) -> None:
        if self._next(path).exists():
            return  # taken over: the new owner clears up
        while True:
            path.unlink(missing_ok=True)
            generation = int(path.suffix[1:]) - 1
            if generation < 0:
                return
            path = self._path(path.stem, generation)


def _create_from(draft: str, owner: str, path: Path) -> bool:
    """Create `path` from a draft with `owner` in it; False where somebody else was first."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        # a network file system may have made the link and say so when it is asked again
        return os.path.samefile(draft, path)
    except OSError:
        pass  # no links here, likely: who is killed in the middle leaves nobody's claim
    created = False
    try:
        with open(path, "x", encoding="utf-8") as file:
            created = True
            file.write(owner)
    except FileExistsError:
        return False
    except OSError:
        if created:
            path.unlink(missing_ok=True)
        raise
    return True


def _is_gone(text: str) -> bool:
    """Whether the owner was a process of this machine that has ended: no need to wait then."""
    try:
        owner = json.loads(text)
    except ValueError:  # no links here, and not written yet
        return False
    if _place() is None or owner["place"] != _place():
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _place() -> str | None:
    """What process numbers belong to: a start of the kernel and a namespace in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
