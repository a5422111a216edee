"""A device_map that moves weights out of a model is refused by name while they are quantized."""

import pytest
from test_float8 import folders as float8_folders  # noqa: F401
from test_mxfp4 import folders as mxfp4_folders  # noqa: F401
from transformers import AutoModelForCausalLM

from smoothquant import MixedQuantConfig, quantize

WEIGHTS = {"calibration": "weights", "group_size": 16}
# Arguments of from_pretrained: more than the memory that is allowed goes to the disk.
PLACES = {
    "by hand": {"device_map": {"model": "cpu", "lm_head": "disk"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "50KB"}},
    "sequential": {"device_map": "sequential", "max_memory": {"cpu": "50KB"}},
}


@pytest.fixture(params=["float", "FP8", "MXFP4"])
def folder(request, make_model, tmp_path):
    """A folder of each kind of files."""
    if request.param == "FP8":
        return request.getfixturevalue("float8_folders")("llama-bias")[1]
    if request.param == "MXFP4":
        return request.getfixturevalue("mxfp4_folders")[1]
    make_model("llama-bias").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("fields", [WEIGHTS, {**WEIGHTS, "calibration": None}], ids=str)
def test_weights_on_disk_are_refused_while_loading(places, fields, folder, tmp_path):
    options = {**PLACES[places], "offload_folder": tmp_path / "offloaded"}
    with pytest.raises(ValueError, match="device_map must not"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=MixedQuantConfig(**fields), **options
        )


@pytest.mark.parametrize("places", PLACES)
def test_weights_on_disk_are_refused_in_memory(places, make_model, tmp_path):
    make_model("llama-bias").save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", **PLACES[places], offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(ValueError, match="device_map must not offload weights .* on 'disk'"):
        quantize(model, MixedQuantConfig(**WEIGHTS), progress=False)
