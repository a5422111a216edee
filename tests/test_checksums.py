"""A folder gives the model that was saved, or an error: checksums and the run on loading."""

import json
import shutil

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from length import at_length
from safetensors.torch import load_file, save_file
from spoil import LAYER, edit, edit_manifest, put, set_tensor, without_checksums
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from smoothquant import CheckpointError, MixedQuantConfig, convert, load_quantized, quantize
from smoothquant import save_quantized as save
from smoothquant.checkpoints.inspection import verify_folder
from smoothquant.core.tensor_files import CONFIG, TENSORS

pytestmark = pytest.mark.usefixtures("linears_alone")

OTHER = LAYER.replace("layers.1", "layers.0")
SETTINGS = MixedQuantConfig(group_size=16, salient_prop=0.1, act_format="symmetric")
READERS = [load_quantized, AutoModelForCausalLM.from_pretrained, verify_folder]


def quantized(make_model, architecture="llama-bias"):
    model = make_model(architecture)
    quantize(model, SETTINGS, progress=False)
    return model


def manifest_of(folder):
    return json.loads((folder / CONFIG).read_text())["quantization_config"]


def swapped(*pairs):
    """Tensors under each other's names."""

    def spoil(folder):
        tensors = load_file(folder / TENSORS)
        for one, other in pairs:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, folder / TENSORS, {"format": "pt"})

    return spoil


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "m"
    save(quantized(build_model), folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pristine, tmp_path / "copy")


PARTS = ("perm", "qweight", "scales", "salient_weight", "bias")
VALID_BUT_OTHER = {
    "one swapped": (swapped((f"{LAYER}.qweight", f"{OTHER}.qweight")), f"linear {OTHER}"),
    "layers swapped": (
        swapped(*((f"{LAYER}.{part}", f"{OTHER}.{part}") for part in PARTS)),
        f"linear {OTHER}",
    ),
    "norms swapped": (
        swapped(("model.layers.0.input_layernorm.weight", "model.norm.weight")),
        "tensor model.layers.0.input_layernorm.weight is not",
    ),
    "another permutation": (set_tensor(f"{LAYER}.perm", lambda t: t.roll(1)), f"linear {LAYER}"),
    "another value": (set_tensor("lm_head.weight", put(5, 0.25)), "tensor lm_head.weight is not"),
    "another clip": (
        edit_manifest("linears", LAYER, "choices", value={"act_clip": 0.5}),
        "quantization_config was changed",
    ),
    "another rotation": (
        edit_manifest("linears", LAYER, "choices", value={"rotation": 8}),
        "quantization_config was changed",
    ),
    "another format": (
        edit_manifest("linears", LAYER, "choices", value={"act_format": "zero_point"}),
        "quantization_config was changed",
    ),
    "all formats": (
        edit_manifest("config", "act_format", value="zero_point"),
        "quantization_config was changed",
    ),
    "another checksum": (
        edit_manifest("checksums", LAYER, value="0" * 8),
        "quantization_config was changed",
    ),
}


@pytest.mark.parametrize("kind", VALID_BUT_OTHER)
def test_valid_values_of_another_model_are_refused(kind, folder):
    spoil, message = VALID_BUT_OTHER[kind]
    spoil(folder)
    for read in READERS[:2]:
        with pytest.raises(CheckpointError, match=f"{message}.*checksum differs"):
            read(folder)
    without_checksums(folder)  # nothing else would have noticed
    load_quantized(folder)


def test_an_edited_config_is_told(folder, caplog):
    edit(CONFIG, "rms_norm_eps", value=0.5)(folder)
    for read in READERS[:2]:
        caplog.clear()
        read(folder)
        assert "config.json was edited after the model was saved" in caplog.text
    with pytest.raises(CheckpointError, match="config.json: edited .*save it again"):
        verify_folder(folder)
    save(load_quantized(folder), folder, overwrite=True)
    verify_folder(folder)


USELESS = {
    "NaN in config.json": edit(CONFIG, "rms_norm_eps", value=float("nan")),
    "scales too large": set_tensor(f"{LAYER}.scales", lambda t: torch.full_like(t, 3e38)),
    "norm too large": set_tensor("model.norm.weight", lambda t: torch.full_like(t, 3e38)),
}


@pytest.mark.parametrize("kind", USELESS)
def test_a_model_without_finite_logits_is_refused(kind, folder):
    USELESS[kind](folder)
    without_checksums(folder)
    for read in READERS:
        with pytest.raises(CheckpointError, match="config.json: .* gives NaN or Inf"):
            read(folder)


def test_a_folder_without_checksums_still_loads(folder, token_ids):
    summed = load_quantized(folder)
    assert (
        "tensors, choices and config are those that were saved" in verify_folder(folder)["checks"]
    )
    without_checksums(folder)
    for read in READERS[:2]:
        assert torch.equal(read(folder)(token_ids).logits, summed(token_ids).logits)
    assert "no checksums: an earlier version saved the folder" in verify_folder(folder)["checks"]
    content = json.loads((folder / CONFIG).read_text())
    content["quantization_config"]["checksums"] = {}
    (folder / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must have the fields"):
        load_quantized(folder)


def test_shards_conversion_and_saving_again_keep_the_checksums(make_model, pristine, tmp_path):
    checksums = manifest_of(pristine)["checksums"]
    loaded = AutoModelForCausalLM.from_pretrained(pristine)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    make_model("llama-bias").save_pretrained(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "converted", SETTINGS, progress=False)
    AutoConfig.from_pretrained(pristine).save_pretrained(tmp_path / "shards")
    for name in ("shards", "converted"):
        assert manifest_of(tmp_path / name)["checksums"] == checksums, name
        verify_folder(tmp_path / name)
    AutoModel.from_pretrained(pristine).save_pretrained(tmp_path / "headless")
    names = {name.removeprefix("model.") for name in checksums} - {"lm_head.weight"}
    assert set(manifest_of(tmp_path / "headless")["checksums"]) == names
    verify_folder(tmp_path / "headless")


def test_an_edited_model_is_saved_with_its_own_checksums(folder, tmp_path):
    before = manifest_of(folder)["checksums"]
    model = load_quantized(folder)
    with torch.no_grad():
        model.get_submodule(LAYER).scales *= 2
        model.model.norm.weight += 1
    model.config.rms_norm_eps = 0.5
    model.save_pretrained(folder)
    verify_folder(folder)
    after = manifest_of(folder)["checksums"]
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {LAYER, "model.norm.weight", CONFIG}


FAMILIES = at_length(list(ARCHITECTURES), ["mixtral", "gemma2", "falcon-new"])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_keeps_its_checksums(architecture, make_model, tmp_path, caplog):
    save(quantized(make_model, architecture), tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "again")
    load_quantized(tmp_path / "again")
    assert "edited" not in caplog.text
    assert manifest_of(tmp_path / "again") == manifest_of(tmp_path / "m")
