"""GGUF: the package gguf reads what was written, and llama.cpp computes what the model computes."""

import json
import sys

import numpy as np
import pytest
import torch
from programs import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from smoothquant import MixedQuantConfig, dequantize, quantize, save_quantized
from smoothquant.bundled import wikitext
from smoothquant.checkpoints.export_gguf import CUTS, export_gguf
from smoothquant.cli import app

sys.path.append(str(ROOT / "benchmarks"))
import llamacpp

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Codes that Q4_0 can express
NATURAL = {"recipe": "rtn", "salient_prop": 0.0, "sort": "none", "group_size": 32}


def float_model(family="llama", **fields):
    torch.manual_seed(0)
    model_class, config_class = CLASSES[family]
    model = model_class(config_class(**SIZES | fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def quantized(model, **choices):
    calibration = torch.randint(SIZES["vocab_size"], (1, 64))
    config = MixedQuantConfig(**NATURAL | choices)
    quantize(model, config, batches=[calibration], progress=False)
    return model


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    values = {
        name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        for name, t in tensors.items()
    }
    return reader, {name: t.tensor_type.name for name, t in tensors.items()}, values


def in_natural_order(rows, head_dim):
    """Undo llama.cpp's order of the rows of q and k."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [12, 16])
def test_a_float_model_is_stored_in_16_bits(tied, head_dim, tmp_path):
    model = float_model(tie_word_embeddings=tied, head_dim=head_dim)
    assert export_gguf(model, tmp_path / "m.gguf") == {"F16": 15 + (not tied), "F32": 5}
    reader, formats, values = read(tmp_path / "m.gguf")
    layer = model.model.layers[1]
    expected = {
        "token_embd": model.model.embed_tokens,
        "output_norm": model.model.norm,
        "blk.1.attn_norm": layer.input_layernorm,
        "blk.1.attn_v": layer.self_attn.v_proj,
        "blk.1.attn_output": layer.self_attn.o_proj,
        "blk.1.ffn_norm": layer.post_attention_layernorm,
        "blk.1.ffn_gate": layer.mlp.gate_proj,
        "blk.1.ffn_up": layer.mlp.up_proj,
        "blk.1.ffn_down": layer.mlp.down_proj,
    }
    for name, module in expected.items():
        weight = module.weight.detach()
        assert formats[f"{name}.weight"] == ("F16" if weight.dim() == 2 else "F32")
        weight = weight.half() if weight.dim() == 2 else weight
        np.testing.assert_array_equal(values[f"{name}.weight"], weight.float().numpy())
    # Row 0 of a head is followed by the row that transformers rotates together with it.
    for name in ("q", "k"):
        weight = getattr(layer.self_attn, f"{name}_proj").weight.detach().half().float().numpy()
        rows = values[f"blk.1.attn_{name}.weight"]
        half = head_dim // 2
        np.testing.assert_array_equal(rows[0:4], weight[[0, half, 1, half + 1]])
        np.testing.assert_array_equal(rows[head_dim + 1], weight[head_dim + half])
    assert ("output.weight" in values) == (not tied)
    assert reader.get_field("llama.vocab_size").contents() == SIZES["vocab_size"]
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    assert reader.get_field("llama.rope.dimension_count").contents() == head_dim


@pytest.mark.parametrize("family", CLASSES)
def test_codes_that_fit_keep_their_exact_values(family, tmp_path):
    model = quantized(float_model(family, tie_word_embeddings=True), weight_scale="mse")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = export_gguf(model, tmp_path / "m.gguf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert counts["Q4_0"] == 14 and counts["Q8_0"] == 1 and "F16" not in counts
    reader, _, values = read(tmp_path / "m.gguf")
    name = "qwen2" if family == "qwen2" else "llama"
    assert reader.get_field("general.architecture").contents() == name
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.down_proj", "ffn_down"),
        ):
            module = layer.get_submodule(ours)
            for kind, value in (("weight", module.dequantize()), ("bias", module.bias)):
                if value is None:
                    continue
                rows = values[f"blk.{index}.{theirs}.{kind}"]
                if name == "llama" and theirs in ("attn_q", "attn_k"):
                    rows = in_natural_order(rows, 16)
                np.testing.assert_array_equal(rows, value.detach().numpy())
    assert ("blk.0.attn_q.bias" in values) == (family == "qwen2")


@pytest.mark.parametrize(
    "choices, round_to, levels",
    [
        ({"recipe": "fast", "salient_prop": 0.05, "group_size": 16}, "Q8_0", 127),
        ({"sort": "rms"}, "Q4_0", 8),
        ({"backend": "fake"}, "Q8_0", 127),
        ({"group_size": 16}, "Q4_0", 8),
    ],
)
def test_other_codes_are_rounded_to_blocks(choices, round_to, levels, tmp_path):
    model = quantized(float_model(), **choices)
    assert export_gguf(model, tmp_path / "m.gguf", round_to=round_to)[round_to] >= 14
    _, formats, values = read(tmp_path / "m.gguf")
    weight = model.model.layers[0].mlp.up_proj.dequantize().numpy()
    assert formats["blk.0.ffn_up.weight"] == round_to and formats["output.weight"] == "Q8_0"
    blocks = weight.reshape(-1, 32)
    error = np.abs(values["blk.0.ffn_up.weight"].reshape(-1, 32) - blocks).max(1)
    # Q4_0's range has one level less on one side.
    assert (error <= 1.001 * np.abs(blocks).max(1) / levels + 1e-6).all() and error.max() > 0


def test_rows_that_are_no_blocks_are_stored_in_16_bits(tmp_path):
    model = quantized(float_model(intermediate_size=88), group_size=8)
    assert export_gguf(model, tmp_path / "m.gguf")["F16"] == 2
    _, formats, values = read(tmp_path / "m.gguf")
    assert formats["blk.0.ffn_down.weight"] == "F16"
    expected = model.model.layers[0].mlp.down_proj.dequantize().half().float().numpy()
    np.testing.assert_array_equal(values["blk.0.ffn_down.weight"], expected)


def test_the_command_writes_a_saved_folder_with_its_tokenizer(tmp_path):
    tokenizer = trained("smollm")
    model = quantized(float_model(vocab_size=len(tokenizer), num_hidden_layers=1))
    save_quantized(model, tmp_path / "m", tokenizer)
    words = ["export", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--format", "gguf", "--json"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["tensors"] == {"Q8_0": 2, "Q4_0": 7, "F32": 3}
    reader, _, values = read(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    expected = model.model.layers[0].mlp.down_proj.dequantize().numpy()
    np.testing.assert_array_equal(values["blk.0.ffn_down.weight"], expected)


def other_models():
    yield float_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    yield float_model("qwen2", rope_parameters=LLAMA3)
    yield float_model(hidden_act="gelu")
    yield OPTForCausalLM(
        OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )


def test_what_cannot_be_expressed_is_refused_by_name(tmp_path):
    for model in other_models():
        with pytest.raises(ValueError, match=f"{type(model).__name__}"):
            export_gguf(model, tmp_path / "m.gguf")
    model = float_model()
    with pytest.raises(ValueError, match="round_to must be one of Q8_0, Q4_0; got 'Q2'"):
        export_gguf(model, tmp_path / "m.gguf", round_to="Q2")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="ffn_up.weight is beyond the range of float16"):
        export_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="tokenizer must use byte-pair encoding"):
        export_gguf(float_model(), tmp_path / "m.gguf", object())
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match="path already exists"):
        export_gguf(float_model(), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="other than a GGUF file"):
        export_gguf(float_model(), tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    model = float_model()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="output_norm.weight holds NaN"):
        export_gguf(model, tmp_path / "n.gguf")


# ---- Tokenizers


def steps_of(name):
    """The pre-tokenizer that llama.cpp calls `name`."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (key,) = [steps for steps, cut in CUTS.items() if cut == name]
    if name in ("gpt-2", "smollm"):
        return [level] if name == "gpt-2" else [pre_tokenizers.Digits(True), level]
    cut = pre_tokenizers.Split(Regex(key[0][1]), "isolated")
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def trained(name):
    """A small tokenizer; "llama" has SentencePiece's byte fallback."""
    special = ["<unk>", "<s>", "</s>"]
    if name == "llama":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps_of(name))
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator(wikitext("validation")[:300], trainer)
    if name == "llama":  # bytes are no special tokens, as in LLaMA's own file
        backend = without_special_bytes(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def without_special_bytes(backend):
    data = json.loads(backend.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(data))


def test_tokenizers_that_do_more_are_refused(tmp_path):
    lower = normalizers.Lowercase()

    def with_normalizer(backend, normalizer):
        backend.normalizer = normalizer

    def with_steps(backend, *steps):
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))

    (pattern,) = [steps[0][1] for steps, cut in CUTS.items() if cut == "qwen2"]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, change in (
        ("gpt-2", lambda backend: with_normalizer(backend, lower)),
        ("llama", lambda backend: with_normalizer(backend, lower)),
        ("llama", lambda backend: with_normalizer(backend, normalizers.Replace("a", "b"))),
        ("qwen2", lambda b: with_steps(b, pre_tokenizers.Split(Regex(pattern), "isolated"))),
        ("qwen2", lambda b: with_steps(b, pre_tokenizers.Split(Regex(pattern), "removed"), whole)),
    ):
        tokenizer = trained(name)
        change(tokenizer.backend_tokenizer)
        model = float_model(vocab_size=len(tokenizer), num_hidden_layers=1)
        with pytest.raises(ValueError, match="tokenizer (normalizes|cuts)"):
            export_gguf(model, tmp_path / "m.gguf", tokenizer)


