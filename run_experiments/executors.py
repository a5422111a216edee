"""Where workers run: in this process, in others of this machine, on Dask or on Slurm.

Every executor starts workers (`worker.work`) with the same job, a JSON text, and nothing else; they
share the work out among themselves by claims in the store.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from .claims import Claims
from .grid import Cell
from .store import Store
from .worker import POLL_SECONDS, Job, Report, error_from_json, work

LOCAL = "local"
FORMS = "local, dask://HOST:PORT, slurm (or slurm://local, slurm://debug to try it without one)"


class Handle(Protocol):
    """A worker that was started; futures of Dask and jobs of submitit are such, too."""

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None:
        """Waits for the worker to end; what it raised, or that it vanished."""

    def cancel(self) -> Any: ...


def check(executor: str, jobs: int | None, slurm: Mapping[str, Any]) -> None:
    """Raise ValueError for an executor or a number of workers that cannot be meant."""
    if executor != LOCAL and not re.fullmatch(
        r"dask://[^/\s]+:\d+|slurm(://(local|debug))?", executor
    ):
        raise ValueError(f"executor must be one of {FORMS}; got {executor!r}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    if slurm and not executor.startswith("slurm"):
        raise ValueError(f"slurm: parameters for Slurm, but the executor is {executor!r}")


def run(
    job: Job, report: Report, executor: str, jobs: int | None, slurm: Mapping[str, Any]
) -> None:
    """Have a job done.

    Args:
        job: what is missing.
        report: called with each cell and its result as soon as it is in the store.
        executor: "local", "dask://host:port" or "slurm".
        jobs: workers; None for one, or all of a Dask cluster's.
        slurm: parameters of submitit's executor.

    Raises:
        RuntimeError: a package is missing, no worker is left, or as `worker.work`.
        ValueError: as `worker.work`.
    """
    if executor == LOCAL and jobs in (None, 1):
        work(job.to_json(), report)
        return
    start = {"local": _local, "dask": _dask, "slurm": _slurm}[executor.partition(":")[0]]
    with ExitStack() as stack:
        for handle in (handles := start(job, executor, jobs, slurm, stack)):
            stack.callback(lambda handle=handle: handle.done() or handle.cancel())
        _watch(job, handles, report)
    cells = map(Cell.from_json, job.cells)
    Claims(Path(job.output) / "claims").clear(cell.key for cell in cells)


def _watch(job: Job, handles: list[Handle], report: Report) -> None:
    """Report cells as they appear in the store until all are there or no worker is left."""
    store = Store(job.output)
    waiting = [Cell.from_json(text) for text in job.cells]
    while True:
        at_work = not all(handle.done() for handle in handles)
        errors = [] if at_work else [handle.exception() for handle in handles]
        names = set(os.listdir(store.folder))
        for cell in list(waiting):
            result = store.get(cell) if store.path(cell).name in names else None
            if result is not None:
                waiting.remove(cell)
                report(cell, result)
        if not waiting:
            return
        if not at_work:
            raise next(filter(None, errors), None) or RuntimeError(
                f"{len(waiting)} cells are missing after all workers ended; finished cells are "
                f"in {store.folder}, the same command goes on from there"
            )
        time.sleep(POLL_SECONDS)


class _Process:
    """A worker in a process of this machine, which ends when this one does."""

    def __init__(self, job: str) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from run_experiments.worker import main; exit(main())"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
        )
        with suppress(BrokenPipeError):
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()

    def done(self) -> bool:
        return self._process.poll() is not None

    def exception(self) -> Exception | None:
        answer = self._process.stdout.read()
        status = self._process.wait()
        if answer:
            return error_from_json(answer)
        if status == 0:
            return None
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return RuntimeError(
            f"a worker {how}; finished cells are kept, the same command goes on from there"
        )

    def cancel(self) -> None:
        self._process.kill()
        self._process.wait()


def _local(job: Job, executor: str, jobs: int, slurm, stack: ExitStack) -> list[Handle]:
    return [_Process(job.to_json()) for _ in range(jobs)]


def _dask(job: Job, executor: str, jobs: int | None, slurm, stack: ExitStack) -> list[Handle]:
    try:
        from distributed import Client
    except ImportError as error:
        raise _missing("dask", error) from error
    address = executor.removeprefix("dask://")
    try:
        client = stack.enter_context(Client(f"tcp://{address}", timeout=10))
        client.wait_for_workers(jobs or 1, timeout=60)
    except (OSError, TimeoutError, asyncio.TimeoutError) as error:
        raise RuntimeError(f"executor: no Dask workers at {address}: {error}") from error
    # A worker each; a process can only do one cell at a time, however many threads it has.
    workers = list(client.scheduler_info(n_workers=-1)["workers"])[:jobs]
    text = _while_wanted(job, stack).to_json()
    return [
        client.submit(work, text, workers=[name], allow_other_workers=True, pure=False)
        for name in workers
    ]


def _slurm(
    job: Job, executor: str, jobs: int | None, slurm: Mapping[str, Any], stack: ExitStack
) -> list[Handle]:
    try:
        import submitit
    except ImportError as error:
        raise _missing("slurm", error) from error
    cluster = executor.partition("://")[2] or "slurm"
    try:
        pool = submitit.AutoExecutor(Path(job.output) / "slurm", cluster=cluster)
    except RuntimeError as error:  # no sbatch
        raise RuntimeError(f"executor: {error}") from error
    try:
        pool.update_parameters(**{"name": "mixedquant", **slurm})
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {error}") from error
    text = _while_wanted(job, stack).to_json()
    with pool.batch():
        handles = [pool.submit(work, text) for _ in range(jobs or 1)]
    return handles


def _while_wanted(job: Job, stack: ExitStack) -> Job:
    """The job, for workers that this process cannot stop at once: they stop when the block ends,
    after the cells they are at. They go on to the end where this process is killed."""
    descriptor, path = tempfile.mkstemp(prefix=".wanted.", suffix=".tmp", dir=job.output)
    os.close(descriptor)
    stack.callback(Path(path).unlink, missing_ok=True)
    return replace(job, wanted=path)


def _missing(extra: str, error: ImportError) -> RuntimeError:
    return RuntimeError(
        f"the executor needs a package that is missing ({error}): "
        f"pip install 'smoothquant[{extra}]'"
    )
