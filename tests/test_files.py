"""Files and folders are replaced as a whole, or stay as they were."""

import os

import pytest

from smoothquant.core.files import atomic_file, atomic_folder


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
