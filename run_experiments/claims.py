"""Claims decide which worker computes which cell. They need a shared file system, but no server.

A claim is a file `<key>.<n>` that names its owner. Only one process can create it. While the owner
works, a thread keeps updating the file's modification time. When these heartbeats stop, another
worker takes over by creating `<key>.<n + 1>`, which again only one process can do.

Why not filelock: its `SoftFileLease` (4.3) has heartbeats and takeovers too, but it creates the
file first and writes the owner afterwards. A worker killed in between leaves an empty file that
nobody ever takes over. Here, a hard link creates the file together with its contents.
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
BEATS = 6  # heartbeats per STALE_SECONDS


class Claims:
    """One worker's view of the claims in a folder.

    Args:
        folder: on a file system that all workers share; created when needed.
        stale_seconds: how long a claim stays valid without a heartbeat.
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.stale_seconds = folder, stale_seconds
        self._seen: dict[Path, tuple[int, float]] = {}  # (heartbeat, when first seen)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Try to claim a cell for the length of a `with` block.

        Yields True if this worker has the claim. Check the store again then: another worker may
        have finished the cell just before.

        Raises:
            RuntimeError: the folder is not writable.
        """
        path = self._create(key)
        if path is None:
            yield False
            return
        ended = threading.Event()
        heartbeat = threading.Thread(target=self._beat, args=(path, ended), daemon=True)
        heartbeat.start()
        try:
            yield True
        finally:
            ended.set()
            heartbeat.join()
            self._release(path)

    def clear(self, keys: Iterable[str]) -> None:
        """Remove claims on finished cells whose owners were killed before they could."""
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
                f"output: cannot write to {self.folder} ({error}); finished cells are kept, run "
                "the same command again to continue"
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
        except FileNotFoundError:  # the cell is finished, and `clear` removed the draft
            return False
        finally:
            Path(draft).unlink(missing_ok=True)

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}"

    def _next(self, path: Path) -> Path:
        return self._path(path.stem, int(path.suffix[1:]) + 1)

    def _alive(self, path: Path) -> bool:
        try:
            # opening makes a network file system refresh the modification time
            with open(path, encoding="utf-8") as file:
                text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return True  # it ended just now: look again later
        if _is_gone(text):
            return False
        now = time.monotonic()
        # Clocks differ between machines: measure with this machine's clock alone.
        known, since = self._seen.get(path, (None, now))
        if known != beat:
            self._seen[path] = beat, now
            return True
        return now - since < self.stale_seconds

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.stale_seconds / BEATS):
            with suppress(OSError):  # the file system may be unavailable for a moment
                os.utime(path)

    def _release(self, path: Path) -> None:
        if self._next(path).exists():
            return  # taken over: the new owner cleans up
        while True:
            path.unlink(missing_ok=True)
            generation = int(path.suffix[1:]) - 1
            if generation < 0:
                return
            path = self._path(path.stem, generation)


def _create_from(draft: str, owner: str, path: Path) -> bool:
    """Create `path` from a draft that contains `owner`; False if another worker was first."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        # a network file system may have created our link and then retried
        return os.path.samefile(draft, path)
    except OSError:
        pass  # probably no hard links here; below, a kill in between leaves a claim without owner
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
    """Whether the owner was a process on this machine that has ended: no need to wait then."""
    try:
        owner = json.loads(text)
    except ValueError:  # no hard links here, and not written yet
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
    """The scope of process ids: one boot of one kernel, and a PID namespace in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
