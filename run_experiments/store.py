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

FORMAT_VERSION = 1
ALONE = ("quantized", "layers")  # tasks whose records are all that they leave


class Store:
    """A folder of finished cells, `<key>.json` each; a calibration and, mostly, a baseline have
    `<key>.safetensors` too.

    Files are written under a temporary name, flushed to disk and renamed, so a process killed at
    any moment leaves only finished cells behind. Several processes may share a folder: a cell
    computed twice is stored twice with equal contents.

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

    def artifact(self, cell: Cell) -> Path:
        """The file for the tensors that a cell leaves (statistics; what an output head reads)."""
        return self.folder / f"{cell.key}.safetensors"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result, or None if there is none.

        A damaged file is moved aside (`<name>.damaged`) with a warning and counts as none.
        """
        path = self.path(cell)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return self._move_aside(path, str(error))
        fault = _fault(text, cell)
        if fault:
            return self._move_aside(path, fault)
        result = json.loads(text)["result"]
        digest = result.get("run", {}).get("artifact_sha256")
        if digest is not None:
            artifact = self.artifact(cell)
            if not artifact.is_file():
                return self._move_aside(path, f"{artifact.name} is missing")
            if file_sha256(artifact) != digest:
                self._move_aside(artifact, "its contents are not those that were stored")
                return self._move_aside(path, f"{artifact.name} was damaged")
        return result

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        """Store a cell's result, replacing an earlier one.

        result: JSON values, finite numbers. `result["run"]["artifact_sha256"]`, if there, is that
        of `artifact(cell)`, which must be in its place already.
        """
        record = {
            "format_version": FORMAT_VERSION,
            "key": cell.key,
            "spec": json.loads(cell.to_json()),
            "result": result,
            "checksum": _checksum(result),
        }
        path = self.path(cell)
        write_atomically(path, json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
        # What a killed writer of this cell left behind is of no use now.
        for leftover in self.folder.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)

    def publish(self, cells: Iterable[Cell], path: Path) -> None:
        """Write the records of the finished ones among `cells` that stand by themselves (no
        calibrations or baselines, which leave tensors too) to one file, a line of JSON each."""
        lines = [
            json.dumps(json.loads(self.path(cell).read_text(encoding="utf-8")), sort_keys=True)
            for cell in cells
            if cell.task in ALONE and self.get(cell) is not None
        ]
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
                record = json.loads(line)
                cell = Cell.from_json(json.dumps(record["spec"]))
                fault = _fault(line, cell)
            except (ValueError, TypeError, KeyError) as error:
                fault = repr(error)
            if fault or cell.task not in ALONE:
                raise ValueError(
                    f"cells: line {number} of {str(path)!r} is no record of a finished cell"
                    f"{f' ({fault})' if fault else ''}"
                )
            records.append((cell, record["result"]))
        new = [(cell, result) for cell, result in records if self.get(cell) is None]
        for cell, result in new:
            self.put(cell, result)
        return len(new)

    def _move_aside(self, path: Path, fault: str) -> None:
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        warnings.warn(
            f"{path} is damaged ({fault}); moved to {aside.name}, the cell is computed again",
            stacklevel=3,
        )


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that the file appears whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; results are read by whoever may read the folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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


def _fault(text: str, cell: Cell) -> str | None:
    """Say what is wrong with the text of a cell's file, or return None."""
    try:
        record = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
        return "no result in it"
    if record.get("format_version") != FORMAT_VERSION:
        return f"format_version {record.get('format_version')!r}, not {FORMAT_VERSION}"
    if record.get("key") != cell.key or record.get("spec") != json.loads(cell.to_json()):
        return "it belongs to another cell"
    if record.get("checksum") != _checksum(record["result"]):
        return "the checksum does not fit"
    return None
