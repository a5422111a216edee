"""Files and folders are replaced as a whole, or stay as they were."""

import errno
import os
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError

from smoothquant.calibration.stats_files import save_act_scales
from smoothquant.core import files
from smoothquant.core.files import (
    atomic_file,
    atomic_folder,
    disk_errors,
    hidden_sibling,
    locked,
    restore_folder,
)
from smoothquant.core.tensor_files import write_tensors


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_when_the_block_ends(tmp_path):
    for text in ("one", "two"):
        with atomic_file(tmp_path / "deep" / "a") as partial:
            partial.write_text(text)
            partial.chmod(0o600)
            assert contents(tmp_path).get("deep/a") != text
        assert contents(tmp_path) == {"deep/a": text}
    (tmp_path / "plain").write_text("")
    assert len({path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "deep/a")}) == 1


def test_a_folder_appears_when_the_block_ends(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "m", overwrite=True) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "a").write_text(text)
            (partial / "deep" / "a").chmod(0o600)
        assert contents(tmp_path) == {"m/deep/a": text}
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "m/deep/a")}
    assert len(modes) == 1


def test_a_taken_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("mine")
    with pytest.raises(OSError), atomic_folder(tmp_path / "m") as partial:
        (partial / "a").write_text("other")
    assert contents(tmp_path) == {"m/mine": "mine"}


@pytest.mark.parametrize("atomic", [atomic_file, lambda p: atomic_folder(p.parent, overwrite=True)])
@pytest.mark.parametrize("step", ["fsync", "rename", "replace", "body"])
def test_a_failure_at_any_step_changes_nothing(atomic, step, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    failed = False
    with monkeypatch.context() as patch:
        if step != "body":
            patch.setattr(os, step, full)
        try:
            with atomic(tmp_path / "m" / "a") as partial:
                (partial / "a" if partial.is_dir() else partial).write_text("new")
                if step == "body":
                    full()
        except OSError:
            failed = True
    assert contents(tmp_path) == {"m/a": "old" if failed else "new"}
    assert failed or step in ("rename", "replace")  # each is the last step of one of the two


@pytest.fixture(params=["exchanged", "renamed twice"])
def system(request, monkeypatch):
    """Systems that can exchange two folders in one step, and others."""
    if request.param == "renamed twice":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def in_child(task):
    """Run a task in a child; whether it came to its end."""
    if (child := os.fork()) == 0:
        try:
            task()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_an_overwrite_killed_at_any_step_leaves_a_folder(system, tmp_path):
    target = tmp_path / "m"

    def killed_at(step):
        seen = []

        def event(name, args):
            if name in ("os.rename", "os.rmdir", "os.remove", "shutil.rmtree"):
                seen.append(name)
                if len(seen) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        def overwrite():
            with atomic_folder(target, overwrite=True) as partial:
                (partial / "a").write_text(f"{step}")
                sys.addaudithook(event)

        return overwrite

    with atomic_folder(target) as partial:
        (partial / "a").write_text("old")
    found, step, finished = [], 0, False
    while not finished:
        step += 1
        finished = in_child(killed_at(step))
        if system == "renamed twice":
            restore_folder(target)
        found.append(contents(target)["a"])
        assert found[-1] in (f"{step}", *found[-2:-1], "old")
    assert "old" in found and step > 3
    assert not hidden_sibling(target, "replaced").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_writers_at_once_one_wins(overwrite, system, tmp_path):
    writers, start = 8, threading.Barrier(8)

    def write(number):
        with atomic_folder(tmp_path / "m", overwrite=overwrite) as partial:
            (partial / "a").write_text(f"{number}")
            start.wait()

    with ThreadPoolExecutor(writers) as pool:
        errors = [task.exception() for task in [pool.submit(write, n) for n in range(writers)]]
    failed = [error for error in errors if error]
    assert len(failed) == (0 if overwrite else writers - 1)
    assert all(type(error) is FileExistsError for error in failed)
    assert list(contents(tmp_path)) == ["m/a"]


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path):
    path, holders = tmp_path / "deep" / "lock", []

    def hold(number):
        try:
            with locked(path, "busy"):
                holders.append(number)
                assert holders == [number]
                holders.remove(number)
        except RuntimeError as error:
            assert str(error) == f"busy ({path} is locked)"
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert any(pool.map(hold, range(400)))
    assert not path.exists()
    with locked(path, "busy"):
        assert not hold(0)

    def die():
        with locked(path, "busy"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert not in_child(die) and path.exists()
    assert hold(0) and not path.exists()


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left .* free.*'/x'"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded .* free.*/target'"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "Read-only file system: '/x'"),
        (SafetensorError("I/O error: No space (os error 28)"), "No space left .* free.*/target'"),
    ],
)
def test_errors_of_the_disk_are_named(error, message, tmp_path):
    with pytest.raises(OSError, match=message), disk_errors(tmp_path / "target"):
        raise error


def test_other_errors_are_left_alone(tmp_path):
    for error in (RuntimeError("other"), SafetensorError("other"), KeyError("(os error 28)")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_does_not_fit_is_an_error_of_the_disk(suffix, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = {"safetensors": write_tensors, "pt": save_act_scales}[suffix]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write({"a": torch.zeros(1 << 16)}, tmp_path / f"m.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m" * 255, "\u00e4" * 127])
def test_any_name_that_a_file_may_have_is_written(name, tmp_path):
    with atomic_file(tmp_path / name) as partial:
        partial.write_text("a")
    (tmp_path / name).unlink()
    for _ in range(2):
        with atomic_folder(tmp_path / name, overwrite=True) as partial:
            (partial / "a").write_text("a")
    assert contents(tmp_path) == {f"{name}/a": "a"}
