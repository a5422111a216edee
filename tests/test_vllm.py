"""Folders served by vLLM: the layers and log-probabilities of transformers, and what is refused.
vLLM has an environment of its own: `./run.sh test-vllm` makes it and runs this file there.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import re

import pytest
import torch
from spoil import set_tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from smoothquant import CheckpointError, MixedQuantConfig, quantize, save_quantized
from smoothquant.bundled import bundled_folder, wikitext
from smoothquant.calibration.tokens import calibration_batches
from smoothquant.models.loading import load_tokenizer

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: ./run.sh test-vllm", allow_module_level=True)

from smoothquant.serving.launch import SETTINGS

os.environ.update(SETTINGS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"})
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from smoothquant.serving import vllm as plugin

VOCABULARY = 100  # fills no panel
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
WITHOUT_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}
OPT = {k: v for k, v in WITHOUT_HEAD_DIM.items() if k != "intermediate_size"}
OPT |= {"ffn_dim": 192, "word_embed_proj_dim": 128, "tie_word_embeddings": True}
TIED = {"tie_word_embeddings": True}

# Every architecture that is served, and every format of head and embeddings in one of them.
MODELS = {
    "llama": ("llama", SIZES, {"head": "int8"}),
    "llama, with biases": (
        "llama-bias", SIZES, {"head": "int4", "embeddings": "int8", "act_bits": 8},
    ),
    "llama, INT8 salient": ("llama", SIZES, {"salient_format": "int8", "embeddings": "int4"}),
    "mistral": ("mistral", SIZES, {"act_bits": 8, "embeddings": "int8"}),
    "qwen2": ("qwen2", WITHOUT_HEAD_DIM, {"head": "int8"}),
    "qwen3": ("qwen3", SIZES | TIED, {"head": "int8"}),
    "gemma": ("gemma", SIZES, {"head": "int8"}),
    "gemma2": ("gemma2", SIZES | TIED | {"query_pre_attn_scalar": 32}, {}),
    "phi3": ("phi3", WITHOUT_HEAD_DIM, {"head": "int8", "embeddings": "int8"}),
    "opt": ("opt", OPT, {}),
}  # fmt: skip

DTYPES = {"llama": torch.bfloat16, "llama, INT8 salient": torch.float16}

PLAIN = {"recipe": "rtn", "group_size": 16, "calibration": "weights"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a tiny quantized model; returns the folder."""
    from conftest import build_model

    def save(architecture, sizes=SIZES, dtype=torch.float32, **fields):
        model = build_model(architecture, **sizes)
        for parameter in model.parameters():  # model.to(dtype) would round rotary frequencies
            parameter.data = parameter.data.to(dtype)
        model.generation_config.eos_token_id = None
        given = fields.keys() & {"head", "embeddings"}
        rest = None if given and model.config.tie_word_embeddings else "16bit"
        tables = {"head": rest, "embeddings": rest}
        quantize(model, MixedQuantConfig(**PLAIN | tables | fields), progress=False)
        folder = tmp_path_factory.mktemp("folders") / "model"
        save_quantized(model, folder)
        return folder

    return save


@contextlib.contextmanager
def engine(folder, **fields):
    """vLLM with a folder."""
    defaults = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    llm = LLM(str(folder), **defaults | fields)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def reference(folder, dtype=torch.float32):
    """The model in transformers. Only its eager attention caps the logits of Gemma 2."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def log_probabilities(llm, prompts):
    """Of each prompt's tokens after the first."""
    options = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    answers = llm.generate(prompts, options, use_tqdm=False)
    return [
        torch.tensor([next(iter(token.values())).logprob for token in answer.prompt_logprobs[1:]])
        for answer in answers
    ]


@torch.no_grad()
def expected(model, prompt):
    """transformers' log-probabilities of the tokens after the first."""
    ids = torch.tensor(prompt)
    logits = model(ids[None]).logits[0, :-1].float()
    return -F.cross_entropy(logits, ids[1:], reduction="none")


