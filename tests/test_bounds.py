"""No size in a folder's files takes memory or time before it is compared with the files."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, build_model
from length import at_length
from spoil import edit
from transformers import AutoConfig

from smoothquant import CheckpointError, MixedQuantConfig, convert, load_quantized, quantize
from smoothquant.checkpoints.folder import save_quantized
from smoothquant.core import tensor_files
from smoothquant.core.tensor_files import CONFIG, read_json

ROOM = 1 << 29  # bytes
SECONDS = 60  # a busy machine may stall
VALUES = (10**6, 10**9, 10**12)
OTHER_FIELDS = ("num_labels", "head_dim", "num_experts", "sliding_window", "num_codebooks")


def outcome(task):
    """What a task comes to in a child with little memory and time."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.alarm(SECONDS)
        try:
            task()
            said = "loaded"
        except CheckpointError as error:
            said = f"refused: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4096])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return said or "killed"


def sizes(folder):
    """The integer fields of a config."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    named = {name for name, value in fields.items() if type(value) is int}
    return sorted(named | set(OTHER_FIELDS))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "architecture", at_length(list(ARCHITECTURES)[::3], ["llama-bias", "gpt_neox"])
)
def test_no_size_in_the_config_exhausts_memory(architecture, tmp_path):
    model = build_model(architecture)
    model.save_pretrained(tmp_path / "float")
    config = MixedQuantConfig(group_size=16, salient_prop=0.1)
    quantize(model, config, progress=False)
    save_quantized(model, tmp_path / "m")
    load_quantized(tmp_path / "m")  # whatever is imported late
    ways = {"m": lambda: load_quantized(tmp_path / "m")}
    ways |= at_length(
        {
            "float": lambda: convert(
                tmp_path / "float", tmp_path / "q", config, overwrite=True, progress=False
            )
        },
        {},
    )
    refused = 0
    for name, task in ways.items():
        before = (tmp_path / name / CONFIG).read_text()
        for field in sizes(tmp_path / name):
            for value in at_length(VALUES, VALUES[1:2]):
                edit(CONFIG, field, value=value)(tmp_path / name)
                said = outcome(task)
                assert said.startswith(("loaded", "refused")), (name, field, value, said)
                assert "allocate" not in said, (name, field, value, said)
                refused += said.startswith("refused")
        (tmp_path / name / CONFIG).write_text(before)
    assert refused >= 5


@pytest.mark.parametrize(
    "keys, message",
    [
        (("num_labels",), "num_labels is 100000, but no dimension of a stored tensor exceeds 96"),
        (("text_config", "num_labels"), "num_labels is 100000"),
        (("layers", "deep", "n_layer"), "n_layer is 100000"),
        (("vocab_size",), r"it has [\d,]+ values and [\d,]+ bytes of buffers, but the files have"),
    ],
)
def test_what_is_too_large_is_named(keys, message, tmp_path):
    model = build_model("llama-bias")
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    save_quantized(model, tmp_path / "m")
    content = json.loads((tmp_path / "m" / CONFIG).read_text())
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = 100_000
    (tmp_path / "m" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        load_quantized(tmp_path / "m")


def test_a_file_of_any_size_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / CONFIG, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="config.json: more than 268,435,456 bytes"):
        read_json(tmp_path / CONFIG)
    monkeypatch.setattr(tensor_files, "MOST_JSON_BYTES", 2)
    (tmp_path / CONFIG).write_text("{}")
    assert read_json(tmp_path / CONFIG) == {}
