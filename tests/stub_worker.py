"""A worker with trivial cells, for tests of everything around them: the store, claims and kills.

Each computation appends a line to the file `computed` in the store's folder: the cell's key, and
whether the cell was already finished.

    python stub_worker.py SECONDS < job
"""

import os
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run_experiments.grid import Cell
    from run_experiments.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = float(sys.argv[1])


class Bench:
    def __init__(self, source: str, dtype: str, store: "Store", *, progress: bool) -> None:
        self.store = store

    def check(self, cells: "list[Cell]") -> None:
        pass


def run_cell(cell: "Cell", bench: Bench) -> dict[str, Any]:
    finished = bench.store.path(cell).exists()
    with open(bench.store.folder / "computed", "a") as file:
        file.write(f"{cell.key} {finished}\n")
    time.sleep(SECONDS)
    return {"value": int(cell.key[:8], 16), "run": {"process": os.getpid()}}


stub: Any = types.ModuleType("run_experiments.runner")
stub.Bench, stub.run_cell, stub.SafetensorError = Bench, run_cell, OSError
sys.modules["run_experiments.runner"] = stub

from run_experiments import worker  # noqa: E402

sys.exit(worker.main())
