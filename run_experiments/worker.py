"""A worker: computes the cells of a job that nobody else does, until all are in the store.

Any number of workers, on any machines that share the store's folder, may have the same job; claims
keep them from computing the same cell. An executor (`executors`) starts them with the job's JSON.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from .claims import STALE_SECONDS, Claims
from .grid import Cell, canonical_json
from .store import Store

POLL_SECONDS = 0.2
# One model, and the threads of one process, serve one cell at a time.
_one_job_at_a_time = threading.Lock()

Report = Callable[[Cell, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What a worker is given: JSON values only.

    cells: specifications, `Cell.to_json` of each.
    source: what `smoothquant.bundled.load_model` takes; a folder must be there for every worker.
    output: folder of the store, the same for every worker.
    threads: of torch; None for what the worker's machine gives.
    stale_seconds: how long a claim without a heartbeat still counts.
    progress: show progress bars of single cells.
    wanted: a file; workers stop between two cells when it is gone. None: they never do.
    """

    cells: list[str]
    source: str
    output: str
    threads: int | None = None
    stale_seconds: float = STALE_SECONDS
    progress: bool = False
    wanted: str | None = None

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def work(job: str, report: Report | None = None) -> None:
    """Compute what is missing of a job, and wait for what other workers compute of it.

    Args:
        job: `Job.to_json`.
        report: called with each cell that was not in the store at first, and its result.

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
                    # what another worker finished just before the claim is not done again
                    result = store.get(cell) if mine else None
                    if mine and result is None:
                        bench = bench or _bench(job, store, list(waiting.values()))
                        result = _computed(cell, bench, store)
            if result is not None:
                del waiting[key]
                report(cell, result)
        if len(waiting) == before:
            time.sleep(POLL_SECONDS)
    claims.clear(cell.key for cell in cells)


def _bench(job: Job, store: Store, cells: list[Cell]):
    """The model, loaded and found to be the one that the cells were planned for."""
    from . import runner

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    model = canonical_json(cells[0].model)
    bench = _loaded_bench(runner.Bench, job.source, model, str(store.folder), job.progress)
    bench.check(cells)
    return bench


@lru_cache(maxsize=1)
def _loaded_bench(make: Callable, source: str, model: str, folder: str, progress: bool):
    """From job to job the same, so that a process loads a model once; model: its identity."""
    return make(source, json.loads(model)["dtype"], Store(folder), progress=progress)


def unload() -> None:
    """Forget the model that this process has loaded for its jobs."""
    _loaded_bench.cache_clear()


def _computed(cell: Cell, bench, store: Store) -> dict[str, Any]:
    from . import runner

    try:
        result = runner.run_cell(cell, bench)
        store.put(cell, result)
    except (OSError, runner.SafetensorError) as error:
        raise RuntimeError(
            f"output: {cell.label} was not kept ({error}); finished cells are in {store.folder}, "
            "the same command goes on from there"
        ) from error
    return result


def error_from_json(text: str) -> Exception:
    """The exception that `main` wrote, by the name of a built-in type, else a RuntimeError."""
    error = json.loads(text)
    kind = getattr(builtins, error["type"], RuntimeError)
    return kind(error["message"])


def main() -> int:
    """Reads a job from the first line of stdin and works on it until stdin ends, as it does when
    the process that gave the job ends in any way. Writes an error as JSON to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the giver of the job says when to stop
    job = sys.stdin.readline()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    try:
        work(job)
    except Exception as error:
        json.dump({"type": type(error).__name__, "message": str(error)}, answer)
        answer.flush()
        return 1
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock would keep the interpreter from ending
        pass
    os._exit(1)
