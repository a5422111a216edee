"""Spoiled copies of saved models: none crashes, each is refused by name or works."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hostile
import pytest
from length import at_length

from smoothquant import MixedQuantConfig, quantize
from smoothquant.core.tensor_files import INDEX, TENSORS

PROGRAM = Path(hostile.__file__)
CASES, PROCESSES = at_length(10_000, 60), 2
FOLDERS = {  # architecture, changes, format of salient channels, most bytes in a file
    "shards": ("llama-bias", {}, "16bit", "20KB"),
    "experts": ("mixtral", {"num_local_experts": 2}, "int8", "1MB"),
    "tied": ("llama", {}, "16bit", "1MB"),
}


@pytest.fixture
def folders(make_model, tmp_path):
    for name, (architecture, changes, salient_format, most) in FOLDERS.items():
        model = make_model(architecture, num_hidden_layers=1, **changes)
        config = MixedQuantConfig(group_size=20, salient_prop=0.1, salient_format=salient_format)
        quantize(model, config, progress=False)
        model.save_pretrained(tmp_path / name, max_shard_size=most)
    return [tmp_path / name for name in FOLDERS]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_spoiled_copies_are_refused_or_work(folders, tmp_path):
    assert (tmp_path / "shards" / INDEX).is_file() and (tmp_path / "tied" / TENSORS).is_file()
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(tmp_path / "tied" / TENSORS, work / "outside.safetensors")
    before = contents(tmp_path)
    step = CASES // PROCESSES
    children = [
        subprocess.Popen(
            [sys.executable, PROGRAM, work, str(begin), str(begin + step), *folders],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for begin in range(0, CASES, step)
    ]
    found: Counter[str] = Counter()
    for child in children:
        lines = child.communicate()[0].splitlines()
        # one that crashed or hung says so after the case that it was at
        assert child.returncode == 0, "\n".join(lines[-40:])
        assert not [line for line in lines if line.startswith("failed")]
        found += Counter(json.loads(lines[-1]))
    assert found.total() == CASES
    for way in hostile.WAYS:
        assert found[f"{way.__name__} refused"] >= CASES // 500, found
    for way in (hostile.values, hostile.tensors, hostile.index_outside):
        assert not found[f"{way.__name__} worked"]
    assert sum(n for end, n in found.items() if end.endswith("worked")) >= CASES // 20, found
    assert {path: data for path, data in contents(tmp_path).items() if path in before} == before
