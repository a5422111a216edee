"""Where workers run: in this process, in local subprocesses, on Dask or on Slurm.

An executor starts workers (`worker.work`) and gives each of them the same job as JSON. The workers
divide the cells among themselves through claims in the store.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from smoothquant.core.version import install_command

from .claims import Claims
from .grid import Cell
from .store import Store
from .worker import POLL_SECONDS, Job, Report, work

LOCAL = "local"
FORMS = "local, dask://HOST:PORT, slurm (slurm://local or slurm://debug to try it without Slurm)"


class Handle(Protocol):
    """A running worker. Dask futures and submitit jobs have these methods too."""

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None:
        """Wait for the worker to end, and return what it raised, or an error if it died."""

    def cancel(self) -> Any: ...


def check(executor: str, jobs: int | None, slurm: Mapping[str, Any]) -> None:
    """Raise ValueError if the executor, the number of workers or the parameters are invalid."""
    if executor != LOCAL and not re.fullmatch(
        r"dask://[^/\s]+:\d+|slurm(://(local|debug))?", executor
    ):
        raise ValueError(f"executor must be one of {FORMS}; got {executor!r}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    if slurm and not executor.startswith("slurm"):
        raise ValueError(f"slurm: parameters need executor slurm; got {executor!r}")


def run(
    job: Job, report: Report, executor: str, jobs: int | None, slurm: Mapping[str, Any]
) -> None:
    """Run a job to its end.

    Args:
        job: the missing cells.
        report: called with each cell and its result as soon as it is in the store.
        executor: "local", "dask://host:port" or "slurm".
        jobs: number of workers. None: one, or every worker of a Dask cluster.
        slurm: parameters of submitit's executor.

    Raises:
        RuntimeError: a package is missing, all workers died, or as in `worker.work`.
        ValueError: as in `worker.work`.
    """
    if executor == LOCAL and jobs in (None, 1):
        work(job.to_json(), report)
        return
    start = {"local": _local, "dask": _dask, "slurm": _slurm}[executor.partition(":")[0]]
    with ExitStack() as stack:
        handles = start(job, executor, jobs, slurm, stack)
        for handle in handles:
            stack.callback(_cancel, handle)
        _watch(job, handles, report)
    cells = map(Cell.from_json, job.cells)
    Claims(Path(job.output) / "claims").clear(cell.key for cell in cells)


def _cancel(handle: Handle) -> None:
    if not handle.done():
        handle.cancel()


def _watch(job: Job, handles: Sequence[Handle], report: Report) -> None:
    """Report cells as they appear in the store, until all are there or all workers have ended."""
    store = Store(job.output)
    waiting = [Cell.from_json(text) for text in job.cells]
    while True:
        running = not all(handle.done() for handle in handles)
        errors = [] if running else [handle.exception() for handle in handles]
        names = set(os.listdir(store.folder))
        for cell in list(waiting):
            result = store.get(cell) if store.path(cell).name in names else None
            if result is not None:
                waiting.remove(cell)
                report(cell, result)
        if not waiting:
            return
        if not running:
            raise next(filter(None, errors), None) or RuntimeError(
                f"all workers ended, but {len(waiting)} cells are missing; finished cells are in "
                f"{store.folder}, run the same command again to continue"
            )
        time.sleep(POLL_SECONDS)


class _Process:
    """A worker in a local subprocess. It ends when this process ends."""

    def __init__(self, job: str) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from run_experiments.worker import main; exit(main())"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        with suppress(BrokenPipeError):
            self._stdin.write(f"{job}\n".encode())
            self._stdin.flush()

    def done(self) -> bool:
        return self._process.poll() is not None

    def exception(self) -> Exception | None:
        answer = self._stdout.read()
        status = self._process.wait()
        if answer and status >= 0:  # a killed worker may have written a part
            return pickle.loads(answer)
        if status == 0:
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        return RuntimeError(
            f"a worker {how}; finished cells are kept, run the same command again to continue"
        )

    def cancel(self) -> None:
        self._process.kill()
        self._process.wait()


def _local(
    job: Job, executor: str, jobs: int | None, slurm: Mapping[str, Any], stack: ExitStack
) -> Sequence[Handle]:
    return [_Process(job.to_json()) for _ in range(jobs or 1)]


def _dask(
    job: Job, executor: str, jobs: int | None, slurm: Mapping[str, Any], stack: ExitStack
) -> Sequence[Handle]:
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
    # One job per worker: a process computes one cell at a time, however many threads it has.
    workers = list(client.scheduler_info(n_workers=-1)["workers"])[:jobs]
    text = _stoppable(job, stack).to_json()
    return [
        client.submit(work, text, workers=[name], allow_other_workers=True, pure=False)
        for name in workers
    ]


def _slurm(
    job: Job, executor: str, jobs: int | None, slurm: Mapping[str, Any], stack: ExitStack
) -> Sequence[Handle]:
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
    text = _stoppable(job, stack).to_json()
    with pool.batch():
        handles = [pool.submit(work, text) for _ in range(jobs or 1)]
    return handles


def _stoppable(job: Job, stack: ExitStack) -> Job:
    """The job, for workers that this process cannot kill.

    When the stack closes, they stop after their current cell. If this process is killed, they
    finish the job.
    """
    descriptor, path = tempfile.mkstemp(prefix=".wanted.", suffix=".tmp", dir=job.output)
    os.close(descriptor)
    stack.callback(Path(path).unlink, missing_ok=True)
    return replace(job, wanted=path)


def _missing(extra: str, error: ImportError) -> RuntimeError:
    return RuntimeError(
        f"this executor needs a package that is not installed ({error}): {install_command(extra)}"
    )
