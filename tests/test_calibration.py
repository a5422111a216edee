"""Calibration: any source of texts gives the same statistics, and they equal plain torch's."""

import copy
import importlib.util
import json
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smoothquant import quantize
from smoothquant.bundled import load_bundled, load_model, wikitext
from smoothquant.calibration import (
    collect_stats,
    get_act_scales,
    get_static_decoder_layer_scales,
    load_act_scales,
    load_stats,
    save_act_scales,
    save_stats,
    token_blocks,
    tokens,
)
from smoothquant.channels.statistics import STAT_DTYPES, ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.core.errors import CheckpointError
from smoothquant.layers.linear import W4A4Linear
from smoothquant.models.families import layer_inputs
from smoothquant.models.linears import is_linear

ROWS = wikitext("validation")[:60]


@pytest.fixture(scope="module")
def tiny_opt():
    return load_bundled("tiny-opt")


@pytest.fixture(scope="module")
def blocks(tiny_opt):
    return token_blocks(ROWS, tiny_opt[1], 3, 64)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def test_token_blocks_are_windows_of_the_joined_text(tiny_opt, blocks):
    ids = tiny_opt[1]("\n\n".join(ROWS)).input_ids
    assert [b.shape for b in blocks] == [(1, 64)] * 3
    assert torch.cat(blocks, dim=1).tolist()[0] == ids[:192]
    everything = token_blocks(iter(ROWS), tiny_opt[1], None, 64)
    assert len(everything) == len(ids) // 64
    assert all(torch.equal(a, b) for a, b in zip(blocks, everything, strict=False))


def test_token_blocks_piecewise(tiny_opt, monkeypatch):
    """More blocks start with fewer blocks even when the text is tokenized in pieces."""
    tokenizer = tiny_opt[1]
    monkeypatch.setattr(tokens, "TOKENIZE_CHARACTERS", 500)
    many = token_blocks(ROWS, tokenizer, 40, 32)
    for num_blocks in (1, 5, 17):
        few = token_blocks(ROWS, tokenizer, num_blocks, 32)
        assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    ids = torch.cat(many, dim=1)[0]
    assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
    text = tokenizer.decode(ids[1:])
    assert "\n\n".join(ROWS).startswith(text.rstrip("\ufffd"))

    consumed = []
    token_blocks((consumed.append(row) or row for row in ROWS), tokenizer, 1, 32)
    assert len(consumed) < len(ROWS)


def test_token_blocks_arguments(tiny_opt):
    tokenizer = tiny_opt[1]
    with pytest.raises(ValueError, match="num_blocks .*0"):
        token_blocks(ROWS, tokenizer, 0, 8)
    with pytest.raises(ValueError, match="block_size .*-1"):
        token_blocks(ROWS, tokenizer, 1, -1)
    with pytest.raises(TypeError, match="block_size .*8.0"):
        token_blocks(ROWS, tokenizer, 1, 8.0)
    with pytest.raises(ValueError, match="block_size.*less than one block of 512"):
        token_blocks(["short"], tokenizer, 1, 512)
    for texts in ("a text", Path("a.txt")):
        with pytest.raises(TypeError, match="texts must be an iterable of texts"):
            token_blocks(texts, tokenizer, 1, 1)
    with pytest.warns(UserWarning, match="blocks of 8 tokens; 900000 were requested"):
        token_blocks(ROWS[:4], tokenizer, 900000, 8)


