"""Files of other formats are recognized by what they are in all ways in."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from smoothquant import CheckpointError, MixedQuantConfig, convert, load_quantized, quantize
from smoothquant.bundled import load_bundled, load_model
from smoothquant.calibration.stats_files import load_act_scales, load_stats
from smoothquant.checkpoints.folder import save_quantized
from smoothquant.cli.commands import app
from smoothquant.core.tensor_files import CONFIG, TENSORS

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2618368\n"
)
PULL = "pointer of Git LFS.*git lfs pull"
GGUF = "is a GGUF file: .*gguf_file"


def converted(folder):
    return convert(folder, folder.with_name("target"), MixedQuantConfig(), progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A float and a quantized model with their tokenizers."""
    folder = tmp_path_factory.mktemp("saved")
    model, tokenizer = load_bundled("tiny-opt")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "float")
    quantize(model, MixedQuantConfig(), progress=False)
    save_quantized(model, folder / "quantized", tokenizer)
    return folder


@pytest.fixture(params=[("float", load_model), ("float", converted), ("quantized", load_model)])
def way_in(request, saved, tmp_path):
    """A copy of a folder to spoil, and a function that reads it."""
    name, read = request.param
    return shutil.copytree(saved / name, tmp_path / "m"), read


@pytest.mark.parametrize("file", [TENSORS, CONFIG])
def test_pointers_of_git_lfs(file, way_in):
    folder, read = way_in
    (folder / file).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{file}.*{PULL}"):
        read(folder)


def test_a_tokenizer_that_is_a_pointer(saved, tmp_path):
    folder = shutil.copytree(saved / "float", tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"tokenizer.json is a {PULL}"):
        load_model(folder)


def test_folders_with_a_gguf_file_only(way_in):
    folder, read = way_in
    (folder / TENSORS).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(CheckpointError, match=f"model.gguf {GGUF}"):
        read(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"no config.json|with a config.json.*model.gguf {GGUF}"):
        read(folder)


def test_folders_with_pickles_only(saved, tmp_path):
    folder = shutil.copytree(saved / "float", tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes((folder / TENSORS).read_bytes())
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="pytorch_model.bin holds pickled .*save_pretrained"):
        converted(folder)
    result = CliRunner().invoke(
        app, ["quantize", "--by-layer", str(folder), str(tmp_path / "q"), "--recipe", "rtn"]
    )
    assert result.exit_code == 1 and "pickled tensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("content, message", [(POINTER, PULL), (b"GGUF" + bytes(50), GGUF)])
def test_single_files(content, message, tmp_path):
    for name, read in (
        ("s.safetensors", load_stats), ("s.pt", load_stats), ("s.pt", load_act_scales),
        ("s.safetensors", load_act_scales),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is a .*{message[-8:]}"):
            read(tmp_path / name)
    for read in (converted, load_quantized):
        with pytest.raises(ValueError, match=message[-8:]):
            read(tmp_path / "s.pt")


@pytest.mark.long
def test_the_advice_for_pickles_works(saved, tmp_path):
    folder = shutil.copytree(saved / "float", tmp_path / "m")
    tensors = load_file(folder / TENSORS)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError) as error:
        converted(folder)
    exec(str(error.value).split('"')[1])
    assert load_file(folder / TENSORS).keys() == tensors.keys()
    converted(folder)