TOKENIZERS = ["llama", *CUTS.values()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_vocabulary_is_in_the_file(name, tmp_path):
    tokenizer = trained(name)
    model = float_model(vocab_size=len(tokenizer) + 8, num_hidden_layers=1)
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    reader, _, _ = read(tmp_path / "m.gguf")

    def field(key):
        return reader.get_field(f"tokenizer.ggml.{key}").contents()

    tokens = field("tokens")
    vocabulary = tokenizer.get_vocab()
    assert all(tokens[index] == text for text, index in vocabulary.items())
    assert len(tokens) == model.config.vocab_size
    assert field("token_type")[-8:] == [gguf.TokenType.UNUSED] * 8
    assert field("bos_token_id") == 1 and field("eos_token_id") == 2
    assert field("token_type")[1] == gguf.TokenType.CONTROL
    assert field("add_bos_token") is False
    if name == "llama":
        assert field("model") == "llama" and field("add_space_prefix") is True
        assert field("token_type")[3] == gguf.TokenType.BYTE
        assert field("token_type")[0] == gguf.TokenType.UNKNOWN
    else:
        assert field("model") == "gpt2" and field("pre") == name and len(field("merges")) > 100


def test_tokenizers_without_a_name_are_refused(tmp_path):
    tokenizer = trained("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"has no name in GGUF: \['no ByteLevel', 'Whitespace'\]"):
        export_gguf(float_model(vocab_size=600), tmp_path / "m.gguf", tokenizer)


# ---- llama.cpp itself

engine = pytest.mark.skipif(
    not llamacpp.is_built(), reason="llama.cpp is not built: python benchmarks/llamacpp.py"
)


WINDOW = 64


def computed(path, text):
    """Token ids [W, WINDOW] of a text, and log-probabilities [W, WINDOW / 2 - 1, V] of the tokens
    after those of each second half, as llama-perplexity stores them in a file."""
    (path.parent / "text").write_text(text, encoding="utf-8")
    command = [str(llamacpp.program("llama-perplexity")), "-m", str(path), "-t", "1"]
    command += ["-c", str(WINDOW), "-b", str(WINDOW), "-f", str(path.parent / "text")]
    llamacpp._run([*command, "--kl-divergence-base", str(path.parent / "base")])
    with open(path.parent / "base", "rb") as file:
        assert file.read(8) == b"_logits_"
        size, vocabulary, count = np.fromfile(file, np.int32, 3)
        ids = np.fromfile(file, np.int32, size * count).reshape(count, size)
        rows = np.fromfile(file, np.uint16).reshape(count, size // 2 - 1, -1)
    scale, smallest = np.moveaxis(rows[..., :4].copy().view(np.float32), -1, 0)[..., None]
    return torch.from_numpy(ids).long(), torch.from_numpy(
        smallest + scale * rows[..., 4 : 4 + vocabulary]
    )


@engine
@pytest.mark.parametrize(
    "name, family, fields, choices",
    [
        ("llama", "llama", {}, None),
        ("llama-bpe", "llama", {"rope_parameters": LLAMA3}, None),
        ("smollm", "llama", {"attention_bias": True}, NATURAL),
        ("gpt-2", "mistral", {"head_dim": 32}, {"recipe": "fast", "salient_prop": 0.05}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}, NATURAL),
    ],
)
def test_llama_cpp_reads_the_same_tokens_and_computes_the_same(
    name, family, fields, choices, tmp_path
):
    tokenizer = trained(name)
    model = float_model(family, vocab_size=len(tokenizer), **fields)
    if choices:
        quantized(model, **choices)
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    text = "".join(wikitext("test"))[:2500] + " It's 1234567 degrees; naïve\n\n\n  and   more …\n"
    ids, found = computed(tmp_path / "m.gguf", text)
    expected = tokenizer(text).input_ids
    assert ids.numel() > len(expected) - WINDOW > 500
    assert ids.flatten().tolist() == expected[: ids.numel()]
    if choices:
        dequantize(model)
    with torch.no_grad():
        logits = model(ids).logits[:, WINDOW // 2 : -1].float()
    assert logits.std() > 0.5  # predictions that differ
    want = logits.log_softmax(-1)

    def divergence(other):
        return (want.exp() * (want - other)).sum(-1).mean()

    assert divergence(found) < 0.01 < 0.1 < divergence(found.flip(1))
