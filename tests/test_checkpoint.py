"""Quantized models on disk: same logits, exact sizes, whole or absent, and no trust in the file."""

import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoil import LAYER, edit, edit_manifest, put, set_tensor
from tqdm.auto import tqdm

from smoothquant import CheckpointError, collect_stats, load_quantized, quantize, save_quantized
from smoothquant.bundled import DATA, load_bundled, load_model
from smoothquant.core.config import MixedQuantConfig
from smoothquant.core.tensor_files import CONFIG, TENSORS
from smoothquant.model_size import get_model_size
from smoothquant.models import loading

pytestmark = pytest.mark.usefixtures("linears_alone")


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def quantized(model, backend="int4", salient_format="16bit"):
    config = MixedQuantConfig(
        group_size=20, salient_prop=0.1, backend=backend, salient_format=salient_format
    )
    quantize(model, config, progress=False)
    return model


def payload(path):
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize(
    "backend, salient_format", [("int4", "16bit"), ("int4", "int8"), ("fake", "int8")]
)
def test_round_trip(architecture, backend, salient_format, make_model, token_ids, tmp_path):
    model = quantized(make_model(architecture), backend, salient_format)
    want, folder = logits(model, token_ids), tmp_path / "deep" / "model"
    save_quantized(model, folder)
    loaded = load_quantized(folder)
    assert torch.equal(logits(loaded, token_ids), want)
    assert type(loaded) is type(model) and not loaded.training
    assert payload(folder / TENSORS) * 8 == get_model_size(model) == get_model_size(loaded)
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_and_calibrated_ones(dtype, make_model, token_ids, tmp_path):
    model = make_model("mistral").to(dtype)
    stats = collect_stats(model, [token_ids], progress=False)
    config = MixedQuantConfig(
        group_size=8, salient_prop=0.3, weight_quant="per_channel", act_quant="per_token",
        quantize_output=True, act_clip=0.9, num_bits=3,
    )  # fmt: skip
    quantize(model, config, stats, progress=False)
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    layer = loaded.model.layers[0].self_attn.q_proj
    assert layer.config == config and layer.quantize_output
    assert layer.salient_weight.dtype == dtype == loaded.lm_head.weight.dtype


def test_tied_weights_stay_tied(make_model, tmp_path):
    save_quantized(quantized(make_model("llama")), tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "m" / TENSORS)


def test_headless_models_and_generation(make_model, token_ids, tmp_path):
    model = quantized(make_model("llama"))
    model.generation_config.max_new_tokens = 5
    save_quantized(model, tmp_path / "whole")
    save_quantized(model.model, tmp_path / "headless")
    whole, headless = load_quantized(tmp_path / "whole"), load_quantized(tmp_path / "headless")
    assert type(headless).__name__ == "LlamaModel"
    assert torch.equal(
        headless(token_ids).last_hidden_state, model.model(token_ids).last_hidden_state
    )
    assert whole.generate(token_ids[:1], do_sample=False).shape[1] <= token_ids.shape[1] + 5


def test_all_files_can_be_read_by_the_same_people(pristine):
    assert len({path.stat().st_mode for path in pristine.iterdir()}) == 1