def capture_inputs(model, batches):
    """The inputs of every linear, {name: [rows, K]}, by the plainest hooks there are."""
    rows: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def keep(module, args):
            rows.setdefault(name, []).append(args[0].detach().flatten(0, -2).clone())

        return keep

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def assert_equals_plain(stats: ChannelStats, x: torch.Tensor):
    assert stats.count == x.shape[0] and stats.num_channels == x.shape[1]
    wide = x.double()
    assert torch.equal(stats.abs_max, x.abs().amax(dim=0).float())
    assert torch.equal(stats.minimum, x.amin(dim=0).float())
    assert torch.equal(stats.argmax, x.abs().argmax(dim=0))
    torch.testing.assert_close(stats.abs_sum, wide.abs().sum(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sq_sum, wide.square().sum(dim=0), rtol=1e-6, atol=0)


def test_collect_stats_equals_plain_torch(make_model, architecture, token_ids):
    """Every linear's entry describes that linear's own input, shared or not."""
    model = make_model(architecture)
    batches = [token_ids, token_ids.flip(1)[:, :17]]
    plain = capture_inputs(model, batches)
    stats = collect_stats(model, batches, progress=False)
    for item in layer_inputs(model):
        for name in item.linears:
            assert stats[name] is stats[item.linears[0]]
            assert_equals_plain(stats[name], plain[name])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_collect_stats_of_fused_experts(make_model, token_ids):
    model = make_model("mixtral")
    calls = {}
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ == "MixtralExperts"}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: calls.__setitem__(name, args)
        )
        for name, module in blocks.items()
    ]
    stats = collect_stats(model, [token_ids], progress=False)
    for handle in handles:
        handle.remove()
    idle = 0
    for name, module in blocks.items():
        x, routed, _ = calls[name]
        assert_equals_plain(stats[name], x)
        for expert in range(module.num_experts):
            tokens = [t for t in range(x.shape[0]) if expert in routed[t].tolist()]
            if not tokens:
                idle += 1
                continue
            rows = x[tokens]
            assert_equals_plain(stats[f"{name}.{expert}.gate_up_proj"], rows)
            hidden = rows @ module.gate_up_proj[expert].T
            half = hidden.shape[1] // 2
            down = nn.functional.silu(hidden[:, :half]) * hidden[:, half:]
            entry = stats[f"{name}.{expert}.down_proj"]
            assert entry.count == len(tokens)
            torch.testing.assert_close(entry.abs_max, down.abs().amax(dim=0))
    assert len(blocks) == 2 and idle <= 2


def test_collect_stats_says_which_experts_are_idle(make_model):
    model = make_model("mixtral")
    with pytest.warns(UserWarning, match=r"no token was routed to .*mlp\.experts\.\d"):
        stats = collect_stats(model, [torch.tensor([[5]])], progress=False)
    assert {item.name for item in layer_inputs(model)} <= set(stats)


def test_collect_stats_stops_at_the_first_broken_layer(make_model, token_ids):
    model = make_model("llama").train()
    broken = model.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        broken.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj holds NaN or Inf"):
        collect_stats(model, [token_ids], progress=False)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_collect_stats_needs_batches_of_rows(make_model, token_ids):
    with pytest.raises(ValueError, match="batches"):
        collect_stats(make_model("llama"), [], progress=False)
    for batch, what in ((token_ids[0], r"Tensor of shape \(24,\)"), ([[5]], r"list of shape \(\)")):
        with pytest.raises(ValueError, match=f"item 1 is {what}"):
            collect_stats(make_model("llama"), [token_ids, batch], progress=False)


def test_quantized_models_are_refused(make_model, token_ids):
    model = make_model("opt")
    quantize(model, MixedQuantConfig(), progress=False)
    with pytest.raises(ValueError, match="model is quantized already"):
        collect_stats(model, [token_ids], progress=False)
    for function in (get_act_scales, get_static_decoder_layer_scales):
        with pytest.raises(ValueError, match="model is quantized already"):
            function(model, None, ROWS)


def test_every_module_keeps_its_training_mode(tiny_opt, make_model, token_ids):
    model = make_model("opt").train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.decoder.layers[1].register_forward_pre_hook(lambda m, args: seen.append(m.training))
    collect_stats(model, [token_ids], progress=False)
    assert seen == [False] and [module.training for module in model.modules()] == modes
    model = load_bundled("tiny-opt")[0].train()
    get_act_scales(model, tiny_opt[1], ["text"])
    assert all(module.training for module in model.modules())


class CallsByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, token_ids):
        return self.inner(input=self.embed(token_ids))


@pytest.mark.filterwarnings("ignore:model type None")
def test_layers_called_by_keyword():
    model, token_ids = CallsByKeyword(), torch.tensor([[1, 5, 7]])
    stats = collect_stats(model, [token_ids], progress=False)
    assert_equals_plain(stats["inner"], model.embed(token_ids)[0])


def test_stats_saved_and_loaded_are_equal(tiny_opt, blocks, tmp_path):
    stats = collect_stats(tiny_opt[0], blocks, progress=False)
    stats["mean.only"] = ChannelStats.from_mean(torch.tensor([0.5, 2.0]))
    save_stats(stats, tmp_path / "new" / "stats.safetensors")
    loaded = load_stats(tmp_path / "new" / "stats.safetensors")
    assert list(loaded) == list(stats)
    for name, entry in stats.items():
        for field in STAT_DTYPES:
            assert torch.equal(getattr(loaded[name], field), getattr(entry, field)), (name, field)
        assert loaded[name].mean_only == entry.mean_only
    layer = "model.decoder.layers.0.self_attn"
    assert loaded[f"{layer}.q_proj"] is loaded[f"{layer}.v_proj"]
    assert loaded[f"{layer}.q_proj"] is not loaded[f"{layer}.out_proj"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["stats.safetensors"]


@pytest.fixture
def stats_file(tmp_path):
    stats = ChannelStats.empty(5)
    stats.update(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    save_stats({"a": stats, "b": stats}, tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def test_damaged_stats_files(stats_file):
    whole = stats_file.read_bytes()
    generator = random.Random(0)
    for length in [0, 1, 8, 9, 100, len(whole) - 1]:
        stats_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="stats.safetensors"):
            load_stats(stats_file)
    for _ in range(300):  # either detected or without effect on what may be relied on
        broken = bytearray(whole)
        broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        stats_file.write_bytes(broken)
        try:
            loaded = load_stats(stats_file)
        except CheckpointError:
            continue
        for entry in loaded.values():
            assert entry.num_channels == 5 and entry.is_finite()


def test_deeply_nested_names_in_a_stats_file(stats_file):
    tensors = load_file(stats_file)
    metadata = {"format": "mixedquant-stats", "version": "1", "mean_only": "[]"}
    save_file(tensors, stats_file, metadata | {"names": "[" * 100_000})
    with pytest.raises(CheckpointError, match="damaged statistics: RecursionError"):
        load_stats(stats_file)


def test_missing_and_foreign_stats_files(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_stats(tmp_path / "nowhere.safetensors")
    save_act_scales({"a": torch.ones(3)}, tmp_path / "scales.safetensors")
    with pytest.raises(CheckpointError, match="not a calibration statistics file"):
        load_stats(tmp_path / "scales.safetensors")
    with pytest.raises(TypeError, match=r"stats\['a'\].*Tensor"):
        save_stats({"a": torch.ones(3)}, tmp_path / "stats.safetensors")


def test_a_failed_write_keeps_the_old_file(stats_file, monkeypatch):
    before = stats_file.read_bytes()

    def fail(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_stats({"a": ChannelStats.empty(5)}, stats_file)
    assert stats_file.read_bytes() == before
    assert [p.name for p in stats_file.parent.iterdir()] == [stats_file.name]


def test_act_scales_are_the_published_ones(tiny_opt, tmp_path):
    """max|x| per channel of every nn.Linear over the texts, each cut at seq_len."""
    model, tokenizer = tiny_opt
    texts = [row for row in ROWS if row.strip()][:10]
    ids = [tokenizer(t, return_tensors="pt").input_ids[:, :24] for t in texts]
    plain = capture_inputs(model, ids)
    write_jsonl(tmp_path / "texts.jsonl", ["", *texts])
    write_jsonl(tmp_path / "half.jsonl", texts[:5])
    write_jsonl(tmp_path / "rest.jsonl", texts[5:])
    paths = [tmp_path / "half.jsonl", str(tmp_path / "rest.jsonl")]
    for source in (texts, tmp_path / "texts.jsonl", str(tmp_path / "texts.jsonl"), paths):
        scales = get_act_scales(model, tokenizer, source, num_samples=512, seq_len=24)
        linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert set(scales) == linears and "lm_head" in linears
        for name, x in plain.items():
            assert scales[name].dtype == torch.float32
            assert torch.equal(scales[name], x.abs().amax(dim=0)), name


def test_act_scales_draw_num_samples_texts(tiny_opt):
    model, tokenizer = tiny_opt
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    texts = [f"text number {i}" for i in range(50)]
    first = get_act_scales(model, tokenizer, texts, num_samples=5, seq_len=3)
    again = get_act_scales(model, tokenizer, iter(texts), 5, 3)
    handle.remove()
    assert seen == [(1, 3)] * 10
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_act_scales_cover_fused_experts(make_model):
    class Tokenizer:
        def __call__(self, text, **kwargs):
            ids = torch.tensor([[3 + ord(c) % 90 for c in text]])
            return type("Encoding", (), {"input_ids": ids})

    model = make_model("mixtral")
    scales = get_act_scales(model, Tokenizer(), ["some words to route"])
    for layer in (0, 1):
        router, experts = f"model.layers.{layer}.mlp.gate", f"model.layers.{layer}.mlp.experts"
        assert torch.equal(scales[router], scales[experts]) and scales[router].shape == (48,)


def test_act_scales_arguments(tiny_opt):
    model, tokenizer = tiny_opt
    with pytest.raises(ValueError, match="num_samples .*0"):
        get_act_scales(model, tokenizer, ROWS, num_samples=0)
    with pytest.raises(ValueError, match="seq_len .*-3"):
        get_act_scales(model, tokenizer, ROWS, seq_len=-3)
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        get_act_scales(model, tokenizer, "nowhere.jsonl")
    with pytest.raises(ValueError, match="dataset_path"):
        get_act_scales(model, tokenizer, ["", " \n"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["scales.pt", "scales.safetensors"])
def test_act_scales_saved_and_loaded(name, tmp_path):
    scales = {"a.b": torch.tensor([1.0, 0.0, 3.5]), "c": torch.ones(2)}
    save_act_scales(scales, tmp_path / name)
    loaded = load_act_scales(tmp_path / name)
    assert set(loaded) == set(scales)
    assert all(torch.equal(loaded[key], scales[key]) for key in scales)


def test_act_scales_that_share_memory_are_saved(stats_file, tmp_path):
    scales = load_act_scales(stats_file)
    assert scales["a"].data_ptr() == scales["b"].data_ptr()
    save_act_scales(scales, tmp_path / "scales.safetensors")
    again = load_act_scales(tmp_path / "scales.safetensors")
    assert all(torch.equal(again[name], scales[name]) for name in "ab")


def test_files_are_as_open_as_new_files(stats_file, tmp_path):
    (tmp_path / "new").write_text("")
    save_act_scales({"a": torch.ones(2)}, tmp_path / "scales.pt")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_act_scales_from_statistics(stats_file):
    assert torch.equal(load_act_scales(stats_file)["b"], load_stats(stats_file)["a"].abs_max)


def test_broken_act_scales(tmp_path):
    path = tmp_path / "scales.pt"
    for content in (b"", b"not a tensor file"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="scales.pt"):
            load_act_scales(path)
    for value in ([torch.ones(2)], {"a": 1.0}, {"a": torch.ones(2, 2)}, {"a": -torch.ones(2)}):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="scales.pt"):
            load_act_scales(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_act_scales(tmp_path / "nowhere.pt")


HOSTILE_SCALES = {
    "more values than memory": {"a": torch.ones(1).expand(2**40)},
    "no memory at all": {"a": torch.empty(2**45, device="meta")},
    "sparse": {"a": torch.ones(3).to_sparse()},
    "complex": {"a": torch.ones(3, dtype=torch.complex64)},
    "integers": {"a": torch.ones(3, dtype=torch.int64)},
    "float8": {"a": torch.ones(3).to(torch.float8_e4m3fn)},
    "beyond float32": {"a": torch.full((3,), 1e300, dtype=torch.float64)},
    "NaN": {"a": torch.full((3,), float("nan"))},
    "a number for a name": {3: torch.ones(3)},
    "dicts in dicts": {"a": {"b": torch.ones(3)}},
    "no dimension": {"a": torch.ones(())},
    "a module": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("what", HOSTILE_SCALES)
@pytest.mark.parametrize("load", [load_act_scales, load_stats])
def test_hostile_scales_are_refused(what, load, tmp_path):
    torch.save(HOSTILE_SCALES[what], tmp_path / "scales.pt")
    with pytest.raises(CheckpointError, match="scales.pt: ") as refused:
        load(tmp_path / "scales.pt")
    assert "weights_only" not in str(refused.value)  # no advice to run what is in it


def test_published_scales_are_statistics(tiny_opt, tmp_path):
    model, tokenizer = tiny_opt
    scales = get_act_scales(model, tokenizer, ROWS, num_samples=8, seq_len=24)
    save_act_scales(scales, tmp_path / "scales.pt")
    stats = load_stats(tmp_path / "scales.pt")
    for name, scale in scales.items():
        entry = stats[name]
        assert torch.equal(entry.abs_max, scale) and torch.equal(entry.minimum, -scale)
        for other in (entry.mean, entry.rms):
            assert torch.equal(other.float(), scale)
        assert entry.count == 1 and not entry.mean_only and entry.is_finite()
    twins = [copy.deepcopy(model) for _ in range(2)]
    config = MixedQuantConfig(salient_prop=0.1, smooth_alpha=0.5)
    quantize(twins[0], config, stats, progress=False)
    quantize(twins[1], config, tmp_path / "scales.pt", progress=False)
    for name, tensor in twins[0].state_dict().items():
        assert torch.equal(tensor, twins[1].state_dict()[name])
    layer = twins[0].model.decoder.layers[0].fc2  # not made by a norm: not smoothed
    largest = scales["model.decoder.layers.0.fc2"].topk(layer.num_salient).indices
    assert set(layer.perm[-layer.num_salient :].tolist()) == set(largest.tolist())
    with pytest.raises(CheckpointError, match="nowhere.pt"):
        quantize(copy.deepcopy(model), config, "nowhere.pt")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_scales_file_is_not_run(tmp_path):
    torch.save({"a": Canary(tmp_path / "escaped")}, tmp_path / "scales.pt")
    with pytest.raises(CheckpointError, match="scales.pt"):
        load_act_scales(tmp_path / "scales.pt")
    assert not (tmp_path / "escaped").exists()


def test_static_scales_of_opt(tiny_opt, make_model):
    model, tokenizer = tiny_opt
    texts = [row for row in ROWS if row.strip()][:3]
    ids = [tokenizer(t, return_tensors="pt").input_ids[:, :16] for t in texts]
    plain = capture_inputs(model, ids)
    layers, ranges = get_static_decoder_layer_scales(model, tokenizer, texts, seq_len=16)
    assert len(layers) == model.config.num_hidden_layers
    name = "model.decoder.layers.1.fc2"
    assert ranges[name]["input"] == plain[name].abs().max().item()
    with torch.no_grad():
        outputs = model.get_submodule(name)(plain[name])
    assert ranges[name]["output"] == pytest.approx(outputs.abs().max().item(), rel=1e-5)
    assert layers[1]["fc2_input_scale"] == ranges[name]["input"] / 127
    assert set(layers[0]) == {
        "attn_input_scale",
        "q_output_scale",
        "k_output_scale",
        "v_output_scale",
        "out_input_scale",
        "fc1_input_scale",
        "fc2_input_scale",
    }
    headless, _ = get_static_decoder_layer_scales(model.model, tokenizer, texts, seq_len=16)
    assert headless == layers
    with pytest.raises(ValueError, match="model .*'llama'"):
        get_static_decoder_layer_scales(make_model("llama"), tokenizer, texts)


def load_example(name):
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_act_scales(tiny_opt, tmp_path, capsys):
    write_jsonl(tmp_path / "texts.jsonl", ROWS)
    argv = ["--model-name", "tiny-opt", "--dataset-path", str(tmp_path / "texts.jsonl")]
    argv += ["--num-samples", "4", "--seq-len", "32", "--output-path", str(tmp_path / "a" / "s.pt")]
    load_example("generate_act_scales").main(argv)
    saved = torch.load(tmp_path / "a" / "s.pt", weights_only=True)
    expected = get_act_scales(*tiny_opt, ROWS, num_samples=4, seq_len=32)
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert str(tmp_path / "a" / "s.pt") in capsys.readouterr().out


def quantized_configs(model):
    return {m.config for m in model.modules() if isinstance(m, W4A4Linear)}


def test_export(tiny_opt, tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "texts.jsonl", ROWS)
    argv = ["--model-name", "tiny-opt", "--dataset-path", str(tmp_path / "texts.jsonl")]
    argv += ["--num-samples", "4", "--seq-len", "32", "--output-path", str(tmp_path)]
    example = load_example("export_int8_model")
    example.main([*argv, "--export-FT"])
    smoothed, _ = load_model(tmp_path / "tiny-opt-smoothquant")
    token_ids = tiny_opt[1](ROWS[3], return_tensors="pt").input_ids
    with torch.no_grad():
        difference = smoothed(token_ids).logits - tiny_opt[0](token_ids).logits
    assert difference.abs().max() < 1e-3
    scales = torch.load(tmp_path / "tiny-opt-smoothquant-scales.pt", weights_only=True)
    assert scales["model.decoder.layers.0.fc1"]["input"] > 0

    example.main([*argv, "--group-size", "32"])
    assert "4-bit weights and activations, group size 32, 5%" in capsys.readouterr().out
    packed, tokenizer = load_model(tmp_path / "tiny-opt-smoothquant-w4a4")
    with torch.no_grad():
        logits = packed(tokenizer(ROWS[3], return_tensors="pt").input_ids).logits
    assert logits.isfinite().all()

    def refused(*arguments):
        with pytest.raises(SystemExit):
            example.main(arguments)
        return capsys.readouterr().err

    monkeypatch.setattr(example, "load_model", lambda name: pytest.fail("the model was loaded"))
    assert "folder already exists" in refused(*argv)
    monkeypatch.undo()
    example.main([*argv, "--overwrite"])
    again, _ = load_model(tmp_path / "tiny-opt-smoothquant-w4a4")
    assert next(iter(quantized_configs(again))).group_size == 128

    monkeypatch.setattr(example, "get_act_scales", lambda *args: pytest.fail("calibrated"))
    with pytest.raises(SystemExit, match="less than one block of 2000000"):
        example.main([*argv, "--overwrite", "--seq-len", "2000000"])


@pytest.mark.parametrize("name", ["generate_act_scales", "export_int8_model"])
@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model-name", "/no/such"], "/no/such"),
        (["--dataset-path", "nowhere.txt"], "nowhere.txt"),
        (["--num-samples", "0"], "num_samples"),
        (["--seq-len", "-1"], "seq_len"),
    ],
)
def test_examples_refuse_bad_flags(name, argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_example(name).main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