def some_prompts(count, length=20, vocabulary=VOCABULARY, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def differing(theirs, ours, dtype):
    """Names of vLLM's layers whose output differs in any bit from those of transformers'."""
    generator = torch.Generator().manual_seed(0)
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    layers = dict(ours.named_modules())
    different, compared = [], 0
    with torch.no_grad():
        for name, module in theirs.named_modules():
            method = getattr(module, "quant_method", None)
            if not isinstance(method, plugin.PackedMethod):
                continue
            compared += 1
            if isinstance(method, plugin.PackedTable):
                ids = torch.arange(VOCABULARY)
                if name.endswith("embed_tokens"):
                    # not layers[name](ids): vLLM applies the factor of Gemma's by itself
                    same = torch.equal(module(ids), layers[name].packed.rows(ids).to(dtype))
                else:
                    x = torch.randn(5, SIZES["hidden_size"], generator=generator).to(dtype)
                    y = method.apply(module, x)
                    same = torch.equal(y[:, :VOCABULARY], ours.get_output_embeddings()(x))
                    same &= not y[:, -(-VOCABULARY // 16) * 16 :].any()
            else:
                parent, _, leaf = name.rpartition(".")
                linears = [layers.get(f"{parent}.{part}") for part in parts.get(leaf, (leaf,))]
                linears = [layers[name]] if None in linears else linears
                x = torch.randn(5, linears[0].in_features, generator=generator).to(dtype)
                same = torch.equal(module(x)[0], torch.cat([y(x) for y in linears], -1))
            if not same:
                different.append(name)
    return different, compared


@pytest.mark.parametrize("kind", MODELS)
def test_layers_have_the_bits_of_transformers(kind, saved):
    architecture, sizes, fields = MODELS[kind]
    dtype = DTYPES.get(kind, torch.float32)
    folder = saved(architecture, sizes, dtype, **fields)
    ours = reference(folder, dtype)
    prompts = some_prompts(3)
    with engine(folder, dtype=dtype) as llm:
        ((different, compared),) = llm.apply_model(lambda m: differing(m, ours, dtype))
        assert different == []
        tables = fields.keys() & {"head", "embeddings"}
        assert compared == 4 * sizes["num_hidden_layers"] + (
            2 if ours.config.tie_word_embeddings and tables else len(tables)
        )
        found = log_probabilities(llm, prompts)
    if dtype == torch.float32:  # in 16 bits, vLLM's own kernels round otherwise
        errors = torch.cat(found) - torch.cat([expected(ours, prompt) for prompt in prompts])
        assert errors.abs().mean() < 1e-4


@pytest.mark.parametrize("eager", [True, False])
def test_a_prompt_has_the_same_bits_alone_and_in_a_batch(eager, saved):
    folder = saved("llama", head="int8")
    prompts = some_prompts(12)
    with engine(folder, enforce_eager=eager) as llm:
        together = log_probabilities(llm, prompts)
        alone = [log_probabilities(llm, [prompt])[0] for prompt in prompts]
    ours = reference(folder)
    assert all(map(torch.equal, alone, together))
    errors = torch.cat(alone) - torch.cat([expected(ours, prompt) for prompt in prompts])
    assert errors.abs().mean() < 1e-3  # the last bits differ, which may change an INT4 code


def test_perplexity_is_that_of_transformers(tmp_path):
    source = bundled_folder("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    config = MixedQuantConfig(calibration="wikitext2", calibration_tokens=2048)
    tokenizer = load_tokenizer(source)
    batches = calibration_batches(model, tokenizer, config)
    quantize(model, config, batches=batches, progress=False)
    save_quantized(model, tmp_path / "model", tokenizer)
    ids = tokenizer(wikitext("test"), return_tensors="pt").input_ids[0]
    windows = ids[: 6 * 200].view(6, 200).tolist()
    ours = torch.cat([expected(model, window) for window in windows]).mean().neg().exp()
    with engine(tmp_path / "model", dtype="bfloat16", max_model_len=256) as llm:
        theirs = torch.cat(log_probabilities(llm, windows)).mean().neg().exp()
    assert ours < 60 and abs(theirs / ours - 1) < 0.03, (ours, theirs)


def test_two_processes_share_a_model(saved):
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 256}
    folder = saved("qwen2", {k: v for k, v in sizes.items() if k != "head_dim"}, tp_blocks=2,
                   head="int8", embeddings="int8")  # fmt: skip
    ours = reference(folder)
    prompts = some_prompts(3)
    with engine(folder, tensor_parallel_size=2) as llm:
        found = log_probabilities(llm, prompts)
    errors = torch.cat(found) - torch.cat([expected(ours, prompt) for prompt in prompts])
    assert errors.abs().mean() < 1e-3


# ---- What is refused


def manifest_of(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    for field in ("checksum", "checksums"):
        del fields[field]
    fields["config"] |= changes
    return fields


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backend": "fake"}, "backend='fake', which simulates quantization: quantize it again"),
        ({"non_finite": "raise"}, "non_finite='raise': quantize it again without"),
    ],
)
def test_settings_that_are_not_served(changes, message, saved):
    with pytest.raises(ValueError, match=message):
        plugin.ServedConfig.from_config(manifest_of(saved("llama"), **changes))


def test_layers_that_are_not_served(saved):
    fields = manifest_of(saved("llama", quantize_output=True))
    with pytest.raises(ValueError, match="quantize_output=True: quantize it again without"):
        plugin.ServedConfig.from_config(fields)
    fields = manifest_of(saved("llama"))
    fields["linears"]["model.layers.0.mlp.experts.3.down_proj"] = {"num_salient": 2}
    with pytest.raises(ValueError, match="quantized experts: load the model with transformers"):
        plugin.ServedConfig.from_config(fields)
    fields = manifest_of(saved("llama", act_quant="per_token"))
    assert plugin.ServedConfig.from_config(fields).get_name() == "mixedquant"


@pytest.mark.parametrize(
    "architecture, fields, message",
    [
        ("bloom", {}, "BloomForCausalLM is not served in vLLM, only Gemma2ForCausalLM, "),
        ("opt", {"head": "int8"}, "head or the embeddings of a OPTForCausalLM: quantize the model"),
    ],
)
def test_architectures_that_are_not_served(architecture, fields, message, saved):
    folder = saved(architecture, {}, **fields)
    config = plugin.ServedConfig.from_config(manifest_of(folder))
    with pytest.raises(ValueError, match=message):
        config.maybe_update_config(str(folder), AutoConfig.from_pretrained(folder))


def test_a_damaged_folder_is_refused_before_memory_is_taken(saved):
    folder = saved("llama")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms"', '"max"', 1))
    with pytest.raises(Exception, match="quantization_config was changed after"):
        LLM(str(folder), skip_tokenizer_init=True)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match="model.safetensors"):
        LLM(str(folder), skip_tokenizer_init=True)


def test_a_tensor_with_an_invalid_value_is_refused(saved):
    folder = saved("llama")
    name = "model.layers.1.self_attn.o_proj.scales"
    set_tensor(name, lambda tensor: tensor.fill_(float("nan")))(folder)
    message = re.escape(f"tensor {name} holds NaN or Inf")
    with pytest.raises(CheckpointError, match=message), engine(folder):
        pass
    cleanup_dist_env_and_memory()


def blank_method(saved, names=("q_proj", "k_proj", "v_proj"), **changes):
    """A method for linears of one layer, and the module that it registered its tensors in."""
    folder = saved("llama")
    config = plugin.ServedConfig.from_config(manifest_of(folder))
    names = [f"model.layers.0.self_attn.{name}" for name in names]
    for name, entry in changes.items():
        config.manifest.linears[f"model.layers.0.self_attn.{name}"].update(entry)
    method, layer = plugin.PackedMethod(config, names), torch.nn.Module()
    layer.tp_rank = 0
    return method, layer


def test_linears_that_cannot_be_fused(saved):
    for change in ({"num_salient": 3}, {"choices": {"act_clip": 0.5}}):
        with pytest.raises(ValueError, match="fuses .*q_proj with .*v_proj, but their .* differ"):
            blank_method(saved, v_proj=change)
    method, layer = blank_method(saved)
    with pytest.raises(ValueError, match="40 output channels do not fill panels of 16"):
        method.create_weights(layer, 128, [128, 40, 40], 128, 208, torch.float32)
    config = method.config
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    del config.manifest.linears["model.layers.0.self_attn.k_proj"]
    linear = object.__new__(plugin.LinearBase)
    with pytest.raises(ValueError, match="of which only .* are quantized: ignore all of them"):
        config.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")


def test_input_channels_that_cannot_be_cut(saved):
    method, _ = blank_method(saved, ["o_proj"])
    layer = object.__new__(plugin.RowParallelLinear)
    torch.nn.Module.__init__(layer)
    layer.tp_rank = 0
    with pytest.raises(ValueError, match="o_proj: .*quantize with tp_blocks=2"):
        method.create_weights(layer, 64, [128], 128, 128, torch.float32)


def test_tensors_that_do_not_arrive_as_they_should(saved):
    method, layer = blank_method(saved)
    method.create_weights(layer, 128, [128, 64, 64], 128, 256, torch.float32)
    load = layer.scales.weight_loader
    with pytest.raises(CheckpointError, match="q_proj.scales must not be float32; .* bfloat16"):
        load(layer.scales, torch.zeros(8, 8, 16), "q")
    with pytest.raises(CheckpointError, match="k_proj.scales must have 4 panels; got 8"):
        load(layer.scales, torch.zeros(8, 8, 16).bfloat16(), "k")
    with pytest.raises(CheckpointError, match=r"q_proj.scales must have shape \(8, "):
        load(layer.scales, torch.zeros(8, 9, 16).bfloat16(), "q")
    perm = torch.arange(128, dtype=torch.int32)
    layer.perm.weight_loader(layer.perm, perm, "q")
    with pytest.raises(CheckpointError, match="v_proj.perm differs from that of .*q_proj"):
        layer.perm.weight_loader(layer.perm, perm.flip(0), "v")
    with pytest.raises(CheckpointError, match="lacks tensor .*q_proj.qweight"):
        method.process_weights_after_loading(layer)


def test_vllm_finds_the_plug_in():
    (entry,) = [
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "mixedquant"
    ]
    assert entry.load() is plugin.register
