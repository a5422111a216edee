"""Workers of a sweep: claims, executors, and recovery from faults."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from length import at_length

from run_experiments import executors, grid, runner, sweep
from run_experiments import store as store_module
from run_experiments.claims import Claims
from run_experiments.grid import PRESETS, Cell
from run_experiments.store import Store
from run_experiments.worker import Job, work
from smoothquant.bundled import load_bundled

ROOT = Path(__file__).resolve().parent.parent

# three cells besides calibration and baseline: enough for workers to collide
SMALL = grid.override(PRESETS["tiny"], {"group_sizes": (64,), "sorts": ("rms",)})
STUB = [sys.executable, str(ROOT / "tests" / "stub_worker.py")]


def results_in(folder):
    """The bytes of every finished cell's files."""
    files = [*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


def leftovers(folder):
    return [path.name for path in Path(folder).rglob(".*.tmp")] + list(
        (Path(folder) / "claims").iterdir()
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of a sweep by one worker in this process."""
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    sweep(SMALL, store, progress=False)
    return results_in(store.folder)


# ---- claims


@pytest.fixture
def claims(tmp_path):
    return Claims(tmp_path / "claims", stale_seconds=0.3)


def dead_claim(folder, **owner):
    """A claim left behind by a process on another machine that was killed."""
    folder.mkdir(exist_ok=True)
    path = folder / "key.0"
    path.write_text(json.dumps({"process": os.getpid(), "place": "elsewhere"} | owner))
    return path


def no_links(draft, path):
    raise OSError(errno.EPERM, "no hard links on this file system")


@pytest.mark.parametrize("link", [os.link, no_links])
def test_only_one_of_many_gets_a_claim(tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, "link", link)
    holders, together = [], threading.Barrier(16)

    def one():
        claims = Claims(tmp_path / "claims")
        together.wait()
        with claims.claim("key") as mine:
            holders.append(mine)
            together.wait()

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(holders) == {True: 1, False: 15}
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_claim_never_exists_without_its_owner(tmp_path):
    """A worker killed while it creates a claim blocks nobody."""
    killed_while_creating = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from run_experiments.claims import Claims\n"
        "os.link = lambda draft, path: os._exit(7)\n"
        "Claims(Path(sys.argv[1])).claim('key').__enter__()\n"
    )
    killed = subprocess.run([sys.executable, "-c", killed_while_creating, tmp_path], cwd=ROOT)
    assert killed.returncode == 7
    assert len(list(tmp_path.iterdir())) == 1  # the draft
    claims = Claims(tmp_path)
    with claims.claim("key") as mine:
        assert mine
    claims.clear(["key"])
    assert list(tmp_path.iterdir()) == []


def test_a_claim_lives_as_long_as_its_heartbeat(claims):
    other = Claims(claims.folder, claims.stale_seconds)
    with claims.claim("key") as mine:
        assert mine
        # as if on another machine, where only the heartbeat counts
        path = claims.folder / "key.0"
        path.write_text(json.dumps({"process": 1, "place": "elsewhere"}))
        until = time.monotonic() + 3 * claims.stale_seconds
        while time.monotonic() < until:
            with other.claim("key") as theirs:
                assert not theirs
            time.sleep(0.02)
    with other.claim("key") as theirs:
        assert theirs


def test_a_claim_without_heartbeat_is_taken_over_by_one(claims):
    dead_claim(claims.folder)
    with claims.claim("key") as mine:
        assert not mine  # seen for the first time
    time.sleep(1.2 * claims.stale_seconds)
    other = Claims(claims.folder, claims.stale_seconds)
    with claims.claim("key") as mine, other.claim("key") as theirs:
        assert mine and not theirs
    assert list(claims.folder.iterdir()) == []


def test_a_claim_of_an_ended_local_process_is_taken_over_at_once(tmp_path):
    from run_experiments.claims import _place

    ended = subprocess.Popen(["true"])
    ended.wait()
    claims = Claims(tmp_path / "claims")
    dead_claim(claims.folder, process=ended.pid, place=_place())
    with claims.claim("key") as mine:
        assert mine


def test_a_worker_that_resumes_leaves_its_successor_alone(claims):
    with claims.claim("key") as mine:
        assert mine
        successor = claims.folder / "key.1"
        successor.write_text(json.dumps({"process": os.getpid(), "place": "elsewhere"}))
    assert successor.exists()
    with claims.claim("key") as mine:
        assert not mine


# ---- executors


EXECUTORS = ["jobs", "dask", "slurm://local", "slurm://debug"]


@pytest.mark.long
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_gives_the_same_bytes(executor, undisturbed, tmp_path, capfd):
    output = tmp_path / "results"
    arguments = {"executor": executor, "jobs": 2, "threads": 1}
    if executor == "dask":
        from distributed import LocalCluster

        with LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None, processes=True
        ) as cluster:
            arguments["executor"] = f"dask://{cluster.scheduler_address.removeprefix('tcp://')}"
            sweep(SMALL, Store(output), progress=False, **arguments)
    else:
        if executor == "jobs":
            arguments["executor"] = "local"
        sweep(SMALL, Store(output), progress=False, **arguments)
    assert results_in(output) == undisturbed
    assert leftovers(output) == []
    # each cell was computed once, and reported
    records = [json.loads(path.read_text()) for path in (output / "runs").iterdir()]
    assert len(records) == 5 and {record["threads"] for record in records} == {1}
    assert capfd.readouterr().out.count("PPL") == 4


def test_workers_receive_only_json(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(executors, "work", lambda job, report: given.append(job))
    sweep(SMALL, Store(tmp_path), progress=False)
    (job,) = given
    fields = json.loads(job)
    assert [Cell.from_json(text).task for text in fields["cells"]] == [
        "calibration", "baseline", "quantized", "quantized", "quantized",
    ]  # fmt: skip
    assert Job.from_json(job).to_json() == job


@pytest.mark.parametrize(
    "executor, package", [("dask://x:1", "distributed"), ("slurm", "submitit")]
)
def test_a_missing_package_names_the_extra(executor, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    extra = executor.partition(":")[0]
    with pytest.raises(RuntimeError, match=rf"mixedquant\[{extra}\]"):
        sweep(SMALL, Store(tmp_path), progress=False, executor=executor)


@pytest.mark.long
def test_unavailable_executors_say_so(tmp_path):
    with pytest.raises(RuntimeError, match="executor: .*sbatch|executor: .*slurm"):
        sweep(SMALL, Store(tmp_path), progress=False, executor="slurm")
    with pytest.raises(ValueError, match="slurm: .*no_such"):
        sweep(
            SMALL, Store(tmp_path), progress=False, executor="slurm://local", slurm={"no_such": 1}
        )
    with pytest.raises(RuntimeError, match="no Dask workers at 127.0.0.1:1"):
        sweep(SMALL, Store(tmp_path), progress=False, executor="dask://127.0.0.1:1")


# ---- faults


def plan(groups):
    """Two cells per group size after the first two cells, without a model: for stub workers."""
    preset = grid.override(PRESETS["tiny"], {"group_sizes": tuple(range(1, groups + 1))})
    data = {"data": "x", "split": "test", "sha256": "02"}
    return grid.cells(
        dataclasses.replace(preset, products=preset.products[:1]),
        model={"name": "a", "files": {}, "dtype": "float32"},
        versions={},
        calibration_data=data,
        evaluation_data=data,
    )


def stub_job(folder, groups=5, **fields):
    folder.mkdir(exist_ok=True)
    cells = [cell.to_json() for cell in plan(groups)]
    return Job(cells, "none", str(folder), **fields).to_json()


def start_stub(job, seconds):
    process = subprocess.Popen(
        [*STUB, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdin.write(job + "\n")
    process.stdin.flush()
    return process


def end(process):
    process.kill()
    process.communicate()


def run_stub(job):
    """Run one worker until the job is done."""
    process = start_stub(job, 0)
    try:
        assert process.wait(timeout=120) == 0
    finally:
        end(process)


def computed(folder):
    """(key, whether the cell was already finished) for each computation."""
    return [line.split() for line in (folder / "computed").read_text().splitlines()]


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.005)


KILLS, CELLS = at_length((50, 302), (6, 82))


def test_kills_lose_nothing_and_repeat_nothing(tmp_path):
    """Of two workers, one is killed at a random moment and replaced, again and again."""
    calm, folder = tmp_path / "calm", tmp_path / "results"
    run_stub(stub_job(calm, CELLS // 2 - 1))
    assert Counter(again for _, again in computed(calm)) == {"False": CELLS}

    job, generator = stub_job(folder, CELLS // 2 - 1), random.Random(0)
    finished, in_the_middle = {}, 0
    # scale lifetimes and cells to the time that starting a worker takes on this machine, right now
    started = time.monotonic()
    workers = [start_stub(job, 0.1)]
    wait_for(lambda: (folder / "computed").exists())
    start = time.monotonic() - started
    seconds = max(0.1, start / 2)
    workers.append(start_stub(job, seconds))
    for _ in range(KILLS):
        time.sleep(generator.uniform(0, 2 * start))
        victim = workers.pop(generator.randrange(2))
        if victim.poll() is not None:  # all is computed: this machine slept through the lifetimes
            break
        end(victim)
        for path in (folder / "claims").glob("*.[0-9]"):
            with contextlib.suppress(FileNotFoundError):  # it ended just now
                in_the_middle += f'"process": {victim.pid},' in path.read_text()
        now = results_in(folder)
        assert {name: now.get(name) for name in finished} == finished
        finished = now
        workers.append(start_stub(job, seconds))
    else:
        assert len(finished) < CELLS
    for worker in workers:
        end(worker)
    assert in_the_middle >= at_length(11, 1)
    run_stub(job)
    assert results_in(folder) == results_in(calm)
    assert {again for _, again in computed(folder)} == {"False"}
    assert leftovers(folder) == []


def test_concurrent_workers_never_compute_the_same_cell(tmp_path):
    job = stub_job(tmp_path / "results", 20)
    workers = [start_stub(job, 0.02) for _ in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
    for worker in workers:
        end(worker)
    done = computed(tmp_path / "results")
    assert len(done) == 42 == len({key for key, _ in done})
    runs = [json.loads(path.read_text()) for path in (tmp_path / "results" / "runs").iterdir()]
    assert len({run["process"] for run in runs}) > 1


def test_a_worker_that_stops_responding_is_replaced(tmp_path):
    """Like a machine that loses power: the process remains, but its heartbeat stops."""
    folder = tmp_path / "results"
    job = stub_job(folder, stale_seconds=0.5)
    still = start_stub(job, 0.2)
    wait_for(lambda: (folder / "computed").exists())
    still.send_signal(signal.SIGSTOP)
    try:
        run_stub(job)
    finally:
        end(still)
    run_stub(stub_job(tmp_path / "calm"))
    assert results_in(folder) == results_in(tmp_path / "calm")


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    worker = start_stub(stub_job(tmp_path / "results"), 60)
    wait_for(lambda: (tmp_path / "results" / "computed").exists())
    worker.stdin.close()
    assert worker.wait(timeout=120) == 1
    worker.stdout.close()


def test_remote_workers_stop_when_they_are_no_longer_wanted(tmp_path):
    wanted = tmp_path / "wanted"
    wanted.touch()
    worker = start_stub(stub_job(tmp_path / "results", wanted=str(wanted)), 0.1)
    wait_for(lambda: (tmp_path / "results" / "computed").exists())
    wanted.unlink()
    assert worker.wait(timeout=120) == 0
    end(worker)
    assert 1 <= len(computed(tmp_path / "results")) < 12


class StubBench:
    def __init__(self, *_, **__):
        pass

    def check(self, cells):
        pass


@pytest.fixture
def stub_cells(monkeypatch):
    """Make cells trivial to compute for `work` in this process."""
    monkeypatch.setattr(runner, "Bench", StubBench)
    monkeypatch.setattr(runner, "run_cell", lambda cell, _: {"value": cell.label, "run": {}})


def test_a_full_disk_at_any_write_loses_nothing(stub_cells, tmp_path, monkeypatch):
    work(stub_job(tmp_path / "calm"))
    folder, job = tmp_path / "results", stub_job(tmp_path / "results")
    writes, full_at = 0, None

    def failing(function):
        def write(*args, **kwargs):
            nonlocal writes
            writes += 1
            if writes == full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(store_module.tempfile, "mkstemp", failing(store_module.tempfile.mkstemp))
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(store_module.os, "chmod", failing(os.chmod))
        faults = 0
        for write_number in range(1, 17):  # a claim and two files per cell: reaches the second cell
            full_at = write_number
            before, writes = results_in(folder), 0
            with pytest.raises(RuntimeError, match="No space left.*the same command again"):
                work(job)
            faults += 1
            now = results_in(folder)
            assert {name: now[name] for name in before} == before
            assert leftovers(folder) == []
    assert faults == 16 and 0 < len(now) < 12
    work(job)
    assert results_in(folder) == results_in(tmp_path / "calm")


def test_only_a_corrupt_cell_is_computed_again(stub_cells, tmp_path, monkeypatch):
    job = stub_job(tmp_path / "results")
    work(job)
    before = results_in(tmp_path / "results")
    name = sorted(before)[3]
    path = tmp_path / "results" / name
    path.write_bytes(before[name][:50])
    labels = []
    monkeypatch.setattr(
        runner, "run_cell", lambda c, _: labels.append(c.key) or {"value": c.label, "run": {}}
    )
    with pytest.warns(UserWarning, match="damaged"):
        work(job)
    assert labels == [path.stem] and results_in(tmp_path / "results") == before


def test_a_cell_that_another_worker_repaired_is_not_moved_aside(tmp_path, monkeypatch):
    store, cell = Store(tmp_path), plan(1)[0]
    store.put(cell, {"value": 1, "run": {}})
    # damaged when it was read, but repaired before it is moved aside
    assert store._move_aside(store.path(cell), "damaged", cell) is None
    assert store.get(cell) == {"value": 1, "run": {}}


def test_a_result_is_valid_without_its_run_record(tmp_path):
    store, cell = Store(tmp_path), plan(1)[0]
    store.put(cell, {"value": 1, "run": {"threads": 2}})
    store.run_path(cell).write_text("{")
    assert store.get(cell) == {"value": 1, "run": {}}


@pytest.mark.long
def test_worker_errors_keep_their_type(tmp_path):
    with pytest.raises(ValueError, match="windows must be at most"):
        preset = dataclasses.replace(SMALL, windows=10**6)
        sweep(preset, Store(tmp_path), progress=False, jobs=2)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.long
def test_killed_workers_are_replaced_by_others_or_named(undisturbed, tmp_path, monkeypatch):
    """Real cells: first one of two workers is killed, then both when half of the cells are done."""
    started, killed = [], []
    start = executors._Process

    def recorded(job):
        started.append(start(job))
        return started[-1]

    monkeypatch.setattr(executors, "_Process", recorded)

    def kill_when(victims, cells, folder):
        wait_for(lambda: len(list(folder.glob("*.json"))) >= cells)
        for worker in started[-2:][:victims]:
            killed.append(worker.done())
            os.kill(worker._process.pid, signal.SIGKILL)

    for victims, cells in ((1, 1), (2, 2)):
        folder = tmp_path / f"{victims}"
        folder.mkdir()
        killer = threading.Thread(target=kill_when, args=(victims, cells, folder))
        killer.start()
        if victims == 1:
            sweep(SMALL, Store(folder), progress=False, jobs=2)
        else:
            with pytest.raises(
                RuntimeError, match="worker was killed by signal 9.*same command again"
            ):
                sweep(SMALL, Store(folder), progress=False, jobs=2)
            sweep(SMALL, Store(folder), progress=False)
        killer.join()
        assert results_in(folder) == undisturbed
    assert killed == [False] * 3


@pytest.mark.long
def test_a_changed_model_is_refused_or_counts_as_another_model(tmp_path, monkeypatch):
    model, tokenizer = load_bundled("tiny-opt")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preset = dataclasses.replace(SMALL, model=str(folder))
    store = Store(tmp_path / "results")

    def change():
        weights = dict(model.state_dict())
        weights["model.decoder.final_layer_norm.bias"].add_(0.5)
        model.save_pretrained(folder)

    original = executors.run

    def changed_meanwhile(*args):
        change()
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(executors, "run", changed_meanwhile)
        with pytest.raises(
            RuntimeError, match=r"has changed since \(model.safetensors\).*run the sweep"
        ):
            sweep(preset, store, progress=False)
    assert results_in(store.folder) == {}
    first = sweep(preset, store, progress=False)

    # a worker that has loaded the model already is not affected
    changed, cells = [], runner.run_cell
    monkeypatch.setattr(
        runner, "run_cell", lambda *args: (changed or changed.append(change()), cells(*args))[1]
    )
    second = dataclasses.replace(preset, seed=7)
    disturbed = sweep(second, store, progress=False)
    monkeypatch.undo()
    assert changed == [None] and {c.model["files"]["model.safetensors"] for c in disturbed} == {
        c.model["files"]["model.safetensors"] for c in first
    }
    assert len(sweep(second, store, progress=False)) == len(disturbed)  # for the model as it is now
    keys = {cell.key for cell in disturbed}
    assert not keys & {path.stem for path in store.folder.glob("*.damaged")}


# ---- speed


@pytest.mark.long
def test_a_finished_sweep_of_a_thousand_cells_is_found_without_loading_torch(tmp_path, monkeypatch):
    """CPU time including the start of Python; other processes do not affect CPU time."""
    fields = {"group_sizes": tuple(range(8, 258)), "salient_props": (0.0, 0.05, 0.1, 0.2)}
    preset = grid.override(PRESETS["tiny"], fields | {"sorts": ("rms",), "backends": ("int4",)})
    store = Store(tmp_path / "results")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # not measured here
        for cell in planned(preset):
            store.put(cell, {"perplexity": 1.5, "kl": 0.1, "tokens": 254, "run": {"threads": 1}})
    code = f"""
import sys, time
sys.argv[0] = {str(ROOT / "run_experiments" / "__main__.py")!r}  # as python -m run_experiments
from run_experiments import grid, store, sweep
preset = grid.override(grid.PRESETS["tiny"], {preset_fields(preset)!r})
sweep(preset, store.Store({str(store.folder)!r}), progress=False)
print(time.process_time(), {{"torch", "transformers"}} & set(sys.modules))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "All 1002 cells are in" in output
    seconds, modules = output.splitlines()[-1].split(maxsplit=1)
    # about two on an idle machine, and several times that where two threads share a core
    assert float(seconds) <= 20 and modules == "set()"


def planned(preset):
    from run_experiments.run_experiments import _planned

    return _planned(preset)


def preset_fields(preset):
    names = ("group_sizes", "salient_props", "sorts", "backends")
    return {name: getattr(preset.products[0], name) for name in names}


def test_the_overhead_of_a_cell_is_below_half_a_second(stub_cells, tmp_path):
    job = stub_job(tmp_path, 60)
    started = time.process_time()
    work(job)
    assert len(results_in(tmp_path)) == 122
    assert (time.process_time() - started) / 122 < 0.5


@pytest.mark.long
def test_a_worker_loads_the_model_once(tmp_path, monkeypatch):
    loads, load = [], runner.load_model
    monkeypatch.setattr(runner, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    preset = dataclasses.replace(grid.override(SMALL, {"methods": ("mixedquant", "atom-style")}))
    sweep(preset, Store(tmp_path), progress=False)
    assert len(loads) == 1


def test_the_published_formula_in_the_benchmark():
    """The baseline of the simulation's speed benchmark computes the published values."""
    import torch

    from benchmarks.fake import published_group_absmax_sort
    from smoothquant.fake_quant import quantize_activation_per_group_absmax_sort

    x = torch.randn(3, 5, 130, generator=torch.Generator().manual_seed(0))
    expected = quantize_activation_per_group_absmax_sort(x, 4, 16)
    assert torch.equal(published_group_absmax_sort(x, 4, 16), expected)
