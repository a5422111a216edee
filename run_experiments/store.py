"""Results on disk: one JSON file per cell, there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .grid import Cell, canonical_json

FORMAT_VERSION = 2
ALONE = ("quantized", "layers")  # tasks whose records are all that they leave


class Store:
    """A folder of finished cells, `<key>.json` each; a calibration and, mostly, a baseline have
    `<key>.safetensors` too. These files are the same bytes whoever computed them; what differs from
    run to run (times, speeds, the machine) lies apart, in `runs/<key>.json`.

    Files are written under a temporary name, flushed to disk and renamed, so a process killed at
    any moment leaves only finished cells behind. Several processes may share a folder; `claims`
    keeps them from computing the same cell.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output: cannot make the folder {str(folder)!r}: {error}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"output: the folder {str(folder)!r} is not writable")

    def path(self, cell: Cell) -> Path:
        """The file of a cell's result, there or not."""
        return self.folder / f"{cell.key}.json"

    def run_path(self, cell: Cell) -> Path:
        """The file of when, where and how fast a cell's result was computed, there or not."""
        return self.folder / "runs" / f"{cell.key}.json"

    def artifact(self, cell: Cell) -> Path:
        """The file for the tensors that a cell leaves (statistics; what an output head reads)."""
        return self.folder / f"{cell.key}.safetensors"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result with its run record as "run", or None if there is none.

        A damaged file is moved aside (`<name>.damaged`) with a warning and counts as none.
        """
        record = self._record(cell)
        return None if record is None else {**record["result"], "run": record["run"]}

    def _record(self, cell: Cell) -> dict[str, Any] | None:
        """What `publish` writes of a cell."""
        path = self.path(cell)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return self._move_aside(path, str(error))
        record, fault = _sound(text, cell)
        if fault:
            return self._move_aside(path, fault, cell)
        digest = record["result"].get("artifact_sha256")
        if digest is not None:
            artifact = self.artifact(cell)
            if not artifact.is_file():
                return self._move_aside(path, f"{artifact.name} is missing")
            if file_sha256(artifact) != digest:
                self._move_aside(artifact, "its contents are not those that were stored")
                return self._move_aside(path, f"{artifact.name} was damaged")
        return {**record, "run": self._run(cell)}

    def _run(self, cell: Cell) -> dict[str, Any]:
        # A result stands without it.
        try:
            run = json.loads(self.run_path(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) else {}

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        """Store a cell's result, replacing an earlier one.

        result: JSON values, finite numbers, the same whenever and wherever the cell is computed,
            but for "run", which is kept apart. "artifact_sha256", if there, is that of
            `artifact(cell)`, which must be in its place already.
        """
        run = result.get("run", {})
        result = {name: value for name, value in result.items() if name != "run"}
        record = {
            "format_version": FORMAT_VERSION,
            "key": cell.key,
            "spec": json.loads(cell.to_json()),
            "result": result,
            "checksum": _checksum(result),
        }
        path, run_path = self.path(cell), self.run_path(cell)
        run_path.parent.mkdir(exist_ok=True)
        # The result comes last: where it is, the cell is finished.
        for target, contents in ((run_path, run), (path, record)):
            write_atomically(
                target, json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n"
            )
        # What a killed writer of this cell left behind is of no use now.
        for leftover in self.folder.rglob(f".{cell.key}.*.tmp"):
            leftover.unlink(missing_ok=True)

    def rows(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """A flat row per finished one among `cells`, its specification ("config.group_size") beside
        its result ("result.perplexity") and its run ("run.threads"); lists as JSON text."""
        rows = []
        for cell in cells:
            record = self._record(cell)
            if record is not None:
                parts = {**record["spec"], "result": record["result"], "run": record["run"]}
                rows.append({"key": cell.key, **_flat(parts)})
        return rows

    def publish(self, cells: Iterable[Cell], path: Path) -> None:
        """Write the records of the finished ones among `cells` that stand by themselves (no
        calibrations or baselines, which leave tensors too) to one file, a line of JSON each."""
        records = [self._record(cell) for cell in cells if cell.task in ALONE]
        lines = [json.dumps(record, sort_keys=True) for record in records if record is not None]
        write_atomically(path, "".join(line + "\n" for line in lines))

    def adopt(self, path: str | os.PathLike) -> int:
        """Take over the records of a file that `publish` wrote; returns how many were not here yet.

        Raises:
            ValueError: no such file, or a line of it is no sound record; nothing is taken then.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cells: cannot read {str(path)!r}: {error}") from error
        records = []
        for number, line in enumerate(lines, 1):
            try:
                cell = Cell.from_json(json.dumps(json.loads(line)["spec"]))
                record, fault = _sound(line, cell)
            except (ValueError, TypeError, KeyError) as error:
                fault = repr(error)
            if fault or cell.task not in ALONE:
                raise ValueError(
                    f"cells: line {number} of {str(path)!r} is no record of a finished cell"
                    f"{f' ({fault})' if fault else ''}"
                )
            records.append((cell, {**record["result"], "run": record.get("run", {})}))
        new = [(cell, result) for cell, result in records if self.get(cell) is None]
        for cell, result in new:
            self.put(cell, result)
        return len(new)

    def _move_aside(self, path: Path, fault: str, cell: Cell | None = None) -> None:
        aside = path.with_name(path.name + ".damaged")
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            return  # another process was first
        if cell and not _sound(aside.read_text(encoding="utf-8", errors="replace"), cell)[1]:
            os.replace(aside, path)  # another process had computed it again meanwhile
            return
        warnings.warn(
            f"{path} is damaged ({fault}); moved to {aside.name}, the cell is computed again",
            stacklevel=3,
        )


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write `contents` (text as UTF-8) to `path` so that the file appears whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with open(descriptor, "wb") as file:
            file.write(contents if isinstance(contents, bytes) else contents.encode())
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; results are read by whoever may read the folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat.update(_flat(entry, f"{before}{name}."))
        else:
            flat[before + name] = canonical_json(entry) if isinstance(entry, list) else entry
    return flat


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # The rename itself must survive a power cut; not every system lets a folder be opened.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _checksum(result: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(result).encode()).hexdigest()


def _sound(text: str, cell: Cell) -> tuple[dict[str, Any], str | None]:
    """The record in the text of a cell's file, or {} and what is wrong with it."""
    try:
        record = json.loads(text)
    except ValueError as error:
        return {}, f"no JSON: {error}"
    if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
        return {}, "no result in it"
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        return {}, f"format_version {version!r}, not {FORMAT_VERSION}"
    if record.get("key") != cell.key or record.get("spec") != json.loads(cell.to_json()):
        return {}, "it belongs to another cell"
    if record.get("checksum") != _checksum(record["result"]):
        return {}, "the checksum does not fit"
    return record, None
