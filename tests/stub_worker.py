"""A worker whose cells are trivial to compute, to try what is around them: the store, claims, ends
at any moment. Each computation leaves a line in `computed` of the store's folder: the cell's key
and whether it was finished already.

    python stub_worker.py SECONDS < job
"""

import os
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = float(sys.argv[1])


class Bench:
    def __init__(self, source, dtype, store, *, progress):
        self.store = store

    def check(self, cells):
        pass


def run_cell(cell, bench):
    finished = bench.store.path(cell).exists()
    with open(bench.store.folder / "computed", "a") as file:
        file.write(f"{cell.key} {finished}\n")
    time.sleep(SECONDS)
    return {"value": int(cell.key[:8], 16), "run": {"process": os.getpid()}}


stub = types.ModuleType("run_experiments.runner")
stub.Bench, stub.run_cell, stub.SafetensorError = Bench, run_cell, OSError
sys.modules["run_experiments.runner"] = stub

from run_experiments import worker  # noqa: E402

sys.exit(worker.main())
