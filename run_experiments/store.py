"""Results on disk: one JSON file per cell, written atomically."""

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
PUBLISHABLE = ("quantized", "layers")  # tasks that leave a record but no tensors


class Store:
    """A folder of finished cells.

    `<key>.json` is the result of a cell. A calibration, and usually a baseline, also has
    `<key>.safetensors`. These files are byte-identical whoever computes them. What varies from run
    to run (times, speeds, the machine) goes to `runs/<key>.json`.

    Each file is written under a temporary name, flushed to disk and renamed: a process killed at
    any moment leaves only finished cells. Several processes may share a folder; `claims` keeps them
    from computing the same cell.

    Args:
        folder: created if missing.

    Raises:
        ValueError: the folder cannot be created or is not writable.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output: cannot create folder {str(folder)!r}: {error}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"output: folder {str(folder)!r} is not writable")

    def path(self, cell: Cell) -> Path:
        """Path of a cell's result, whether it exists or not."""
        return self.folder / f"{cell.key}.json"

    def run_path(self, cell: Cell) -> Path:
        """Path of the run record (when, where and how fast), whether it exists or not."""
        return self.folder / "runs" / f"{cell.key}.json"

    def artifact(self, cell: Cell) -> Path:
        """Path of the tensors of a cell: its statistics, or the inputs of the output head."""
        return self.folder / f"{cell.key}.safetensors"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result with its run record under "run", or None if not stored.

        A damaged file is renamed to `<name>.damaged` with a warning, and its cell counts as not
        stored.
        """
        record = self._record(cell)
        return None if record is None else {**record["result"], "run": record["run"]}

    def _record(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell as `publish` writes it, or None if not stored."""
        path = self.path(cell)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._move_aside(path, str(error))
            return None
        record, fault = _parse(text, cell)
        if fault:
            self._move_aside(path, fault, cell)
            return None
        digest = record["result"].get("artifact_sha256")
        if digest is not None:
            artifact = self.artifact(cell)
            if not artifact.is_file():
                self._move_aside(path, f"{artifact.name} is missing")
                return None
            if file_sha256(artifact) != digest:
                self._move_aside(artifact, "the checksum does not match")
                self._move_aside(path, f"{artifact.name} was damaged")
                return None
        return {**record, "run": self._run(cell)}

    def _run(self, cell: Cell) -> dict[str, Any]:
        # Optional: the result is valid without it.
        try:
            run = json.loads(self.run_path(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) else {}

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        """Store a cell's result, replacing any earlier one.

        Args:
            cell: the cell.
            result: JSON values with finite numbers. All but "run" must be the same whenever and
                wherever the cell is computed; "run" is stored separately. "artifact_sha256", if
                present, is the hash of `artifact(cell)`, which must exist already.
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
        # The result comes last: its presence marks the cell as finished.
        for target, contents in ((run_path, run), (path, record)):
            write_atomically(
                target, json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n"
            )
        # Remove temporary files of writers of this cell that were killed.
        for leftover in self.folder.rglob(f".{cell.key}.*.tmp"):
            leftover.unlink(missing_ok=True)

    def rows(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """Return a flat row for every finished cell.

        Columns are named like "config.group_size", "result.perplexity" and "run.threads". Lists
        become JSON text.
        """
        rows = []
        for cell in cells:
            record = self._record(cell)
            if record is not None:
                parts = {**record["spec"], "result": record["result"], "run": record["run"]}
                rows.append({"key": cell.key, **_flat(parts)})
        return rows

    def publish(self, cells: Iterable[Cell], path: Path) -> None:
        """Write the records of the finished cells to one file, one line of JSON each.

        Calibrations and baselines are left out: their records are incomplete without their tensors.
        """
        records = [self._record(cell) for cell in cells if cell.task in PUBLISHABLE]
        lines = [json.dumps(record, sort_keys=True) for record in records if record is not None]
        write_atomically(path, "".join(line + "\n" for line in lines))

    def adopt(self, path: str | os.PathLike) -> int:
        """Import the records of a file that `publish` wrote; return how many were new.

        Raises:
            ValueError: the file cannot be read, or one of its records is invalid. Nothing is
                imported then.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cells: cannot read {str(path)!r}: {error}") from error
        records = []
        for number, line in enumerate(lines, 1):
            try:
                cell = Cell.from_json(json.dumps(json.loads(line)["spec"]))
                record, fault = _parse(line, cell)
            except (ValueError, TypeError, KeyError) as error:
                fault = repr(error)
            if fault or cell.task not in PUBLISHABLE:
                raise ValueError(
                    f"cells: line {number} of {str(path)!r} is not a record of a finished cell"
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
            return  # another process moved it first
        if cell and not _parse(aside.read_text(encoding="utf-8", errors="replace"), cell)[1]:
            os.replace(aside, path)  # another process has recomputed it in the meantime
            return
        warnings.warn(
            f"{path} is damaged ({fault}); moved to {aside.name}, the cell will be computed again",
            stacklevel=3,
        )


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write `contents` (text as UTF-8) to `path`, so that the file is never seen half-written.

    Like `smoothquant.core.files.atomic_file`, but drawing stored results must not need smoothquant.
    """
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with open(descriptor, "wb") as file:
            file.write(contents if isinstance(contents, bytes) else contents.encode())
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; anyone who can read the folder may read results.
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
    """Return the sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # Makes the rename survive a power cut. Not every system can open a folder.
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


def _parse(text: str, cell: Cell) -> tuple[dict[str, Any], str | None]:
    """Parse a cell's file: (record, None), or ({}, what is wrong)."""
    try:
        record = json.loads(text)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
        return {}, "it has no result"
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        return {}, f"format_version is {version!r}, expected {FORMAT_VERSION}"
    if record.get("key") != cell.key or record.get("spec") != json.loads(cell.to_json()):
        return {}, "it belongs to another cell"
    if record.get("checksum") != _checksum(record["result"]):
        return {}, "the checksum does not match"
    return record, None
