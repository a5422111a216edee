"""A worker computes the cells of a job until all of them are in the store.

Any number of workers, on all machines that share the store's folder, can work on the same job.
Claims keep them from computing the same cell. `executors` starts them with the job as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .claims import STALE_SECONDS, Claims
from .grid import Cell, canonical_json
from .store import Store

if TYPE_CHECKING:
    from .runner import Bench  # imports torch

POLL_SECONDS = 0.2
# A process computes one cell at a time: cells share its model and its threads.
_one_job_at_a_time = threading.Lock()

Report = Callable[[Cell, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """The input of a worker, as JSON values.

    Args:
        cells: `Cell.to_json` of each cell.
        source: anything `smoothquant.bundled.load_model` accepts. A folder must exist on every
            worker's machine.
        output: folder of the store, the same for every worker.
        threads: torch threads; None for torch's default.
        stale_seconds: how long a claim stays valid without a heartbeat.
        progress: show progress bars within cells.
        keep: keep the most accurate packed model in memory, for `kept_model` in this process.
        wanted: path of a file. Once it is deleted, workers stop after their current cell. None:
            they only stop when the job is done.
    """

    cells: list[str]
    source: str
    output: str
    threads: int | None = None
    stale_seconds: float = STALE_SECONDS
    progress: bool = False
    keep: bool = False
    wanted: str | None = None

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def work(job: str, report: Report | None = None) -> None:
    """Compute the missing cells of a job, and wait for those that other workers compute.

    Args:
        job: `Job.to_json`.
        report: called with each cell that was missing, and its result.

    Raises:
        ValueError: the cells do not fit the model.
        RuntimeError: the model's files changed, or a result cannot be written.
    """
    with _one_job_at_a_time:
        _work(Job.from_json(job), report or (lambda cell, result: None))


def _work(job: Job, report: Report) -> None:
    store = Store(job.output)
    claims = Claims(store.folder / "claims", job.stale_seconds)
    cells = [Cell.from_json(text) for text in job.cells]
    waiting = {cell.key: cell for cell in cells}
    bench = None
    while waiting:
        before = len(waiting)
        for key, cell in list(waiting.items()):
            if job.wanted and not os.path.exists(job.wanted):
                return
            result = store.get(cell)
            if result is None:
                if any(need.key in waiting for need in cell.needs):
                    continue
                with claims.claim(key) as mine:
                    # another worker may have finished the cell just before the claim
                    result = store.get(cell) if mine else None
                    if mine and result is None:
                        bench = bench or _bench(job, store, list(waiting.values()))
                        result = _compute(cell, bench, store)
            if result is not None:
                del waiting[key]
                report(cell, result)
        if len(waiting) == before:
            time.sleep(POLL_SECONDS)
    claims.clear(cell.key for cell in cells)


def _bench(job: Job, store: Store, cells: list[Cell]) -> Bench:
    """Load the model and check that the cells were planned for it."""
    from . import runner

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    model = canonical_json(cells[0].model)
    bench = _loaded_bench(runner.Bench, job.source, model, str(store.folder), job.progress)
    bench.keep = job.keep
    bench.check(cells)
    return bench


@lru_cache(maxsize=1)
def _loaded_bench(
    make: Callable[..., Bench], source: str, model: str, folder: str, progress: bool
) -> Bench:
    """Cached, so that a process loads a model once for all its jobs. model: identity as JSON."""
    return make(source, json.loads(model)["dtype"], Store(folder), progress=progress)


def kept_model(cell: Cell, job: Job) -> Any:
    """The quantized model of a finished cell: the one that this process kept, or made again."""
    from . import runner

    with _one_job_at_a_time:
        bench = _bench(job, Store(job.output), [cell])
        if bench.kept is not None and bench.kept[0] == cell.key:
            return bench.kept[1]
        return runner.quantized_model(cell, bench)[0]


def unload() -> None:
    """Free the model that this process has loaded."""
    _loaded_bench.cache_clear()


def _compute(cell: Cell, bench: Bench, store: Store) -> dict[str, Any]:
    from . import runner

    try:
        result = runner.run_cell(cell, bench)
        store.put(cell, result)
    except (OSError, runner.SafetensorError) as error:
        raise RuntimeError(
            f"output: cannot store {cell.label} ({error}); finished cells are in {store.folder}, "
            "run the same command again to continue"
        ) from error
    return result


def pickled_error(error: Exception) -> bytes:
    """Pickle an error. One that would not return as it was becomes a RuntimeError that names it."""
    try:
        data = pickle.dumps(error)
        again = pickle.loads(data)
        if type(again) is type(error) and str(again) == str(error):
            return data
    except Exception:  # whatever the methods of a foreign class raise
        pass
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def main() -> int:
    """Read a job from the first line of stdin and work on it.

    Exits when stdin closes, that is, also when the parent process dies. Writes an error to stdout,
    as `pickled_error`. Returns the exit status.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent decides when to stop
    job = sys.stdin.readline()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # all other output goes to stderr
    try:
        work(job)
    except Exception as error:
        answer.write(pickled_error(error))
        answer.flush()
        return 1
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would keep the interpreter from exiting
        pass
    os._exit(1)