def test_loaded_tensors_do_not_depend_on_the_file(make_model, token_ids, tmp_path):
    model = quantized(make_model("opt"))
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    with open(tmp_path / "m" / TENSORS, "r+b") as file:
        file.truncate(100)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_a_model_loaded_in_one_thread_leaves_the_others_modules_alone(pristine, token_ids):
    want = logits(load_quantized(pristine), token_ids)

    def load():
        return [torch.equal(logits(load_quantized(pristine), token_ids), want) for _ in range(4)]

    def build():
        return [torch.nn.Linear(2, 2).weight.device.type for _ in range(3000)]

    with ThreadPoolExecutor(3) as pool:
        built, *loaded = [pool.submit(task) for task in (build, load, load)]
        assert set(built.result()) == {"cpu"}
        assert all(all(task.result()) for task in loaded)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_tokenizer_is_saved_with_the_model(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    save_quantized(quantized(model), tmp_path / "m", tokenizer)
    loaded, again = load_model(tmp_path / "m")
    assert again("some words").input_ids == tokenizer("some words").input_ids
    assert loaded.dtype == torch.float32


# ---- Whole or absent


def test_a_tokenizer_is_found_where_the_model_came_from(tmp_path, monkeypatch, caplog):
    asked = []

    def snapshot(name, patterns, **where):
        asked.append((name, where))
        if where["local_files_only"]:
            raise OSError("not in the cache")
        return DATA / "tiny-opt"

    monkeypatch.setattr(loading, "_snapshot", snapshot)
    model, _ = load_bundled("tiny-opt")
    quantize(model, MixedQuantConfig(group_size=32, calibration="weights"), progress=False)
    folder = model.name_or_path
    for name, revision, expected in (
        (folder, None, []),
        ("a-folder/that-is-gone", None, []),
        ("owner/name", "1234", [True, False]),  # the cache first
    ):
        caplog.clear()
        asked.clear()
        model.name_or_path, model.config._commit_hash = name, revision
        save_quantized(model, tmp_path / "q", overwrite=True)
        assert [where for _, where in asked] == [
            {"revision": revision, "local_files_only": local} for local in expected
        ]
        has_one = "gone" not in name
        assert (load_model(tmp_path / "q")[1] is not None) == has_one
        said = f"saving the tokenizer of {name}" if has_one else "no tokenizer was found"
        assert said in caplog.text


def test_a_taken_folder_is_refused_unless_overwritten(make_model, token_ids, tmp_path):
    one, other, folder = (
        quantized(make_model("opt")),
        quantized(make_model("llama")),
        tmp_path / "m",
    )
    folder.mkdir()
    save_quantized(one, folder)
    with pytest.raises(ValueError, match="folder already exists"):
        save_quantized(other, folder)
    assert torch.equal(logits(load_quantized(folder), token_ids), logits(one, token_ids))
    save_quantized(other, folder, overwrite=True)
    assert torch.equal(logits(load_quantized(folder), token_ids), logits(other, token_ids))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_only_a_quantized_model_is_overwritten(make_model, tmp_path, monkeypatch):
    model = quantized(make_model("opt"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / "photos")
    for taken in (tmp_path / "file", tmp_path / "photos", tmp_path / "link", "."):
        with pytest.raises(ValueError, match="folder already exists: .*/(file|photos) "):
            save_quantized(model, taken, overwrite=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "alias").symlink_to("model")
    for overwrite in (False, True):
        save_quantized(model, tmp_path / "alias", overwrite=overwrite)
    assert (tmp_path / "alias").is_symlink() and (tmp_path / "model" / CONFIG).is_file()
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_a_killed_save_leaves_only_whole_folders(make_model, token_ids, tmp_path, monkeypatch):
    # tqdm's own lock is shared among processes: a child killed in possession of it would stop the
    # parent's next progress bar for ever.
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
    model = quantized(make_model("opt"))
    want, rng = logits(model, token_ids), random.Random(0)

    def whole():
        return [path for path in tmp_path.iterdir() if not path.name.startswith(".")]

    for trial in range(10):
        if (child := os.fork()) == 0:
            try:
                for index in range(1000):
                    save_quantized(model, tmp_path / f"{trial}-{index}")
            finally:
                os._exit(0)
        deadline = time.monotonic() + 120
        while trial == 0 and not whole() and time.monotonic() < deadline:
            time.sleep(0.01)  # a busy machine may need long for one
        time.sleep(0.01 + 0.04 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert whole()
    for folder in whole():
        assert torch.equal(logits(load_quantized(folder), token_ids), want)


@pytest.mark.parametrize(
    "step",
    [
        "transformers.modeling_utils.safe_save_file",
        "transformers.PreTrainedConfig.save_pretrained",
        "os.fsync",
    ],
)
def test_a_failing_write_leaves_nothing_new_and_nothing_lost(
    step, make_model, token_ids, tmp_path, monkeypatch
):
    model, folder = quantized(make_model("opt")), tmp_path / "m"
    save_quantized(model, folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    for target, overwrite in ((tmp_path / "new", False), (folder, True)):
        with pytest.raises(OSError, match="No space left"):
            save_quantized(model, target, overwrite=overwrite)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert torch.equal(logits(load_quantized(folder), token_ids), logits(model, token_ids))


def test_only_quantized_transformers_models_are_saved(make_model, tmp_path):
    for model in (make_model("opt"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="must be a quantized transformers model"):
            save_quantized(model, tmp_path / "m")
    mixed = quantized(make_model("opt"))
    mixed.model.decoder.layers[1].fc2.config = MixedQuantConfig(group_size=3)
    with pytest.raises(
        ValueError, match="the same MixedQuantConfig; model.decoder.layers.1.fc2 differs"
    ):
        save_quantized(mixed, tmp_path / "m")
    with pytest.raises(ValueError, match="folder must be a quantized model folder"):
        load_quantized(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---- Hostile input


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    from conftest import build_model

    folder = tmp_path_factory.mktemp("pristine") / "llama"
    save_quantized(quantized(build_model("llama-bias")), folder)
    return folder


@pytest.fixture(scope="module")
def pristine_int8(tmp_path_factory):
    from conftest import build_model

    folder = tmp_path_factory.mktemp("pristine") / "llama"
    save_quantized(quantized(build_model("llama-bias"), salient_format="int8"), folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pristine, tmp_path / "copy")


TENSOR_FAULTS = [
    (f"{LAYER}.perm", put(3, 4), "is not a permutation"),
    (f"{LAYER}.perm", put(0, 88), "is not a permutation"),
    (f"{LAYER}.perm", put(0, -1), "is not a permutation"),
    (f"{LAYER}.perm", put(0, 2**31 - 1), "is not a permutation"),
    (f"{LAYER}.perm", lambda t: t.float(), "must not be float32"),
    (f"{LAYER}.perm", lambda t: t[:-1], r"must have shape \(88,\); got \(87,\)"),
    (f"{LAYER}.scales", put(5, float("nan")), "holds NaN or Inf"),
    (f"{LAYER}.scales", put(5, float("inf")), "holds NaN or Inf"),
    (f"{LAYER}.scales", put(5, -1.0), "not negative"),
    (f"{LAYER}.scales", lambda t: t.half(), "must not be float16"),
    (f"{LAYER}.scales", lambda t: t[:, :-1].contiguous(), "must have shape"),
    (f"{LAYER}.salient_weight", put(2, float("-inf")), "holds NaN or Inf"),
    (f"{LAYER}.bias", put(2, float("nan")), "holds NaN or Inf"),
    (f"{LAYER}.qweight", put(9, 0x80), "holds the code -8"),
    (f"{LAYER}.qweight", put(9, 0x08), "holds the code -8"),
    (f"{LAYER}.qweight", lambda t: t.to(torch.int8), "must not be int8"),
    (f"{LAYER}.qweight", lambda t: t.flatten(), "must have shape"),
    ("model.embed_tokens.weight", lambda t: t[:5].contiguous(), "must have shape"),
    ("model.embed_tokens.weight", put(-1, float("nan")), "holds NaN or Inf"),
    ("model.norm.weight", put(3, float("inf")), "holds NaN or Inf"),
    ("model.embed_tokens.weight", lambda t: t.int(), "must not be int32"),
]


@pytest.mark.parametrize("key, change, message", TENSOR_FAULTS)
def test_bad_tensors_are_named(key, change, message, folder):
    set_tensor(key, change)(folder)
    with pytest.raises(CheckpointError, match=f"{TENSORS}: tensor {key} .*{message}"):
        load_quantized(folder)


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("salient_scales", put(5, float("nan")), "holds NaN or Inf"),
        ("salient_scales", put(5, float("inf")), "holds NaN or Inf"),
        ("salient_scales", put(5, -1.0), "must be bfloat16 and not negative"),
        ("salient_scales", lambda t: t.half(), "must not be float16"),
        ("salient_scales", lambda t: t[:, None].contiguous(), r"must have shape \(3, 16\)"),
        ("salient_weight", put(2, -128), "holds the code -128"),
        ("salient_weight", lambda t: t.bfloat16(), "must not be bfloat16"),
        ("salient_weight", lambda t: t.view(torch.uint8), "must not be uint8"),
        ("salient_weight", lambda t: t[:, :-1].contiguous(), "must have shape"),
    ],
)
def test_bad_tensors_of_int8_salient_weights_are_named(
    key, change, message, pristine_int8, tmp_path
):
    folder = shutil.copytree(pristine_int8, tmp_path / "copy")
    set_tensor(f"{LAYER}.{key}", change)(folder)
    with pytest.raises(CheckpointError, match=f"{TENSORS}: tensor {LAYER}.{key} .*{message}"):
        load_quantized(folder)


def test_the_salient_formats_are_not_mistaken_for_each_other(pristine_int8, folder, tmp_path):
    int8 = shutil.copytree(pristine_int8, tmp_path / "int8")
    edit_manifest("config", "salient_format", value="16bit")(int8)
    with pytest.raises(CheckpointError, match="should not have tensor .*.salient_scales"):
        load_quantized(int8)
    edit_manifest("config", "salient_format", value="int8")(folder)
    with pytest.raises(CheckpointError, match="lacks tensor .*.salient_scales"):
        load_quantized(folder)
    edit_manifest("config", "salient_format", value="int2")(folder)
    with pytest.raises(CheckpointError, match="config: salient_format must be one of"):
        load_quantized(folder)


@pytest.mark.parametrize(
    "rename, message",
    [
        ({f"{LAYER}.perm": None}, f"lacks tensor {LAYER}.perm"),
        ({f"{LAYER}.perm": "../perm"}, f"lacks tensor {LAYER}.perm"),
        ({None: "../../etc/passwd"}, "should not have tensor ../../etc/passwd"),
        ({None: "model.layers.7.fc.weight"}, "should not have tensor model.layers.7.fc.weight"),
    ],
)
def test_missing_and_surplus_tensors_are_named(rename, message, folder):
    tensors = load_file(folder / TENSORS)
    for old, new in rename.items():
        tensor = tensors.pop(old) if old else torch.zeros(3)
        if new:
            tensors[new] = tensor
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (edit_manifest("format_version", value=2), "config: format_version 2 is not 3"),
        (edit_manifest("format_version", value="3"), "config: format_version '3' is not 3"),
        (edit_manifest("format_version", value=3.0), "format_version of it must be int"),
        (edit_manifest("extra", value=1), "it must have the fields quant_method, format_version"),
        (
            edit_manifest("quant_method", value="gptq"),
            "quant_method must be 'mixedquant'; got 'gptq'",
        ),
        (
            edit(CONFIG, "quantization_config", value=None),
            "it must have the fields quant_method",
        ),
        (edit_manifest("config", "group_size", value=0), "config: group_size must be in "),
        (
            edit_manifest("config", "group_size", value="8"),
            "config: group_size must be an integer",
        ),
        (edit_manifest("config", "group_size", value=8), "tensor .*.scales must have shape"),
        (edit_manifest("config", "surprise", value=1), "config: unknown MixedQuantConfig field"),
        (
            edit(CONFIG, "architectures", value=["Trainer"]),
            r"must name a transformers model; got \['Trainer'\]",
        ),
        (edit(CONFIG, "architectures", value=["../x"]), "must name a transformers model"),
        (edit(CONFIG, "architectures", value=[]), "must name a transformers model"),
        (edit(CONFIG, "architectures", value=[[]]), "must name a transformers model"),
        (edit_manifest("linears", value={}), "linears is empty"),
        (edit_manifest("linears", LAYER, value=3), f"linear {LAYER} must have the fields"),
        (edit_manifest("linears", LAYER, "num_salient", value=89), f"linear {LAYER}: num_salient"),
        (edit_manifest("linears", LAYER, "num_salient", value=-1), f"linear {LAYER}: num_salient"),
        (edit_manifest("linears", LAYER, "num_salient", value=7), f"tensor {LAYER}"),
        (edit_manifest("linears", LAYER, "bias", value=False), f"not have tensor {LAYER}.bias"),
        (edit_manifest("linears", LAYER, "bias", value=0), f"bias of linear {LAYER} must be bool"),
        (
            edit_manifest(
                "linears",
                "../../x",
                value={"num_salient": 0, "bias": False, "quantize_output": False, "choices": {}},
            ),
            "the model has no linear ../../x",
        ),
        (
            edit_manifest("linears", LAYER, "choices", value={"num_bits": 3}),
            f"linear {LAYER}: choices may name",
        ),
        (
            edit_manifest("linears", LAYER, "choices", value={"act_clip": "search"}),
            f"linear {LAYER}: act_clip='search'",
        ),
        (
            edit_manifest("linears", LAYER, "choices", value={"rotation": "group" * 9}),
            f"linear {LAYER}: rotation must be",
        ),
        (edit_manifest("shared", "a", value="b"), "should not have tensor a"),
        (
            edit_manifest("shared", f"{LAYER}.perm", value="lm_head.weight"),
            "should not have tensor",
        ),
        (edit_manifest("shared", "a", value=5), "a of shared must be str"),
        (
            edit_manifest("dtypes", "lm_head.weight", value="int64"),
            "lm_head.weight must not be float32; .* int64",
        ),
        (edit_manifest("dtype", value="int8"), "dtype of the model is 'int8'"),
        (edit_manifest("dtype", value="float16"), "must not be float32; .* float16"),
        (edit_manifest("dtypes", "lm_head.weight", value="__all__"), "dtype of lm_head.weight is"),
        (edit_manifest("dtypes", "lm_head.weight", value="banana"), "dtype of lm_head.weight is"),
        (edit_manifest("dtypes", "extra", value="float32"), "must not name extra"),
        (
            edit_manifest("dtypes", "model.rotary_emb.inv_freq", value="int64"),
            "model.rotary_emb.inv_freq must be float32",
        ),
        (edit_manifest("shared", f"{LAYER}.bias", value="lm_head.weight"), "not have tensor"),
        (
            edit("config.json", "num_hidden_layers", value=10**4),
            "config.json: .*far more parameters than the files have tensors",
        ),
        (edit("config.json", "num_hidden_layers", value=1), "has no linear model.layers.1"),
        (edit("config.json", "hidden_size", value=52), "tensor .* must have shape"),
        (edit("config.json", "hidden_act", value="nothing"), "config.json: "),
        (edit("config.json", "model_type", value="unheard_of"), "config.json: "),
        (edit("config.json", "model_type", value="opt"), "config.json: .*its model type is 'opt'"),
    ],
)
def test_bad_manifests_are_named(spoil, message, folder):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder)


def test_untied_twins_of_another_shape_are_refused(make_model, tmp_path):
    save_quantized(quantized(make_model("llama")), tmp_path / "m")
    edit_manifest("shared", "lm_head.weight", value="model.norm.weight")(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match="tensor lm_head.weight and .* differ in shape or dtype"
    ):
        load_quantized(tmp_path / "m")


def test_code_in_the_folder_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    for key in ("auto_map", "custom_pipelines"):
        edit("config.json", key, value={"AutoConfig": "evil.C", "AutoModel": "evil.M"})(folder)
    edit("config.json", "model_type", value="evil")(folder)
    with pytest.raises(CheckpointError, match="config.json"):
        load_quantized(folder)


@pytest.mark.parametrize("file", [CONFIG, TENSORS, "generation_config.json"])
def test_files_without_an_end_are_not_read(file, folder):
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{file}: no such file"):
        load_quantized(folder)


def test_what_does_not_run_is_refused(make_model, tmp_path):
    model = make_model("mixtral")
    save_quantized(quantized(model), tmp_path / "m")
    edit(CONFIG, "num_experts_per_tok", value=5)(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match="config.json: the MixtralForCausalLM .* does not run"
    ):
        load_quantized(tmp_path / "m")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_missing_and_broken_files_are_named(file, content, folder):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        load_quantized(folder)


def test_a_broken_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        load_quantized(folder)


@pytest.mark.parametrize("index", ["9" * 5000, "\u0661", "4", "-1", "01", "1.5"])
def test_unknown_experts_are_named(index, make_model, tmp_path):
    save_quantized(quantized(make_model("mixtral")), tmp_path / "m")
    content = json.loads((tmp_path / "m" / CONFIG).read_text())
    linears = content["quantization_config"]["linears"]
    linears[f"model.layers.0.mlp.experts.{index}.down_proj"] = linears.pop(
        "model.layers.0.mlp.experts.1.down_proj"
    )
    (tmp_path / "m" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the model has no linear model.layers.0.mlp.experts"):
        load_quantized(tmp_path / "m")
